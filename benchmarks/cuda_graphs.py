"""Does a captured step weigh as an eager one?  50 steps with and without a CUDA graph.

    python benchmarks/cuda_graphs.py [--tokens 8192 --width 1024 --vocabulary 32768 --steps 50]
        [--by-domain]

The step is all of the weighted loss: hidden states and output layer in, weights, statistics, state
and gradients out.  Every step has other data and another schedule value, and a factor remembers, so
that anything frozen at capture shows: a step counter, a schedule, a state, a data-dependent shape.
With `--by-domain` each row is of one domain, another in each step, and domains alone are weighed:
which gradient of the output layer a row adds to is then known on the device only.
Without a GPU there is nothing to capture; then the same steps are run twice, which says so.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

import weighting as wt

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SPEC = """
version: 1
name: moving
factors:
  domain: mean(domain) -> exponentiated(step_size=0.5, smoothing=1e-2)
  instance: normalize -> linupper(alpha=1) -> temperature(linear(4, 0.4, over=40)) -> clamp(2/n)
  token: entropy(gamma=1) -> token_scale
"""
BY_DOMAIN = """
version: 1
name: domains
pipeline: mean(domain) -> exponentiated(step_size=linear(0.1, 1, over=40), smoothing=1e-2)
"""
DOMAINS = ("a", "b", "c")
SEQUENCES = 8
ALIKE = 1e-3
"""The same kernels on the same data; only additions into one place may come in another order."""


class Run(NamedTuple):
    """Tensors that stay where they are, and what makes a step of them."""

    fn: wt.Weighting
    step: Tensor
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    domain_ids: Tensor
    loss: Tensor
    token: Tensor

    def call(self) -> None:
        """Take a step: loss, weights and gradients into the tensors that are there."""
        loss, out = wt.linear_weighted_cross_entropy(
            self.hidden,
            self.weight,
            self.labels,
            self.fn,
            step=self.step,
            domain_ids=self.domain_ids,
        )
        self.hidden.grad = self.weight.grad = None
        loss.backward()
        self.loss.copy_(loss.detach())
        self.token.copy_(out.token)


def main() -> None:
    """Run both and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in {"tokens": 8192, "width": 1024, "vocabulary": 32768, "steps": 50}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--by-domain", action="store_true", help="rows of one domain each")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU: nothing to capture"
    print(f"torch {torch.__version__}, {name}, {dtype}, {vars(args)}")
    eager, captured = (new_run(args, device, dtype) for _ in range(2))
    steps = {"eager": eager.call, "graph": capture(captured, args)}
    largest, times = 0.0, {"eager": [], "graph": []}
    seen = set()
    for step in range(1, args.steps + 1):
        for (label, call), run in zip(steps.items(), (eager, captured), strict=True):
            fill(run, step, args)
            times[label].append(timed(call, device))
        difference = [
            (a.float() - b.float()).norm() / a.float().norm()
            for a, b in [
                (eager.loss, captured.loss),
                (eager.token, captured.token),
                (eager.hidden.grad, captured.hidden.grad),
                (eager.weight.grad, captured.weight.grad),
                *zip(eager.fn.buffers(), captured.fn.buffers(), strict=True),
            ]
        ]
        largest = max(largest, *(float(x) for x in difference))
        seen.add(round(float(captured.token.max()), 4))
    medians = {label: sorted(taken)[len(taken) // 2] for label, taken in times.items()}
    print(f"largest relative difference over {args.steps} steps: {largest:.1e}")
    print(f"largest weights seen: {len(seen)} different ones, so schedule and state did move")
    print(f"median step: graph / eager = {medians['graph'] / medians['eager']:.3f}")
    if largest > ALIKE or len(seen) < args.steps // 2:
        msg = "the captured steps are not the eager ones"
        raise SystemExit(msg)


def new_run(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Run:
    """Return a run with zeros for data."""
    shape = (SEQUENCES, args.tokens // SEQUENCES)
    torch.manual_seed(0)
    hidden = torch.zeros(*shape, args.width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(args.vocabulary, args.width, device=device, dtype=dtype) * 0.02
    labels = torch.zeros(shape, device=device, dtype=torch.int64)
    domain_ids = labels[:, :1] if args.by_domain else labels
    return Run(
        wt.build(wt.loads(BY_DOMAIN if args.by_domain else SPEC), domains=DOMAINS).to(device),
        torch.zeros((), device=device, dtype=torch.int64),
        hidden,
        weight.requires_grad_(),
        labels,
        domain_ids.clone(),
        torch.zeros((), device=device),
        torch.zeros(shape, device=device),
    )


def fill(run: Run, step: int, args: argparse.Namespace) -> None:
    """Put the data of a step where a graph reads it."""
    g = torch.Generator().manual_seed(step)
    shape = run.labels.shape
    run.step.fill_(step)
    run.labels.copy_(torch.randint(0, args.vocabulary, shape, generator=g))
    run.labels[0, : shape[1] // 4] = -100
    run.domain_ids.copy_(torch.randint(0, len(DOMAINS), run.domain_ids.shape, generator=g))
    with torch.no_grad():
        run.hidden.copy_(torch.randn(run.hidden.shape, generator=g))


def capture(run: Run, args: argparse.Namespace) -> Callable[[], None]:
    """Return what replays a captured step; the step itself where nothing can be captured."""
    if run.hidden.device.type != "cuda":
        return run.call
    before = {name: x.clone() for name, x in run.fn.state_dict().items()}
    fill(run, 1, args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and libraries set up before capture
        for _ in range(3):
            run.call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.call()
    run.fn.load_state_dict(before)
    return graph.replay


def timed(call: Callable[[], None], device: torch.device) -> float:
    """Return the seconds a step takes."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
