"""Plots of a comparison: accuracy against N, tokens and FLOPs, and what over-optimisation shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pav.core.statistics import Interval, bootstrap
from search.compare.results import MethodResult, oracle_results

matplotlib.use("Agg")
# Names hold dollar signs; they are no formulas.
matplotlib.rcParams["text.parse_math"] = False

MARKERS = "os^Dv*PX"
STYLES: tuple[Any, ...] = ("--", (0, (6, 2, 1, 2)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
LABELS = {
    "n": "N (width of a beam, number of solutions)",
    "policy_tokens": "policy tokens per problem",
    "flops": "forward FLOPs per problem, policy and verifier",
}


def plot_accuracy(
    results: Sequence[MethodResult],
    axis: Literal["n", "policy_tokens", "flops"],
    path: Path,
    title: str,
) -> None:
    """Write a PNG: accuracy with 95% intervals over ``axis``, one line per method.

    The grey line is pass@N of independent samples of the base policy, which pay no verifier. Over
    what is spent best-of-N is also shown at the costs of every beam, whatever N that takes.

    Args:
        results: all methods at all N; those of unknown cost are left out.
        axis: what the methods spend.
        path: file to write.
        title: above the plot.
    """
    from matplotlib import pyplot as plt

    # A count that matches what a beam spent has no place over N.
    kept = [p for p in results if axis != "n" or not p.matching]
    shown = [p for p in kept if not math.isnan(_spent(p, axis))]
    figure, axes = plt.subplots(figsize=(8.5, 6.2), layout="constrained")
    colours = plt.get_cmap("tab10").colors
    methods = list(dict.fromkeys(p.method for p in results))
    samplers = [m for m in methods if not any(p.is_beam for p in results if p.method == m)]
    for i, method in enumerate(methods):
        own = sorted((p for p in shown if p.method == method), key=lambda p: _spent(p, axis))
        if not own:
            continue
        # Methods that pick from the same candidates often lie on each other: the ones drawn first
        # are wider than those that may cover them.
        later = 0 if method not in samplers else len(samplers) - 1 - samplers.index(method)
        style = STYLES[samplers.index(method) % len(STYLES)] if method in samplers else "-"
        look = {"color": colours[i % 10], "marker": MARKERS[i % 8], "ls": style, "zorder": 3 + i,
                "lw": 1.5 + 1.3 * min(later, 3), "ms": 5 + 2 * min(later, 3),
                "capsize": 2 + 1.5 * min(later, 3)}  # fmt: skip
        x = [_spent(p, axis) for p in own]
        _line(axes, x, [p.accuracy for p in own], method, look)
    oracle = [p for p in oracle_results(kept) if axis != "flops" or not math.isnan(p.policy_flops)]
    if oracle:
        axes.plot(
            [p.policy_flops if axis == "flops" else _spent(p, axis) for p in oracle],
            [p.oracle_PS.mean() for p in oracle],
            color="0.5",
            ls=":",
            label="a right one among N independent samples (oracle, pass@N)",
        )
    if not shown:
        axes.text(0.5, 0.5, "costs unknown", ha="center", transform=axes.transAxes)
    also = " (best-of-N also at what every beam spends)" if any(p.matching for p in shown) else ""
    _finish(axes, LABELS[axis] + also, [_spent(p, axis) for p in shown])
    if axis == "flops":
        axes.set_xscale("log", base=10)
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        _format(axes)
    axes.set_ylabel("accuracy (95% interval over problems)")
    if title:
        axes.set_title(title, fontsize=10)
    if shown or oracle:
        figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_optimisation(results: Sequence[MethodResult], path: Path, title: str) -> None:
    """Write a PNG with two panels per method, over N: shares of problems, and the verifier's score.

    Where the share with a right answer in the final set rises and accuracy does not, right answers
    are found and not picked. Where the score rises and accuracy does not, the verifier is gamed.
    """
    from matplotlib import pyplot as plt

    asked = [p for p in results if not p.matching]
    methods = list(dict.fromkeys(p.method for p in asked))
    columns = min(4, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure, grid = plt.subplots(
        2 * rows,
        columns,
        figsize=(1.2 + 3.0 * columns, 1.3 + 4.2 * rows),
        layout="constrained",
        sharey="row",
        squeeze=False,
        height_ratios=[3, 2] * rows,
    )
    shares: list[tuple[str, str, Any]] = [
        ("a right answer in the final set", "tab:green", lambda p: p.oracle_PS),
        ("accuracy of the pick", "tab:blue", lambda p: p.correct_PS),
    ]
    score: tuple[str, str, Any] = (
        "verifier's mean score of the pick", "tab:red", lambda p: p.believed_PS
    )  # fmt: skip
    for i, method in enumerate(methods):
        above, below = grid[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        own = sorted((p for p in asked if p.method == method), key=lambda p: p.n)
        for axes, curves in ((above, shares), (below, [score])):
            for label, colour, values in curves:
                known = [p for p in own if not math.isnan(values(p).mean())]
                intervals = [bootstrap(values(p)) for p in known]
                look = {"color": colour, "marker": "o", "ls": "-", "lw": 1.5, "ms": 5, "capsize": 2}
                if known:
                    _line(axes, [p.n for p in known], intervals, label, look)
            _finish(axes, "N", [p.n for p in own])
        above.set_title(method, fontsize=9)
        if math.isnan(own[0].believed_PS.mean()):
            below.text(0.5, 0.5, "no verifier", ha="center", transform=below.transAxes)
            below.set_axis_off()
    for i in range(len(methods), rows * columns):
        for axes in grid[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]:
            axes.set_visible(False)
    for above, below in zip(grid[::2, 0], grid[1::2, 0], strict=True):
        above.set_ylabel("share of problems")
        below.set_ylabel("score, 0 to 1")
    figure.suptitle(title, fontsize=10)
    entries = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _spent(point: MethodResult, axis: str) -> float:
    return float(getattr(point, axis))


def _line(
    axes: Any, x: Sequence[float], y: Sequence[Interval], label: str, look: dict[str, Any]
) -> None:
    errors = [[a.mean - a.low for a in y], [a.high - a.mean for a in y]]
    axes.errorbar(
        x, [a.mean for a in y], yerr=errors, label=label, alpha=0.85, elinewidth=0.8, **look
    )


def _finish(axes: Any, label: str, x: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    _format(axes)
    if x and max(x) < 2 * min(x):
        # So that a power of two is among the ticks.
        axes.set_xlim(min(x) / 2, max(x) * 2)
    axes.set_xlabel(label)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)


def _format(axes: Any) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}" if value >= 1 else f"{value:.2g}"
