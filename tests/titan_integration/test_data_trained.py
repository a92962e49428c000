"""Every kind of data trains with the real trainer, stops and goes on; each is broken on purpose."""

import contextlib
import json
import re
import shutil

import datasets
import faulty
import pytest
import stores
from runs import HERE, torchrun
from test_chats import TEMPLATE
from written import BROKEN, FORMATS, RECORDS, lines, write

from titan_integration.data.tokenizer import cache_dir, ensure_tokenizer
from titan_integration.trainer.preflight import build_tokenizer

pytestmark = [pytest.mark.processes, pytest.mark.slow]

FLAGS = [
    "--module=faulty",
    "--config=tiny",
    "--weighting.spec=linupper",
    "--training.seq_len=32",
    "--training.local_batch_size=4",
    "--training.steps=3",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--loss.num_chunks=1",
    "--metrics.log_freq=1",
    "--debug.seed=1",
]
LACKS = pytest.mark.skipif(not stores.HAS_GS, reason="needs gcsfs and gcp-storage-emulator")
PLACES = ["file://", "memory://", "http://", "hf://", "s3://", pytest.param("gs://", marks=LACKS)]
KINDS = [*FORMATS, "save_to_disk", "input_ids", "labels", "loss_mask", "messages", "all", "all/*"]
FEW = RECORDS[:5]
"""So few that all are read before the last step."""
OF_KINDS = {name: message for name, (_, message) in BROKEN.items()} | {
    "save_to_disk": r".*/saved: .*cannot be opened: .*; save it again",
    "input_ids": r".*/input_ids\.jsonl:5: token id 99999, but the tokenizer has 2048",
    "labels": r".*/labels\.jsonl:5: label 7 at 1, where the token id is 6",
    "loss_mask": r".*/loss_mask\.jsonl:5: 'loss_mask' holds 2 at 1, not 0 or 1",
    "messages": r".*/messages\.jsonl:5: message 0 of 'messages' has no text as its 'content'",
    "all": r".*/all/x\.jsonl:1: column 'text' holds half a surrogate pair",
    "all/*": r".*/all/x\.jsonl:1: column 'text' holds half a surrogate pair",
}


def tokenised(encode, name, record):
    """Return a record's token ids, of which every other is predicted if a name says how."""
    ids = encode(record["text"], add_bos=True, add_eos=True)
    more = {
        "labels": [x if i % 2 else -100 for i, x in enumerate(ids)],
        "loss_mask": [i % 2 for i in range(len(ids))],
    }
    return {
        "input_ids": ids,
        "domain": record["domain"],
        **({name: more[name]} if more.get(name) else {}),
    }


def chat(record):
    """Return a record's text as the answer to a question."""
    said = [{"role": "user", "content": "say"}, {"role": "assistant", "content": record["text"]}]
    return {"messages": said, "domain": record["domain"]}


