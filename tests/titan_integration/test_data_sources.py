"""A file of sources: read, drawn by weight, in stages; and refused where it says nonsense."""

import json
from itertools import islice

import pytest
import torch

from titan_integration.data.loader import DomainTextDataLoader, load_documents


class Letters:
    """A tokenizer of bytes, with a begin and an end of text."""

    def encode(self, text, *, add_bos, add_eos):
        """Return token ids."""
        return [256] * add_bos + list(text.encode()) + [257] * add_eos

    def get_vocab_size(self):
        """Return how many ids there are."""
        return 258


WEB = "sources:\n- {data: web.jsonl, domain: web, weight: %s}\n"
BOTH = WEB + "- {data: 'books/*', domain: books, weight: %s}\n"


@pytest.fixture
def write(tmp_path):
    """Write two sources and the file that names them."""
    (tmp_path / "books").mkdir()
    for name in ("web.jsonl", "books/b.jsonl"):
        records = [{"text": f"{name} {i} " * 9, "domain": "own"} for i in range(20)]
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in records))

    def write(content):
        (tmp_path / "s.yaml").write_text(content)
        return str(tmp_path / "s.yaml")

    return write


def build(path, local_batch=8, **config):
    """Build a loader of short rows."""
    return DomainTextDataLoader.Config(dataset_path=path, **config).build(
        dp_world_size=1,
        dp_rank=0,
        tokenizer=Letters(),
        seq_len=16,
        local_batch_size=local_batch,
    )


def drawn(loader, count):
    """Return the domains of rows, a batch each."""
    return torch.stack([inputs["domain_ids"][:, 0] for inputs, _ in islice(loader, count)])


def test_sources_name_the_domains_of_their_records(write):
    """Or leave them their own; without weights rows are mixed."""
    path = write("sources: [{data: web.jsonl, domain: web}, {data: books/}]")
    loader = build(path)
    assert loader.domains == ("own", "web")
    assert loader.documents is not None
    assert load_documents(DomainTextDataLoader.Config(dataset=path))[0][1] == "web"
    assert len(loader.documents) == 40
    assert not loader.has_weights


def test_a_loader_says_how_many_domains_its_rows_may_be_of(write):
    """Drawn rows are of any domain, a batch in turns is of one, and a mixed row of several."""
    path = write("sources: [{data: web.jsonl, domain: web}, {data: books/, domain: books}]")
    found = {mode: build(path, rows=mode).row_domains for mode in ("mixed", "drawn", "turns")}
    assert found == {"mixed": 0, "drawn": 2, "turns": 1}
    assert build(write(BOTH % (3, 1))).row_domains == 2


def test_rows_are_drawn_by_weight_in_stages(write):
    """Books never before token 6,400, and always after it; on resuming, too."""
    path = write(BOTH % ("{0: 3, 6400: 0}", "{0: 0, 6400: 1}"))
    loader = build(path)
    ids = drawn(loader, 100)
    assert loader.domains == ("books", "web")
    assert (ids[:50] == 1).all()
    assert (ids[50:] == 0).all()
    first = build(path)
    drawn(first, 48)
    resumed = build(path)
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(drawn(resumed, 20), ids[48:68])
    share = drawn(build(write(BOTH % (3, 1))), 200).double().mean()
    assert 0.7 < share < 0.8
    with pytest.raises(ValueError, match=r"saved for other rows: .*weights"):
        build(write(BOTH % (2, 1))).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sources: []", r"s\.yaml: sources: List should have at least 1 item"),
        ("sources: [", r"s\.yaml: invalid YAML"),
        ("data: x", r"s\.yaml: sources: Field required"),
        ("- data: x", r"s\.yaml: the file: give a list of them, under 'sources:'"),
        (WEB % "-1", r"s\.yaml: sources\.0\.weight: give a number from 0 on"),
        (WEB % "true", r"s\.yaml: sources\.0\.weight: give a number from 0 on"),
        (WEB % "'3'", r"s\.yaml: sources\.0\.weight: give a number from 0 on"),
        (WEB % "{0: 1, 2e9: 2}", r"sources\.0\.weight: .* whole numbers of tokens"),
        ("sources: [{data: a, domain: x, domain: y}]", r"'domain' is given twice; keep one"),
        (WEB % "{5: 1}", r"s\.yaml: sources\.0\.weight: say the weight from token 0 on"),
        (WEB % "0", r"s\.yaml: every weight is 0 from token 0 on"),
        (BOTH % ("1", "null"), r"s\.yaml: sources\.1: give every source a weight, or none"),
        ("sources: [{data: web.jsonl, weight: 1}]", r"sources\.0: a weight needs a 'domain'"),
        ("sources: [{data: web.jsonl, wait: 1}]", r"sources\.0\.wait: Extra inputs"),
        ("sources: [{data: gone.jsonl}]", r"gone\.jsonl: no such file"),
    ],
)
def test_sources_that_cannot_be_are_refused(write, content, message):
    """With the place in the file."""
    with pytest.raises(ValueError, match=message):
        build(write(content))


@pytest.mark.parametrize("name", ["", " "])
def test_a_name_that_is_empty_is_refused(name):
    """As of a variable that is not set; no other text is taken for it."""
    for config in ({"dataset_path": name}, {"dataset": name}):
        with pytest.raises(ValueError, match="the data's name is empty"):
            load_documents(DomainTextDataLoader.Config(**config))


def test_settings_that_sources_cannot_have(write):
    """They are read by index, and drawn by weight or in turns."""
    path = write(BOTH % (1, 1))
    with pytest.raises(ValueError, match=r"read by index; leave out --dataloader.streaming"):
        build(path, streaming=True)
    with pytest.raises(ValueError, match="take turns here"):
        build(path, rows="turns")
