"""`weighting tokens`: the weights it shows against the core's on logits of a model run here."""

from html.parser import HTMLParser

import click.testing
import pytest
import small
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import example, given
from hypothesis import strategies as st
from runs import seed_checkpoint
from warm import weighting
from whole import whole_model

import weighting as wt
from titan_integration import config_registry
from titan_integration.commands import tokens
from weighting.cli import main
from weighting.language.read import resolve
from weighting.report.shading import Shaded, Token, Weighed

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning",
    "ignore:'set_vital' is deprecated:UserWarning",
)

MODEL = ["--module=small", "--config=debugmodel"]
SEQ_LEN = 16
SMALL = f"--training.seq_len={SEQ_LEN}"
TEXT = "\n def f(x):\r\n\treturn x  # <b>&amp; «日本» 🦜\n" + "The end of it. " * 6
SPECS = "linupper", "mile", "eaft"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a text in it."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_bytes(TEXT.encode())
    return folder


@pytest.fixture(scope="module")
def seed(folder):
    """Return the folder of a checkpoint of the debug model."""
    return seed_checkpoint(folder / "seed", SMALL)


@pytest.fixture(scope="module")
def tokenizer():
    """Return the debug model's tokenizer."""
    config = config_registry.llama3_debugmodel()
    return config.tokenizer.build(tokenizer_path=config.hf_assets_path)


@pytest.fixture(scope="module")
def model(seed):
    """Build the debug model here with the seed's parameters; it returns logits."""
    return whole_model(small.debugmodel(), SEQ_LEN, seed).eval()


class Spans(HTMLParser):
    """Notes text and title of every span of a page's texts."""

    def __init__(self, page):
        super().__init__()
        self.sections, self.inside = [], False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        """Begin a text, or a token of one."""
        if tag == "div" and dict(attrs).get("class") == "text":
            self.sections.append([])
            self.inside = True
        elif self.inside:
            self.sections[-1].append(["", dict(attrs)["title"]])

    def handle_data(self, data):
        """Collect the text of a token."""
        if self.inside:
            self.sections[-1][-1][0] += data

    def handle_endtag(self, tag):
        """End a text."""
        self.inside &= tag != "div"


def numbers(title):
    """Return the numbers a title tells: loss, entropy and weights, in their order."""
    lines = title.split("\n")[1:-1]
    return [float(line.split()[1]) for line in lines]


