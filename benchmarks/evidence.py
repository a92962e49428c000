"""Does weighting help? A small language model trained with each method, from common seeds.

    python benchmarks/evidence.py --data FOLDER [--tokenizer FOLDER] --budget-minutes 30

FOLDER holds `train/` and `valid/` with .parquet or .jsonl files of the columns `text` and `domain`;
without it the text is Python's standard library.  For every seed there is one seed checkpoint and
one order of the data, from which `weighting train` trains one model for each method, as many at a
time as there are cores.  The budget is what all of it may take; it decides over the number of
steps, and where that would be too small, over how many methods there are.  A run that is done is
not made again, one that was cut off goes on.  Afterwards every model meets the validation text, and
`evidence_page.py` makes a table and a figure of what is found.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from evidence_page import BUCKETS, write_page

import weighting as wt
from titan_integration.commands import run_queue as series
from weighting.language.read import resolve
from weighting.runs.files import read_lines, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

METHODS = {
    "uniform": "uniform",
    "linupper-r0.4": "linupper",
    "mile": "mile",
    "linupper-r1": "normalize -> linupper(alpha=1) -> temperature(1) -> clamp(2/n)",
    "dro-kl": "dro-kl",
    "focal": "focal",
    "rho-1": "rho-1",
    "linupper-x-mile": "linupper-x-mile",
    "quadratic": "quadratic",
    "extremes": "extremes",
    "linupper-r2": "normalize -> linupper(alpha=1) -> temperature(2) -> clamp(2/n)",
}
"""What is compared: a name, and a shipped spec or its pipeline; the first that fit the budget."""
SEQ_LEN, ROWS = 128, 32
STEPS = [n * 2**k for k in range(4, 14) for n in (2, 3)]
"""The numbers of steps there are, so that a busy machine does not choose another each time."""
ENOUGH = STEPS[2]
"""With fewer steps a method less is compared, as long as there are two."""
PROBE = 16
REFERENCE_SEED = 1_000
FREQUENT, MEDIUM = 0.8, 0.95
"""The share of the training tokens that the frequent words make up, and they with the medium.

Su et al., MiLe Loss, NAACL Findings 2024, Table 1: 80, 15 and 5 per cent.
"""
SAMPLE = 2_000
"""So many training documents tell how frequent a word is."""


class Plan(NamedTuple):
    """What is to be run; kept in a file, so that the same command goes on with the same."""

    steps: int
    methods: list[str]
    seeds: int
    config: str
    flags: list[str]
    valid_tokens: int
    module: str = "titan_integration"


def main() -> None:
    """Train what is not there yet, look at it, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="folder with train/ and valid/; default: built-in text")
    parser.add_argument("--tokenizer", help="folder of a tokenizer with the model's vocabulary")
    parser.add_argument("--config", default="llama3_proxy")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget-minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, help="instead of a budget")
    parser.add_argument("--valid-tokens", type=int, default=16_384, help="at most, of a domain")
    parser.add_argument("--folder", type=Path, default=Path("outputs/evidence"))
    parser.add_argument("--out", type=Path, default=Path("outputs/evidence/evidence"))
    parser.add_argument("flags", nargs="*", help="further torchtitan flags, after --")
    args = parser.parse_args()
    args.folder = args.folder.absolute()  # the host takes no other paths of checkpoints
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # one run a core, and the same sums in the same order
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        plan = planned(args, given_flags(args))
        train_all(args.folder, plan)
        rows = look_at_all(args, plan)
        about = {
            "command": shown_command(args, plan),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, no accelerator used",
            "versions": {x: version(x) for x in ("torch", "torchtitan")},
            "buckets": [FREQUENT, MEDIUM],
            # Not where the text lies on this machine.
            "plan": plan._replace(flags=[x for x in plan.flags if "path=" not in x])._asdict(),
        }
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"about": json.dumps(about)})
    pq.write_table(table, args.out.with_suffix(".parquet"), compression="zstd")
    print(write_page(args.out))


