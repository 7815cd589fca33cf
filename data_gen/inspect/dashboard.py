"""The picture of a label run's health (see :mod:`data_gen.inspect.health`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def draw(health: dict[str, Any], path: Path) -> None:
    """Write the dashboard of ``health`` to ``path`` (PNG)."""
    import matplotlib
    from matplotlib.figure import Figure

    # Names hold dollar signs; they are no formulas.
    matplotlib.rcParams["text.parse_math"] = False
    policies = health["policies"]
    rows = -(-(4 + len(policies)) // 3)
    figure = Figure(figsize=(15, 4.2 * rows), layout="constrained")
    axes = iter(figure.subplots(rows, 3).flat)
    _rates(next(axes), health)
    for name, values in policies.items():
        _histogram(next(axes), name, values["steps"])
    _first_errors(next(axes), policies)
    _noise(next(axes), policies)
    _summary(next(axes), health)
    for axis in axes:
        axis.axis("off")
    figure.suptitle(
        f"label health: {health['problems']} problems, {health['labels']} labels, "
        f"{health['rollouts']} rollouts"
    )
    figure.savefig(path, dpi=90)


def _rates(axis: Any, health: dict[str, Any]) -> None:
    groups = [(f"traces: {n}", s) for n, s in health["seeds"].items()]
    groups += [(f"rollouts: {n}", p) for n, p in health["policies"].items()]
    kinds = ("truncated", "unparsed", "duplicates")
    height = 0.8 / len(groups)
    for g, (label, values) in enumerate(groups):
        y = np.arange(len(kinds)) + (g - (len(groups) - 1) / 2) * height
        bars = axis.barh(y, [100 * values[k] for k in kinds], height, label=label)
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axis.set_yticks(range(len(kinds)), ["truncated", "no answer", "duplicates"])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(title="what went wrong", xlabel="% of solutions")
    axis.legend(fontsize=8)


def _histogram(axis: Any, name: str, steps: list[dict[str, Any]]) -> None:
    """Shares of k/n by step, stacked; the line is the mean."""
    if steps:
        x = [s["step"] for s in steps]
        shares = np.array([s["histogram"] for s in steps], dtype=float)
        shares /= shares.sum(axis=1, keepdims=True)
        bins = shares.shape[1]
        from matplotlib import colormaps
        from matplotlib.ticker import MaxNLocator

        colours = colormaps["RdYlGn"](np.linspace(0.05, 0.95, bins))
        bottom = np.zeros(len(x))
        for b in range(bins):
            label = f"{b / bins:.1f}-{(b + 1) / bins:.1f}"
            axis.bar(x, shares[:, b], 0.9, bottom=bottom, color=colours[b], label=label)
            bottom += shares[:, b]
        axis.plot(x, [s["mean"] for s in steps], "k.-", label="mean")
        axis.legend(
            fontsize=8, ncols=bins + 1, loc="upper center", bbox_to_anchor=(0.5, -0.11),
            handlelength=1, columnspacing=0.8,
        )  # fmt: skip
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for s in (steps[0], steps[-1]):
            axis.annotate(f"{s['prefixes']}", (s["step"], 1.01), ha="center", fontsize=8)
    axis.set(
        title=f"k/n under {name}, by step (first, last: prefixes)",
        ylabel="share of prefixes",
        ylim=(0, 1.08),
    )


def _first_errors(axis: Any, policies: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    width = 0.8 / len(policies)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for i, (name, p) in enumerate(policies.items()):
        steps = np.array([int(s) for s in p["first_error"]], dtype=float)
        label = f"{name} ({p['wrong_without_error_step']:.0%} of wrong traces have none)"
        offset = (i - (len(policies) - 1) / 2) * width
        axis.bar(steps + offset, list(p["first_error"].values()), width, label=label)
    axis.set(
        title="first error: first prefix without a right rollout",
        xlabel="step",
        ylabel="wrong traces",
    )
    axis.legend(fontsize=8)


def _noise(axis: Any, policies: dict[str, Any]) -> None:
    names = list(policies)
    x = np.arange(len(names))
    noise = [p["label_noise"] for p in policies.values()]
    limit = any(p["label_noise_is_limit"] for p in policies.values())
    spread = [p["label_spread"] for p in policies.values()]
    bars = [
        axis.bar(x - 0.2, noise, 0.4, label="expected noise" + (" (at most)" if limit else "")),
        axis.bar(x + 0.2, spread, 0.4, label="spread of k/n over prefixes"),
    ]
    for bar in bars:
        axis.bar_label(bar, fmt="%.2f", fontsize=8)
    axis.set_xticks(x, names)
    axis.set(title="label noise", ylabel="standard deviation of k/n")
    axis.margins(y=0.2)
    axis.legend(fontsize=8)


def _summary(axis: Any, health: dict[str, Any]) -> None:
    accuracy = health["base_accuracy"]
    sets = [("label", accuracy["label_problems"]), ("validation", accuracy["validation_problems"])]
    there = [(name, value) for name, value in sets if value is not None]
    bars = axis.bar([n for n, _ in there], [v for _, v in there], 0.5, color=["C0", "C2"])
    axis.bar_label(bars, fmt="%.3f")
    axis.set_ylim(0, min(1.0, 0.05 + 1.8 * max([v for _, v in there], default=0.5)))
    title = "base accuracy by problems"
    axis.set_title(title + (": CONTAMINATED" if accuracy["contaminated"] else ""))
    lines = [f"{health['tokens_per_label']:.1f} tokens per label"]
    if health["seconds_per_label"]:
        lines.append(f"{1000 * health['seconds_per_label']:.1f} ms per label")
    lines += [
        f"{p['unique_answers_per_problem']:.1f} answers per problem ({name})"
        for name, p in health["policies"].items()
    ]
    if accuracy["ci95"]:
        low, high = accuracy["ci95"]
        lines.append(f"difference {accuracy['difference']:+.3f} [{low:+.3f}, {high:+.3f}]")
    axis.text(0.03, 0.97, "\n".join(lines), transform=axis.transAxes, va="top", fontsize=9)
