"""Does what is claimed of a GPU hold?  Ten minutes on one; exits 1 where a claim fails.

    python benchmarks/gpu_check.py [--quick]

It checks and prints, in this order:

- the loss path at the sizes of Llama 3 8B in bfloat16, beside torchtitan, Liger, CCE and torch,
  each that is installed: gradients against float64, time, peak memory;
- that a step waits for nothing, and that what should be compiled is;
- steps captured in a CUDA graph while schedule, state, and the domains of rows move;
- collectives of NCCL over one device.

It has been run without a GPU alone, as `--quick` runs it: tiny, with gloo for NCCL, and nothing to
capture.  That shows that the script works and the gradients are right, and says nothing of speed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from loss_path import ON_CUDA, QUICK, Row, compared, heading, measured, table
from loss_ways import STOCK, Batch, Setting, batch_of, built, ours, variants

import weighting as wt
from titan_integration.collectives import OverRanks

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
CLAIMS = (
    ("uniform late", "time", 1.0),
    ("linupper late", "time", 1.0),
    ("mile late", "time", 1.05),
    ("rho-1 recompute", "time", 1.05),
    ("uniform late", "memory", 1.0),
    ("linupper late", "memory", 1.0),
)
"""Rows of the loss path, and what they take of torchtitan's time and memory at most."""
Verdict = tuple[str, bool | None]
"""A claim, and whether it holds; None where that cannot be seen here."""


def main(arguments: list[str] | None = None) -> int:
    """Check all claims, print a line for each, and return 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny: does it run at all?")
    args = parser.parse_args(arguments)
    there = torch.cuda.is_available()
    if not there and not args.quick:
        parser.error("there is no GPU here; --quick runs what a CPU can")
    setting = QUICK._replace(device="cuda" if there else "cpu") if args.quick else ON_CUDA
    batch = batch_of(setting)
    print("\n".join(heading(setting, int(batch.count))), flush=True)
    found = list[Verdict]()
    for check in (loss_path, waiting, graphs, collectives):
        for verdict in check(setting, batch):
            found.append(verdict)
            print(_line(verdict), flush=True)
    failed = sum(holds is False for _, holds in found)
    unseen = sum(holds is None for _, holds in found)
    print(f"\n{len(found)} claims: {failed} fail, {unseen} cannot be seen here")
    return 1 if failed else 0


def _line(verdict: Verdict) -> str:
    text, holds = verdict
    return f"- {'not seen' if holds is None else 'holds' if holds else 'FAILS'}: {text}"


def loss_path(setting: Setting, batch: Batch) -> Iterator[Verdict]:
    """Measure every way; ours are right, and no slower or larger than torchtitan's."""
    rows = measured(setting, batch, variants(batch), memory=batch.hidden.is_cuda)
    print("\n".join(["", *table(rows), ""]))
    named = {row.variant.name: row for row in rows}
    mine = [row for row in rows if row.variant.name.rpartition(" ")[0] in _SPECS]
    wrong = [row.variant.name for row in mine if "WRONG" in row.reason or _broke(row)]
    yield f"gradients of ours are those of float64{_but(wrong)}", not wrong
    for name, what, most in CLAIMS:
        value = compared(named[name], named[STOCK], what, setting)
        text = f"{name} takes {value:.2f} of the {what} of {STOCK}, at most {most:g}"
        yield text, value <= most if batch.hidden.is_cuda else None


_SPECS = ("uniform", "linupper", "mile", "linupper-x-mile", "rho-1", "given")


def _broke(row: Row) -> bool:
    """Tell whether a way failed that was not refused."""
    return bool(row.reason) and "weighs every token late" not in row.reason


def _but(names: list[str]) -> str:
    return f", but for {', '.join(names)}" if names else ""


def waiting(setting: Setting, batch: Batch) -> Iterator[Verdict]:
    """Take a step during which the host may wait for nothing, and nothing may fall back."""
    del setting
    cuda = batch.hidden.is_cuda
    for spec in ("linupper", "mile", "rho-1"):
        leaves = [x.detach().requires_grad_() for x in (batch.hidden, batch.weight)]
        problem = ""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*runs without being compiled.*")
            try:
                ours(batch, *leaves, spec=spec, memory="auto")[0].backward()  # compiles
                if cuda:
                    torch.cuda.set_sync_debug_mode("error")
                ours(batch, *leaves, spec=spec, memory="auto")[0].backward()
            except (RuntimeError, UserWarning) as error:
                problem = f": {str(error).partition(chr(10))[0]}"
            finally:
                if cuda:
                    torch.cuda.set_sync_debug_mode("default")
        holds = not problem if cuda or problem else None
        yield f"{spec} is compiled, and no step of it waits for the device{problem}", holds


def graphs(setting: Setting, batch: Batch) -> Iterator[Verdict]:
    """Compare captured steps with eager ones in processes of their own."""
    small = ["--tokens=256", "--width=16", "--vocabulary=64", "--steps=10"]
    for flags in ([], ["--by-domain"]):
        command = [sys.executable, str(HERE / "cuda_graphs.py"), *flags]
        command += small if setting == QUICK._replace(device=setting.device) else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        print(done.stdout + done.stderr[-2000:])
        holds = done.returncode == 0
        what = "rows of one domain" if flags else "rows of several domains"
        text = f"captured steps are the eager ones, {what}"
        yield text, holds if batch.hidden.is_cuda or not holds else None


def collectives(setting: Setting, batch: Batch) -> Iterator[Verdict]:
    """Weigh over a process group of this device alone: the weights are those without one."""
    cuda = batch.hidden.is_cuda
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
        try:
            ranks, device = OverRanks(dist.group.WORLD), batch.hidden.device
            loss = torch.rand(setting.sequences, 64, device=device) * 4
            signals = wt.Signals(loss=loss, entropy=loss, ref_loss=loss.flip(0))
            for spec in ("linupper", "mile", "rho-1"):
                alone = built(spec, device)(signals).token
                fn = wt.build(wt.load(spec), collectives=ranks).to(device)
                apart = (fn(signals).token - alone).abs().max().item()
                text = f"{spec} over {dist.get_backend()} differs by {apart:.1e}, at most 1e-5"
                holds = apart <= 1e-5  # noqa: PLR2004 - said in the text
                yield text, holds if cuda or not holds else None
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