def given_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that all runs share."""
    flags = [f"--training.seq_len={SEQ_LEN}", f"--training.local_batch_size={ROWS}"]
    flags += ["--metrics.log_freq=4", "--metrics.disable_color_printing"]
    flags += [f"--dataloader.dataset_path={args.data}"] if args.data else []
    flags += [f"--hf_assets_path={args.tokenizer}"] if args.tokenizer else []
    return flags + args.flags


def shown_command(args: argparse.Namespace, plan: Plan) -> str:
    """Return the command that does the same again, whatever the machine is busy with."""
    words = ["python benchmarks/evidence.py"]
    words += ["--data FOLDER"] if args.data else []
    words += ["--tokenizer FOLDER"] if args.tokenizer else []
    words += [f"--config {plan.config}", f"--seeds {plan.seeds}", f"--steps {plan.steps}"]
    words += [f"--valid-tokens {plan.valid_tokens}"]
    words += ["--methods", *plan.methods] if plan.methods != [*METHODS] else []
    return " ".join([*words, *(["--", *args.flags] if args.flags else [])])


def planned(args: argparse.Namespace, flags: list[str]) -> Plan:
    """Return the plan in the folder, or make one by the time a few steps take."""
    path = args.folder / "plan.json"
    if path.exists():
        plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
        methods = plan.methods if not args.steps else args.methods
        asked = Plan(
            args.steps or plan.steps, methods, args.seeds, args.config, flags, args.valid_tokens
        )
        if asked == plan:
            return plan
        sys.exit(f"{path} plans something else; take another --folder, or remove that one")
    steps, methods = args.steps, args.methods
    if not steps:
        began = time.monotonic()
        start, step = probed(args, flags)
        left = args.budget_minutes * 60 - (time.monotonic() - began)
        steps, count = within(left, start, step, args.seeds, len(methods))
        methods = methods[:count]
    plan = Plan(steps, methods, args.seeds, args.config, flags, args.valid_tokens)
    write_whole(path, json.dumps(plan._asdict(), indent=1) + "\n")
    without = args.methods[len(methods) :]
    too_long = f", no time for {', '.join(without)}" if without else ""
    print(f"plan: {len(methods)} methods, {args.seeds} seeds, {steps} steps each{too_long}")
    return plan


def probed(args: argparse.Namespace, flags: list[str]) -> tuple[float, float]:
    """Return the seconds a run takes to start, and those of a step, with all cores busy."""
    runs = [args.folder / "probe" / str(core) for core in range(cores())]
    command = ["uniform", f"--config={args.config}", f"--training.steps={PROBE}", *flags]
    began = time.monotonic()
    at_once([lambda run=run: weighting(run, "train", *command) for run in runs])
    took = time.monotonic() - began
    rates = [x["tps"] for run in runs for x in read_lines(run / "weighting" / "metrics.jsonl")[1:]]
    step = SEQ_LEN * ROWS / median(rates)
    return max(took - PROBE * step, 0.0), step


def within(seconds: float, start: float, step: float, seeds: int, methods: int) -> tuple[int, int]:
    """Return how many steps, and how many of the methods, fit.

    A reference and the seed checkpoints are runs too; weighting takes a tenth more, and looking at
    a model as long as starting it.
    """
    least = [*((count, ENOUGH) for count in range(methods, 1, -1)), (2, STEPS[0])]
    for count, enough in least:
        runs = -(-(1 + seeds + count * seeds) // cores())
        each = seconds / runs - 2 * start
        fits = [n for n in STEPS if n * step * 1.1 <= each]
        if fits and fits[-1] >= enough:
            return fits[-1], count
    sys.exit(
        f"{seconds / 60:g} minutes are not enough: starting a run takes {start:.0f} s here, a step "
        f"{step:.2f} s; raise --budget-minutes, or take fewer --seeds"
    )


def train_all(folder: Path, plan: Plan) -> None:
    """Make all runs that are not there, with a bar that knows how much is left."""
    specs = folder / "specs"
    specs.mkdir(exist_ok=True)
    for name in plan.methods:
        write_whole(specs / f"{name}.yaml", spec_text(name))
    seeds = range(plan.seeds)
    first = [lambda seed=seed: seed_checkpoint(folder, plan, seed) for seed in seeds]
    if "rho-1" in plan.methods:
        first.append(lambda: train(folder, plan, "reference", REFERENCE_SEED))
    at_once(first)
    jobs = [
        lambda seed=seed, name=name: train(folder, plan, name, seed)
        for seed in seeds
        for name in plan.methods
    ]
    runs = [run_of(folder, name, seed) for seed in seeds for name in plan.methods]
    label = f"{len(runs)} runs"
    with click.progressbar(length=len(runs) * plan.steps, label=label, show_eta=True) as bar:
        at_once(jobs, lambda: bar.update(sum(map(steps_done, runs)) - bar.pos))


def spec_text(name: str) -> str:
    """Return a spec of this name: a shipped one's pipeline, or a pipeline."""
    return wt.dumps(resolve(METHODS[name]).model_copy(update={"name": name}))


