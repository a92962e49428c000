"""Draw the weight each shipped spec gives to a loss: the picture in the README.

python benchmarks/curves.py specs/curves.svg
"""

import sys

import matplotlib as mpl
import torch

import weighting as wt

mpl.use("svg")
import matplotlib.pyplot as plt

SHOWN = ("uniform", "linupper", "quadratic", "extremes", "prop1", "dro-kl", "focal")
# Okabe and Ito's colours, told apart by colour-blind readers; dashes help in print.
COLOURS = ("#000000", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#56B4E9")
DASHES = ("-", "-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))


def main() -> None:
    """Write the picture to the file named on the command line."""
    mpl.rcParams["svg.hashsalt"] = "weighting"  # the same bits at every run
    mpl.rcParams["svg.fonttype"] = "none"
    loss = torch.linspace(1, 5, 129)
    fig, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name, colour, dash in zip(SHOWN, COLOURS, DASHES, strict=True):
        weight = wt.simulate(wt.load(name), loss)
        ax.plot(loss, weight, label=name, color=colour, linestyle=dash, linewidth=1.8)
    ax.axhline(2, color="#888888", linewidth=0.8)
    ax.text(1.02, 2.05, "2/n", color="#666666")
    ax.set(
        xlabel="loss (nats per token), evenly spread over a batch of 129 sequences",
        ylabel="weight (mean one)",
        ylim=(0, 4),
        title="What each spec makes of a loss",
    )
    ax.legend(frameon=False, ncols=2)
    fig.savefig(sys.argv[1], metadata={"Date": None})


if __name__ == "__main__":
    main()