@torch.no_grad()
def expected(model, ids, step):
    """Return loss, entropy and weights of each token but the first, [T, 2 + specs].

    Each window alone through the model, all together through the core.
    """
    rows = -(-(len(ids) - 1) // SEQ_LEN)
    logits = torch.zeros(rows, SEQ_LEN, model.config.vocab_size)
    labels = torch.full((rows, SEQ_LEN), -100)
    for row in range(rows):
        window = torch.tensor(ids[row * SEQ_LEN : (row + 1) * SEQ_LEN + 1])
        positions = torch.arange(len(window) - 1)[None]
        masks = model.get_attention_masks(positions=positions)
        logits[row, : len(window) - 1] = model(window[None, :-1], positions, masks)[0]
        labels[row, : len(window) - 1] = window[1:]
    valid = labels != -100
    log_p = logits.log_softmax(-1)
    loss = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    found = [loss, -(log_p.exp() * log_p).sum(-1)]
    for text in SPECS:
        fn = wt.build(resolve(text))
        found.append(wt.weighted_cross_entropy(logits, labels, fn, step=step)[1].token)
    return torch.stack([x[valid] for x in found], -1)


@pytest.mark.processes
def test_weights_are_the_core_s_on_the_model_s_logits(folder, seed, model, tokenizer):
    """Each window a sequence of one batch; the page's texts are the text, in a pipe a table."""
    html = folder / "page.html"
    given = ["--checkpoint", seed, "--text", folder / "text.txt", "--html", html, "--step", 1000]
    done = weighting("tokens", *SPECS, *given, *MODEL, SMALL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    ids = tokenizer.encode(TEXT, add_bos=True, add_eos=True)
    wanted = expected(model, ids, step=1000)
    assert len({round(x, 4) for x in wanted[:, 2].tolist()}) > 1, "windows weigh differently"
    sections = Spans(html.read_bytes().decode()).sections
    assert len(sections) == len(SPECS)
    for spans in sections:
        assert "".join(text for text, _ in spans) == TEXT
        found = torch.tensor([numbers(title) for _, title in spans])
        # Four decimals are shown; and float32 sums in another order, of losses about 8.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert [path.name for path in folder.glob("*page*")] == ["page.html"]

    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout
    assert done.stdout.endswith(f"\npage: {html}\n")
    said = " ".join(done.stdout.split())
    assert "weights of step 1000" in lines
    assert f"It weighs each sequence, here {-(-len(wanted) // SEQ_LEN)} windows of 16, the" in said
    assert f"The mean is one over the {len(wanted)} tokens here" in said
    heading = next(i for i, line in enumerate(lines) if line.startswith("     #  token"))
    rows = lines[heading + 1 : heading + 1 + len(wanted)]
    shown = torch.tensor([[float(x) for x in row.split()[-5:]] for row in rows])
    torch.testing.assert_close(shown, wanted, rtol=0, atol=1e-4)


@pytest.mark.processes
def test_a_checkpoint_of_another_model_is_one_message_and_status_2(folder, model):
    """And no page is written."""
    other, html = folder / "other" / "step-7", folder / "not.html"
    state = model.state_dict() | {"layers.0.attention_norm.weight": torch.ones(32)}
    dcp.save(state, checkpoint_id=other, no_dist=True)
    given = ["--checkpoint", other, "--text", folder / "text.txt", "--html", html]
    done = weighting("tokens", "mile", *given, *MODEL, SMALL)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line]
    message = f"error: --checkpoint: {other} is no checkpoint of llama3 debugmodel: layers.0."
    assert [line[: len(message)] for line in lines] == [message]
    assert not list(folder.glob("*not.html*"))


@pytest.mark.slow
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("<|begin_of_text|><|begin_of_text|>a<|end_of_text|>")
@example("é日🦜👩‍👩‍👧 \r\n\0\ufffd")
def test_parts_of_any_text_join_to_it(tokenizer, text):
    """One for each token but the end of text, and the begin of text has none of it."""
    ids, pieces = tokens.encoded(tokenizer, text)
    assert "".join(pieces) == text
    assert pieces[0] == "" or len(ids) == 2
    assert len(pieces) == len(ids) - 1
    assert ids == tokenizer.encode(text, add_bos=True, add_eos=True)


def test_the_first_of_a_character_s_tokens_has_it(tokenizer):
    """A parrot is four bytes, which were never merged."""
    _, pieces = tokens.encoded(tokenizer, "a🦜b")
    assert pieces == ["", "a", "🦜", "", "", "", "b"]


@pytest.mark.parametrize(
    ("lengths", "spec", "said"),
    [
        (
            [16, 16, 3],
            "linupper",
            "It weighs each sequence, here 3 windows of 16, the last of 3, by",
        ),
        (
            [9],
            "linupper",
            "It weighs each sequence, and the text is one: all tokens weigh the same.",
        ),
        ([9], "mile", "The mean is one over the 9 tokens here, in training over a batch's."),
        ([9], "dft", "Weights are as the spec leaves them: it says normalize: none."),
        ([9], "toremi", "It weighs domains, and the text is of one."),
        ([9], "group-dro", "It remembers earlier batches, and this text is its first."),
    ],
)
def test_a_legend_says_what_weights_compare(lengths, spec, said):
    """A single text is not a batch."""
    fn = wt.build(wt.load(spec), domains=["text"])
    assert said in "\n".join(tokens.notes(fn, lengths))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Go where there are a text, an empty file, one that is not text, and no checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff")
    (tmp_path / "none").mkdir()
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / ".metadata").touch()
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nothing"], "--checkpoint nothing: no such folder"),
        (["--checkpoint=none"], "--checkpoint none: no checkpoint here, neither .metadata nor"),
        (["--text=empty.txt"], "--text empty.txt: the file is empty; it takes a text"),
        (["--text=bytes.txt"], "--text bytes.txt: not UTF-8 text (byte 2); save it as UTF-8"),
        (["--html=b/a.html"], "--html b/a.html: no file can be written there; name one in"),
        (["--html=a.txt"], "--html a.txt: that is the text itself; choose another name"),
        (["--config=llama3_9b"], "no config function 'llama3_9b'; did you mean 'llama3_8b'?"),
        (
            ["--", "--parallelism.tensor_parallel_degree=2"],
            "one process runs the model here; set --parallelism.tensor_parallel_degree 1",
        ),
        (["--", "--hf_assets_path=none"], "--hf_assets_path none: no tokenizer there"),
        (["--module=none_such"], "--module none_such: Cannot import module 'none_such'"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(arguments, message):
    """Status 2, before the model is built."""
    done = run("mile", "--checkpoint=step-3", "--text=a.txt", *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("is_terminal", "variables", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    is_terminal, variables, coloured, monkeypatch, capsys
):
    """A table otherwise; a page is named at the end."""
    token = Token("a", 1, 1.0, 1.0, (1.0,))
    shaded = Shaded("a.txt", (), (Weighed("mile"),), (token,))
    monkeypatch.setattr(tokens, "shaded_text", lambda _: shaded)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tokens.sys.stdout, "isatty", lambda: is_terminal)
    given = {"module": "titan_integration", "config": "llama3_debugmodel"}
    specs = [("mile", wt.load("mile"))]
    assert tokens.main(specs=specs, checkpoint="c", text="a.txt", **given) == 0
    assert ("\x1b" in capsys.readouterr().out) == coloured


@pytest.mark.usefixtures("here")
def test_a_token_alone_is_refused(monkeypatch):
    """As a tokenizer without begin and end of text may leave one."""
    monkeypatch.setattr(tokens, "encoded", lambda *_: ([5], ["a"]))
    done = run("mile", "--checkpoint=step-3", "--text=a.txt")
    assert done.exit_code == 2
    assert "--text a.txt: one token alone, which nothing predicts" in done.stderr


@pytest.mark.usefixtures("here")
def test_a_tokenizer_of_another_model_is_named(monkeypatch):
    """One with more tokens than the model knows."""
    monkeypatch.setattr(tokens, "encoded", lambda *_: ([0, 99_999], ["", "a"]))
    done = run("mile", "--checkpoint=step-3", "--text=a.txt")
    assert done.exit_code == 2
    assert "token 99999 is not one of the model's 2048; give the tokenizer it was" in done.stderr


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    """Neither a part, nor a changed page."""
    page = tmp_path / "page.html"
    page.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens.Path, "replace", full)
    with pytest.raises(ValueError, match=r"--html .*page.html: cannot write it: No space left"):
        tokens._write(page, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert page.read_text() == "old"


def run(*arguments):
    """Return what the command did in this process."""
    return click.testing.CliRunner().invoke(main, ["tokens", *arguments])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "Missing argument"),
        (["--training.seq_len=8"], "one to 3 specs, before torchtitan's flags; there are 0"),
        (["mile"] * 4, "one to 3 specs, before torchtitan's flags; there are 4"),
        (["milee"], "did you mean 'mile'"),
        (["rho-1"], "rho-1: it reads the loss of a reference model; weights here are from one"),
        (["mile", "longce"], "longce: it reads the column 'short_loss_4096', which a plain text"),
        (
            ["table-x-linupper"],
            "table-x-linupper: it weighs domains by name, and a text is of none",
        ),
        (["uniform-domains"], "uniform-domains: it draws data and leaves the loss alone"),
        (["doge-proxy"], "doge-proxy: it is told between batches how training goes"),
    ],
)
def test_specs_that_a_text_cannot_show_are_refused(specs, message):
    """At once, with the reason."""
    done = run(*specs, "--checkpoint=step-3", "--text=a.txt")
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.usefixtures("here")
def test_specs_and_flags_are_told_apart(monkeypatch):
    """Specs come first; the rest is torchtitan's."""
    called = {}
    monkeypatch.setattr(tokens, "main", lambda **options: called.update(options) or 0)
    flags = ["--training.seq_len", "8"]
    done = run("mile", "loss -> temperature(1)", *flags, "--checkpoint=c", "--text=a.txt")
    assert done.exit_code == 0
    assert [*called.pop("flags")] == flags
    assert called.pop("specs") == [
        ("mile", wt.load("mile")),
        ("loss -> temperature(1)", wt.loads("loss -> temperature(1)")),
    ]
    assert {name: value for name, value in called.items() if value} == {
        "checkpoint": "c",
        "text": "a.txt",
        "config": "llama3_debugmodel",
        "module": "titan_integration",
    }


def test_help_fits_a_terminal():
    """80 columns."""
    done = run("--help")
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 80