def train(folder: Path, plan: Plan, name: str, seed: int, *more: str) -> None:
    """Train one model to the end; more flags win over those of all."""
    run = run_of(folder, name, seed)
    if series.last_saved(run) == plan.steps:
        return
    spec = "uniform" if name == "reference" else str(folder / "specs" / f"{name}.yaml")
    flags = [f"--module={plan.module}", f"--config={plan.config}", *plan.flags]
    flags += [f"--training.steps={plan.steps}"]
    flags += [f"--debug.seed={seed}", f"--dataloader.seed={seed}"]
    flags += ["--checkpoint.enable", "--checkpoint.keep_latest_k=2"]
    flags += [f"--checkpoint.interval={max(plan.steps // 4, 16)}"]
    flags += [f"--lr_scheduler.warmup_steps={max(plan.steps // 20, 2)}"]
    if name != "reference":
        flags += [f"--checkpoint.initial_load_path={seeded(folder, seed)}"]
    if name == "rho-1":
        flags += [f"--weighting.reference={run_of(folder, 'reference', REFERENCE_SEED)}/checkpoint"]
    weighting(run, "train", spec, *flags, *more)


def seed_checkpoint(folder: Path, plan: Plan, seed: int) -> None:
    """Write the parameters that all runs of a seed start from."""
    start = folder / f"seed-{seed}" / "start"
    if series.last_saved(start) == 0:
        return
    flags = [f"--module={plan.module}", f"--config={plan.config}", *plan.flags]
    flags += ["--training.steps=1", f"--debug.seed={seed}"]
    flags += ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"]
    weighting(start, "train", "uniform", *flags)


def seeded(folder: Path, seed: int) -> Path:
    """Return the folder of a seed's checkpoint."""
    return folder / f"seed-{seed}" / "start" / "checkpoint" / "step-0"


def run_of(folder: Path, name: str, seed: int) -> Path:
    """Return a run's folder."""
    return folder / f"seed-{seed}" / name


def steps_done(run: Path) -> int:
    """Return how far a run is by its last line of metrics."""
    path = run / "weighting" / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    return int(lines[-1]["step"]) if lines else 0


_RUNNING: set[subprocess.Popen[bytes]] = set()
"""The runs that are on their way."""


def cores() -> int:
    """Return how many runs there are at a time."""
    return os.cpu_count() or 1


