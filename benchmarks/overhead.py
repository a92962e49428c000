"""What a weighting costs a whole training run: seconds of a step, against torchtitan's own trainer.

    python benchmarks/overhead.py [--spec linupper] [--steps 50] [--warmup 10] [-- torchtitan flags]
    python benchmarks/overhead.py --record

The debug model trains on CPU in two processes of the real trainer, stock and weighted, on the same
text; or, with `--record`, weighted and weighted with every step recorded.  They take turns step by
step, and change who goes first, so that whatever else the machine does meets both.  A step is the
host's `train_step`: batch, forward, loss, backward, optimizer, log.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOAL, GOAL_OF_RECORD = 1.03, 1.02
FLAGS = [
    "--training.seq_len=128",
    "--training.local_batch_size=16",
    "--debug.seed=1",
    "--metrics.disable_color_printing",
]
"""What `weighting train` takes on CPU: 16 sequences of 128 tokens a step."""

Seconds = tuple[float, float]
"""Of a step: by the clock, and of all cores."""


def main(arguments: list[str] | None = None) -> int:
    """Take turns and print how the seconds of a step compare; status 1 if a trainer failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--spec", default="linupper")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=10, help="first steps, which do not count")
    parser.add_argument("--record", action="store_true", help="what recording every step costs")
    parser.add_argument("flags", nargs="*", help="further torchtitan flags, after --")
    args = parser.parse_args(arguments)
    weighted = ["--module=titan_integration", f"--weighting.spec={args.spec}"]
    configs, goal = {"stock": ["--module=stock_configs"], args.spec: weighted}, GOAL
    if args.record:
        recorded = [*weighted, "--weighting.record=every=1"]
        configs, goal = {args.spec: weighted, f"{args.spec} recorded": recorded}, GOAL_OF_RECORD
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        try:
            found = taken_in_turns(Path(folder), configs, args.warmup + args.steps, args.flags)
        except EOFError:
            for log in sorted(Path(folder).glob("*.log")):
                print(f"{log.name}:\n{log.read_text(encoding='utf-8')[-3000:]}")
            return 1
    base, more = (found[name][args.warmup :] for name in configs)
    which_base, which_more = configs
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(
        f"{args.steps} steps of the debug model on CPU, {which_more} against {which_base}, in turns"
    )
    print(f"{' '.join([*FLAGS, *args.flags])}; load average {load}")
    for which, name in enumerate(("clock", "CPU time")):
        pairs = list(zip(more, base, strict=True))
        ratios = [mine[which] / other[which] for mine, other in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        step = statistics.median(other[which] for _, other in pairs)
        print(f"{name}: {middle:.3f} [{low:.3f}, {high:.3f}] of {1000 * step:.0f} ms")
        if which == 0:
            print(f"{'PASS' if middle <= goal else 'MISS'}: asked <= {goal}")
    return 0


def taken_in_turns(
    folder: Path, configs: dict[str, list[str]], steps: int, flags: list[str]
) -> dict[str, list[Seconds]]:
    """Return the seconds of each step of each trainer.

    Raises:
        EOFError: A trainer ended early; its output is in the folder.
    """
    context = multiprocessing.get_context("spawn")
    turns, processes = {}, []
    for name, own in configs.items():
        turns[name], theirs = context.Pipe()
        log = folder / f"{len(turns)}.log"
        dump = f"--dump_folder={folder / name}"
        asked = ["--config=llama3_debugmodel", *own, *FLAGS, *flags, dump]
        asked.append(f"--training.steps={steps}")
        processes.append(context.Process(target=train, args=(theirs, log, asked), daemon=True))
        processes[-1].start()
        theirs.close()
    found: dict[str, list[Seconds]] = {name: [] for name in configs}
    for number in range(steps):
        for name in configs if number % 2 else reversed(configs):
            turns[name].send("your turn")
            found[name].append(turns[name].recv())
    for process in processes:
        process.join()
    return found


def train(turns: Connection, log: Path, flags: list[str]) -> None:
    """Train in this process, each step when it is its turn, and tell how long it took."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(alone, MASTER_ADDR="localhost", MASTER_PORT="0")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "titan_integration")]
    from torchtitan.config import ConfigManager  # noqa: PLC0415 - only in the trainers' processes
    from torchtitan.tools.logging import init_logger  # noqa: PLC0415

    init_logger()
    trainer = ConfigManager().parse_args(flags).build()
    train_step = trainer.train_step

    def timed_step(data_iterator: object) -> None:
        turns.recv()
        wall, cpu = time.perf_counter(), time.process_time()
        train_step(data_iterator)
        turns.send((time.perf_counter() - wall, time.process_time() - cpu))

    trainer.train_step = timed_step
    trainer.train()
    trainer.close()


if __name__ == "__main__":
    sys.exit(main())
