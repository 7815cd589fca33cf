"""Accuracy against policy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.ticker import FuncFormatter

from search.points import Point
from search.stats import Interval

matplotlib.use("Agg")


def plot_accuracy(
    points: Sequence[Point], oracle: Sequence[tuple[float, Interval]], path: Path, title: str
) -> None:
    """Write a PNG: accuracy with 95% intervals over mean policy tokens, one line per method.

    Args:
        points: all methods at all N.
        oracle: (policy tokens, pass@N) of independent samples.
        path: file to write.
        title: above the plot.
    """
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    methods = list(dict.fromkeys(p.method for p in points))
    colours = plt.get_cmap("tab10").colors
    for i, method in enumerate(methods):
        own = sorted((p for p in points if p.method == method), key=lambda p: p.policy_tokens)
        x = [p.policy_tokens for p in own]
        intervals = [p.accuracy for p in own]
        y = [a.mean for a in intervals]
        errors = [[a.mean - a.low for a in intervals], [a.high - a.mean for a in intervals]]
        is_beam = own[0].is_beam
        axes.errorbar(
            x,
            y,
            yerr=errors,
            label=method,
            color=colours[i % len(colours)],
            capsize=2,
            lw=1.6,
            marker="o" if is_beam else "s",
            ms=4,
            ls="-" if is_beam else "--",
            elinewidth=0.8,
        )
    if oracle:
        axes.plot(
            [t for t, _ in oracle],
            [a.mean for _, a in oracle],
            color="0.6",
            ls=":",
            label="oracle pass@N (independent samples)",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))
    axes.set_xlabel("policy tokens per problem")
    axes.set_ylabel("accuracy (95% interval over problems)")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left")
    if title:
        axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
