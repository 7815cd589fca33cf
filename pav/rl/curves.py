"""The picture of a run: ``rl.png``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from pav.core.printable import one_line
from pav.rl.guards import Alarm, Metrics

# Panel -> (figure, its name in the legend).
PANELS: dict[str, list[tuple[str, str]]] = {
    "reward of a trace, by part": [
        ("train/outcome", "outcome"), ("train/dense", "dense (sum over steps)"),
    ],
    "KL from the start, a token": [("update/kl_k1", "k1"), ("update/kl_k3", "k3")],
    "entropy, nats a token": [("update/entropy", "")],
    "tokens per trace": [
        ("train/tokens_max", "longest"), ("train/tokens", "mean"), ("held_out/tokens", "held out"),
    ],
    "steps per trace": [("train/steps", "")],
    "gradient norm": [("update/gradient_norm", "")],
    "log p, engine against trainer": [
        ("mismatch/mean", "mean difference"), ("mismatch/beyond_2", "share of ratios beyond 2"),
    ],
    "shares of groups and traces": [
        ("train/dead_groups", "groups of one outcome"), ("train/alike", "groups of one text"),
        ("train/truncated", "truncated traces"),
    ],
    "shares of steps and tokens": [
        ("train/empty_steps", "empty steps"), ("train/repeated_steps", "repeated steps"),
        ("verifier/out_of_range", "states unlike the labels"), ("update/clipped", "clipped tokens"),
        ("update/value_explained", "variance the value explains"),
    ],
}  # fmt: skip
LOGARITHMIC = ("log p, engine against trainer",)
SHARES = ("shares of groups and traces", "shares of steps and tokens")
COLUMNS = 3


def draw(
    history: Sequence[Metrics], alarms: Sequence[Alarm], path: Path | IO[bytes], title: str = ""
) -> None:
    """Write the curves of a run to ``path`` (PNG).

    Args:
        history: metrics of every iteration, oldest first.
        alarms: what the guards said; each is a dotted line.
        path: of the picture.
        title: above it.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Names hold dollar signs; they are no formulas.
    matplotlib.rcParams["text.parse_math"] = False
    rows = -(-(len(PANELS) + 3) // COLUMNS)
    figure = Figure(figsize=(15, 3.3 * rows + 0.6))
    # A layout by hand: the engines for it take longer than all the drawing.
    figure.subplots_adjust(0.045, 0.045, 0.95, 0.925, wspace=0.17, hspace=0.25)
    axes = list(figure.subplots(rows, COLUMNS).flat)
    _held_out(axes[0], history)
    names = list(PANELS)
    _lines(axes[1], history, names[0])
    _dense(axes[2], history)
    for axis, name in zip(axes[3:], names[1:], strict=False):
        _lines(axis, history, name)
    for axis in axes[len(PANELS) + 3 :]:
        axis.axis("off")
    drawn = axes[: len(PANELS) + 3]
    last = max((row["iteration"] for row in history), default=1)
    samples = next((r["samples"] / r["iteration"] for r in history if r.get("samples")), None)
    for number, axis in enumerate(drawn):
        axis.set_xlim(0, max(1, last))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axis.grid(alpha=0.25)
        for alarm in alarms:
            axis.axvline(alarm.iteration, color="tab:red", ls=":", lw=1)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        if number >= len(drawn) - COLUMNS:
            axis.set_xlabel("iterations (red: a warning)" if alarms else "iterations")
        if number < COLUMNS and samples:
            _samples_axis(axis, samples)
    _seconds(drawn[-1], history)
    figure.suptitle(one_line(title), fontsize=11)
    figure.savefig(path, dpi=90, format="png")


def _samples_axis(axis: Any, samples: float) -> None:
    """The same axis in traces sampled, above the panel."""
    from matplotlib.ticker import MaxNLocator

    above = axis.secondary_xaxis("top", functions=(lambda x: x * samples, lambda x: x / samples))
    above.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    above.tick_params(labelsize=8)
    above.set_xlabel("traces sampled", fontsize=8)


def series(history: Sequence[Metrics], name: str) -> tuple[list[float], list[float]]:
    """Iterations that have a figure, and its values."""
    rows = [row for row in history if name in row]
    return [row["iteration"] for row in rows], [row[name] for row in rows]


def _held_out(axis: Any, history: Sequence[Metrics]) -> None:
    x, accuracy = series(history, "accuracy")
    low, high = (series(history, f"accuracy_{end}")[1] for end in ("low", "high"))
    axis.set_title("held-out accuracy (95% over problems)", fontsize=10)
    if not x:
        axis.text(0.5, 0.5, "no evaluation", ha="center", transform=axis.transAxes)
        return
    axis.fill_between(x, low, high, alpha=0.2, color="tab:blue", lw=0)
    axis.plot(x, accuracy, "o-", ms=3, color="tab:blue", label="sampled as in training")
    axis.plot(*series(history, "greedy"), "s--", ms=3, color="tab:orange", label="greedy")
    passed = list(dict.fromkeys(k for row in history for k in row if k.startswith("pass@")))
    for shade, name in enumerate(passed):
        colour = str(0.65 - 0.5 * shade / max(1, len(passed)))
        axis.plot(*series(history, name), ":", color=colour, label=name)
    axis.set_ylim(bottom=0)


def _dense(axis: Any, history: Sequence[Metrics]) -> None:
    axis.set_title("dense reward of a step: mean and spread", fontsize=10)
    x, mean = series(history, "train/dense_per_step")
    spread = series(history, "train/dense_spread")[1]
    low = [m - s for m, s in zip(mean, spread, strict=True)]
    high = [m + s for m, s in zip(mean, spread, strict=True)]
    axis.fill_between(x, low, high, alpha=0.2, color="tab:green", lw=0, label="one deviation")
    axis.plot(x, mean, color="tab:green", label="mean")
    axis.axhline(0, color="0.5", lw=0.8)


def _lines(axis: Any, history: Sequence[Metrics], panel: str) -> None:
    axis.set_title(panel, fontsize=10)
    for name, label in PANELS[panel]:
        x, values = series(history, name)
        # Figures that only some runs have, and are nought in this one, would hide those that count.
        optional = name in ("update/clipped", "verifier/out_of_range") and not any(values)
        if x and not optional:
            style = "o--" if name.startswith("held_out/") else "-"
            axis.plot(x, values, style, ms=3, label=label or None)
    if panel in LOGARITHMIC and any(v > 0 for n, _ in PANELS[panel] for v in series(history, n)[1]):
        _log_scale(axis, [v for n, _ in PANELS[panel] for v in series(history, n)[1] if v > 0])
    if panel in SHARES:
        axis.set_ylim(-0.02, 1.02)


def _log_scale(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis of whole decades around what it shows."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_yscale("log")
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    axis.set_ylim(10.0 ** (low - 0.1), 10.0 ** (max(high, low + 1) + 0.1))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _seconds(axis: Any, history: Sequence[Metrics]) -> None:
    """Time of an iteration by part, stacked; evaluations stand out as spikes."""
    axis.set_title("seconds of an iteration, by part", fontsize=10)
    rows = [row for row in history if "seconds/all" in row and row["iteration"]]
    names = dict.fromkeys(k for row in rows for k in row if k.startswith("seconds/"))
    parts = [name for name in names if name != "seconds/all"]
    if not rows or not parts:
        return
    values = [[row.get(part) or 0.0 for row in rows] for part in parts]
    labels = [part.removeprefix("seconds/") for part in parts]
    axis.stackplot([row["iteration"] for row in rows], values, labels=labels, alpha=0.8, step="mid")
    _, tokens = series(rows, "train/tokens")
    speed = axis.twinx()
    per = [r["samples"] / r["iteration"] for r in rows]
    sampled = [
        n * t / row["seconds/sample"]
        for n, t, row in zip(per, tokens, rows, strict=True)
        if row.get("seconds/sample")
    ]
    if len(sampled) == len(rows):
        speed.plot([row["iteration"] for row in rows], sampled, color="k", lw=1)
    speed.set_ylim(bottom=0)
    speed.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="upper left")
    speed.set_ylabel("tokens/s sampled (black)", fontsize=8)