def weighting(run: Path, *command: str) -> None:
    """Run `weighting` into a folder, with what it prints beside it.

    Raises:
        RuntimeError: It failed; holds the end of what it printed.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_name(f"{run.name}.log")
    words = [sys.executable, "-m", "weighting", *command, "--ranks=1", f"--dump_folder={run}"]
    with log.open("a", encoding="utf-8") as file:
        # In a session of its own, so that it can be ended with all its ranks.
        child = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)  # noqa: S603
    _RUNNING.add(child)
    try:
        code = child.wait()
    finally:
        series.end(child)
        _RUNNING.discard(child)
    if code:
        end = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-8:])
        msg = f"{run}: exit status {code}; the same command goes on\n{end}"
        raise RuntimeError(msg)


def at_once(jobs: Sequence[Callable[[], None]], while_waiting: Callable[[], None] = int) -> None:
    """Do all jobs, as many at a time as there are cores; the first that fails ends it.

    Raises:
        RuntimeError: As the job that failed.
    """
    with ThreadPoolExecutor(cores()) as pool:
        waiting = [pool.submit(job) for job in jobs]
        try:
            while any(not job.done() for job in waiting):
                for job in waiting:
                    if job.done():
                        job.result()
                time.sleep(1)
                while_waiting()
            for job in waiting:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in [*_RUNNING]:
                series.end(child)
            raise


def look_at_all(args: argparse.Namespace, plan: Plan) -> list[dict[str, Any]]:
    """Return one row for each run and validation document."""
    text = Validation(plan)
    runs = [(seed, name) for seed in range(plan.seeds) for name in plan.methods]
    found = []
    with click.progressbar(runs, label="validation", show_eta=True) as bar:
        for seed, name in bar:
            run = run_of(args.folder, name, seed)
            path = run / "evidence.json"
            if not path.exists():
                write_whole(path, json.dumps(text.met_by(run, plan.steps)))
            lines = read_lines(run / "weighting" / "metrics.jsonl")
            rate = median(x["tps"] for x in lines[1:])
            about = {"method": name, "seed": seed, "tokens_per_second": rate}
            found += [about | row for row in json.loads(path.read_text(encoding="utf-8"))]
    return found


class Validation:
    """The validation text, cut into rows once, and the model that reads it."""

    def __init__(self, plan: Plan) -> None:
        """Read the text, and count how frequent words are in training."""
        from torchtitan.config import ConfigManager  # noqa: PLC0415 - takes seconds

        from titan_integration.data.loader import load_documents  # noqa: PLC0415
        from titan_integration.host import cpu  # noqa: PLC0415

        entry = [f"--module={plan.module}", f"--config={plan.config}"]
        config: Any = ConfigManager().parse_args([*entry, *plan.flags])
        cpu.prepare_config(config)
        tokenizer = config.tokenizer.build(tokenizer_path=config.hf_assets_path)
        self.config = config
        self.model = None
        encode = lambda text: tokenizer.encode(text, add_bos=True, add_eos=True)  # noqa: E731
        training = load_documents(config.dataloader)
        count = Counter[int]()
        sample = range(0, len(training), max(len(training) // SAMPLE, 1))
        for i in sample:
            count.update(encode(training[i][0])[1:])
        self.training_tokens = count.total() * len(training) / len(sample)
        self.bucket = buckets(count, tokenizer.get_vocab_size())
        held_out = load_documents(dataclasses.replace(config.dataloader, split="validation"))
        self.documents, taken = [], Counter[str]()
        for i in range(len(held_out)):
            text, domain = held_out[i]
            tokens = encode(text)
            if taken[domain] + len(tokens) <= plan.valid_tokens:
                taken[domain] += len(tokens)
                self.documents.append((domain, len(text.encode()), tokens))

    def met_by(self, run: Path, steps: int) -> list[dict[str, Any]]:
        """Return for each document its domain, bytes, and tokens and nats of every bucket."""
        losses = self.losses(run / "checkpoint" / f"step-{steps}")
        rows = []
        for number, (domain, size, tokens) in enumerate(self.documents):
            nll = losses[number].double()
            kinds = self.bucket[torch.tensor(tokens[1:], dtype=torch.long)]
            row = {"domain": domain, "document": number, "bytes": size}
            for kind, name in enumerate(BUCKETS):
                row[f"{name}_tokens"] = int((kinds == kind).sum())
                row[f"{name}_nats"] = float(nll[kinds == kind].sum())
            rows.append(row)
        return rows

    @torch.no_grad()
    def losses(self, checkpoint: Path) -> list[torch.Tensor]:
        """Return the loss of every token of every document, in nats."""
        from titan_integration.commands.score_windows import laid_out, packed, windows  # noqa: PLC0415
        from titan_integration.data.packing import Cut  # noqa: PLC0415
        from titan_integration.loss.reference_model import load_model  # noqa: PLC0415

        if self.model is None:
            self.config.model_spec.model.update_from_config(config=self.config)
            self.model = self.config.model_spec.model.build().eval()
            self.model.init_weights()
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads it
        load_model(self.model, checkpoint, "the plan's model", "evidence")
        lengths = [len(tokens) - 1 for _, _, tokens in self.documents]
        inputs = torch.tensor([x for *_, tokens in self.documents for x in tokens[:-1]] + [0])
        labels = torch.tensor([x for *_, tokens in self.documents for x in tokens[1:]] + [0])
        found = torch.zeros(len(inputs))
        training = self.config.training
        seq_len, batch = training.seq_len, training.local_batch_size
        cut = Cut(seq_len, batch, 0, 1)
        rows = packed(windows(lengths, seq_len), seq_len)
        for at in range(0, len(rows), batch):
            index, positions = laid_out(rows[at : at + batch], cut, padding=len(inputs) - 1)
            masks = self.model.get_attention_masks(positions=positions)
            logits = self.model(inputs[index], positions=positions, attention_masks=masks)
            losses = F.cross_entropy(
                logits.flatten(0, 1).float(), labels[index].flatten(), reduction="none"
            )
            found[index] = losses.view_as(index)
        return list(found[:-1].split(lengths))


def buckets(count: Counter[int], vocabulary: int) -> torch.Tensor:
    """Return for each word whether it is frequent, medium or rare: 0, 1, 2.

    The most frequent words that make up FREQUENT of all tokens are frequent; those that bring it to
    MEDIUM are medium; a word that was not seen is rare.
    """
    kinds = torch.full((vocabulary,), 2)
    total, seen = count.total(), 0
    for word, times in sorted(count.items(), key=lambda item: (-item[1], item[0])):
        kinds[word] = 0 if seen < FREQUENT * total else 1 if seen < MEDIUM * total else 2
        seen += times
    return kinds


if __name__ == "__main__":
    main()