def spread(folder, records):
    """Write records as one folder of all formats, in the order of the files."""
    names, size = sorted(FORMATS), -(-len(records) // len(FORMATS))
    for i, name in enumerate(names):
        if part := records[i * size : (i + 1) * size]:
            write(folder, name, part)


def written(folder, encode, records):
    """Write records as every kind of data; return the path of each."""
    paths = {name: write(folder / str(i), name, records) for i, name in enumerate(FORMATS)}
    datasets.Dataset.from_list(records).save_to_disk(folder / "saved")
    paths["save_to_disk"] = folder / "saved"
    for name in ("input_ids", "labels", "loss_mask"):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_bytes(lines([tokenised(encode, name, r) for r in records]))
    paths["messages"] = folder / "messages.jsonl"
    paths["messages"].write_bytes(lines(map(chat, records)))
    spread(folder / "all", records)
    return paths | {"all": folder / "all", "all/*": folder / "all" / "*"}


def break_all(paths):
    """Break each kind of data."""
    for name, (breaks, _) in BROKEN.items():
        paths[name].write_bytes(breaks(paths[name].read_bytes()))
    file = next(paths["save_to_disk"].glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:200])
    for name, change in {
        "input_ids": {"input_ids": [1, 99_999]},
        "labels": {"input_ids": [5, 6], "labels": [5, 7]},
        "loss_mask": {"input_ids": [5, 6], "loss_mask": [1, 2]},
        "messages": {"messages": [{"role": "user"}]},
    }.items():
        *most, last = map(json.loads, paths[name].read_text().splitlines())
        paths[name].write_bytes(lines([*most, last | change]))
    half = {"text": "half \ud83d", "domain": "a"}
    (paths["all"] / "x.jsonl").write_bytes(lines([half]))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Train on everything, whole and broken, by index and as a stream; return what came of it."""
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("trained")
    config = faulty.tiny()
    config.hf_assets_path = str(shutil.copytree(ensure_tokenizer(), folder / "tokenizer"))
    (folder / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    encode = build_tokenizer(config).encode
    paths = written(folder / "whole", encode, RECORDS)
    broken = written(folder / "broken", encode, FEW)
    break_all(broken)

    served = folder / "served" / stores.RESOLVED
    spread(served / "all", RECORDS)
    (served / "bad.jsonl").write_bytes(lines(FEW) + b"{oops\n")
    cache = folder / "cache"
    cache.mkdir()
    (cache / "tokenizers").symlink_to(cache_dir() / "tokenizers")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        files = stack.enter_context(stores.s3())
        files.put(f"{served}/", "bucket/", recursive=True)
        address, _ = stack.enter_context(stores.served(folder / "served", stores.OfHuggingFace))
        patch.setenv("WEIGHTING_CACHE", str(cache))
        patch.setenv("FSSPEC_HF_ENDPOINT", address)
        patch.setenv("MEMORY", str(served))
        starts = {
            "file://": f"file://{served}",
            "memory://": "memory://data",
            "http://": f"{address}/{stores.RESOLVED}",
            "hf://": "hf://datasets/me/data",
            "s3://": "s3://bucket",
        }
        if stores.HAS_GS:
            starts["gs://"] = "gs://bucket"
            stack.enter_context(stores.gs()).put(f"{served}/", "bucket/", recursive=True)
        for place, start in starts.items():
            # A server of HTTP tells of no folder.
            paths[place] = f"{start}/all" if place != "http://" else f"{start}/x.jsonl"
            broken[place] = f"{start}/bad.jsonl"
        write(served, "x.jsonl", RECORDS)
        cases = {
            f"{what} {name} {way}": {
                "dataset": str(path),
                "domains": ["a", "b"],
                "streaming": way == "stream",
            }
            for what, of in (("whole", paths), ("broken", broken))
            for name, path in of.items()
            for way in ("index", "stream")
        }
        (folder / "cases.json").write_text(json.dumps(cases))
        arguments = [folder / "found.json", folder / "cases.json", *FLAGS]
        assets = [f"--hf_assets_path={folder}/tokenizer", f"--dump_folder={folder}/runs/all"]
        done = torchrun(1, str(HERE / "train_data.py"), *map(str, arguments), *assets)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("way", ["index", "stream"])
@pytest.mark.parametrize("name", [*KINDS, *PLACES])
def test_a_run_that_stops_goes_on_with_the_same_tokens_and_losses(found, name, way):
    """Bitwise; and all kinds of data give the tokens of the plain lines, but chats."""
    whole, resumed = found[f"whole {name} {way}"]
    assert [step for step, _ in whole["losses"]] == [1, 2, 3]
    assert resumed == {key: of[2:] for key, of in whole.items()}
    expected, _ = found[f"whole x.jsonl {way}"]
    if name != "messages":
        assert [x[:2] for x in whole["batches"]] == [x[:2] for x in expected["batches"]]
    if name not in {"messages", "labels", "loss_mask"}:
        assert whole == expected


@pytest.mark.parametrize("way", ["index", "stream"])
@pytest.mark.parametrize("name", [*KINDS, *PLACES])
def test_a_run_on_broken_data_ends_with_one_message(found, name, way):
    """And status 2; file, record and reason in one line."""
    status, said = found[f"broken {name} {way}"]
    message = OF_KINDS.get(name, rf"{name}.*/bad\.jsonl:6: invalid JSON")
    assert status == 2
    assert re.fullmatch(rf"\nerror: .*{message}.*\n", said), said
