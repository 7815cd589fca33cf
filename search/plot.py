"""Plots of a comparison: accuracy against N, tokens and FLOPs, and what over-optimisation shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pav.stats import Interval, bootstrap
from search.points import Point, oracle_points

matplotlib.use("Agg")

# Methods that pick from the same candidates often lie on each other.
MARKERS = "os^Dv*PX"
LABELS = {
    "n": "N (width of a beam, number of solutions)",
    "policy_tokens": "policy tokens per problem",
    "flops": "forward FLOPs per problem, policy and verifier",
}


def plot_accuracy(
    points: Sequence[Point], axis: Literal["n", "policy_tokens", "flops"], path: Path, title: str
) -> None:
    """Write a PNG: accuracy with 95% intervals over ``axis``, one line per method.

    The dotted line is pass@N of independent samples of the base policy, which pay no verifier.

    Args:
        points: all methods at all N; those of unknown cost are left out.
        axis: what the methods spend.
        path: file to write.
        title: above the plot.
    """
    from matplotlib import pyplot as plt

    shown = [p for p in points if not math.isnan(_spent(p, axis))]
    figure, axes = plt.subplots(figsize=(8.5, 6.2), layout="constrained")
    colours = plt.get_cmap("tab10").colors
    methods = list(dict.fromkeys(p.method for p in points))
    for i, method in enumerate(methods):
        own = sorted((p for p in shown if p.method == method), key=lambda p: _spent(p, axis))
        if own:
            # Beside each other where methods spend exactly the same.
            shift = 1.02 ** (i - len(methods) / 2) if axis == "n" else 1.0
            x = [_spent(p, axis) * shift for p in own]
            solid = own[0].is_beam
            _line(
                axes, x, [p.accuracy for p in own], method, colours[i % 10], solid, MARKERS[i % 8]
            )
    oracle = [p for p in oracle_points(points) if not math.isnan(p.policy_flops)]
    if axis != "flops":
        oracle = oracle_points(points)
    if oracle:
        axes.plot(
            [p.policy_flops if axis == "flops" else _spent(p, axis) for p in oracle],
            [p.oracle_PS.mean() for p in oracle],
            color="0.5",
            ls=":",
            label="oracle pass@N (independent samples)",
        )
    if not shown:
        axes.text(0.5, 0.5, "costs unknown", ha="center", transform=axes.transAxes)
    _finish(axes, LABELS[axis], [_spent(p, axis) for p in shown])
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


def plot_optimisation(points: Sequence[Point], path: Path, title: str) -> None:
    """Write a PNG with a panel per method: accuracy, oracle in the final set, verifier's belief.

    Where the oracle rises and accuracy does not, right answers are found and not picked. Where
    belief rises and accuracy does not, the verifier is gamed.
    """
    from matplotlib import pyplot as plt

    methods = list(dict.fromkeys(p.method for p in points))
    columns = min(4, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(1.2 + 3.0 * columns, 1.3 + 2.7 * rows),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    curves: list[tuple[str, str, Any]] = [
        ("a right answer in the final set", "tab:green", lambda p: p.oracle_PS),
        ("accuracy of the pick", "tab:blue", lambda p: p.correct_PS),
        ("verifier's mean score of the pick", "tab:red", lambda p: p.believed_PS),
    ]
    for axes, method in zip(grid.flat, methods, strict=False):
        own = sorted((p for p in points if p.method == method), key=lambda p: p.n)
        for label, colour, values in curves:
            known = [p for p in own if not math.isnan(values(p).mean())]
            intervals = [bootstrap(values(p)) for p in known]
            _line(axes, [p.n for p in known], intervals, label, colour)
        _finish(axes, "N", [p.n for p in own])
        axes.set_title(method, fontsize=9)
    for axes in list(grid.flat)[len(methods) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of problems")
    figure.suptitle(title, fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _spent(point: Point, axis: str) -> float:
    return float(getattr(point, axis))


def _line(
    axes: Any,
    x: Sequence[float],
    y: Sequence[Interval],
    label: str,
    colour: Any,
    solid: bool = True,
    marker: str = "o",
) -> None:
    errors = [[a.mean - a.low for a in y], [a.high - a.mean for a in y]]
    axes.errorbar(
        x,
        [a.mean for a in y],
        yerr=errors,
        label=label,
        color=colour,
        capsize=2,
        lw=1.5,
        marker=marker,
        ms=5,
        alpha=0.85,
        ls="-" if solid else "--",
        elinewidth=0.8,
    )


def _finish(axes: Any, label: str, x: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    _format(axes)
    if x and max(x) < 2 * min(x):
        # So that a power of two is among the ticks.
        axes.set_xlim(min(x) / 2, max(x) * 2)
    axes.set_xlabel(label)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)


def _format(axes: Any) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}" if value >= 1 else f"{value:.2g}"
