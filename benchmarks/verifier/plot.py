"""The picture of the study: every row with and without surprise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

COLOURS = {"plain": "tab:orange", "surprise": "tab:blue"}
COLUMNS = {
    "no slip, equal depth q/base": "AUC of 'no slip so far',\nprefixes of equal depth (q/base)",
    "AUC q/prover": "AUC of Q >= 0.5 (q/prover)",
    "A corr q/prover": "correlation of the advantage\n(q/prover)",
}


def draw(table: Sequence[Mapping[str, Any]]) -> Figure:
    """A line per row, in the order of ``table``; bars are 95% intervals."""
    lines = [line for line in table if line["judged on"] == "validation"]
    names = list(dict.fromkeys((line["group"], line["row"]) for line in lines))
    place = {name: -i for i, name in enumerate(names)}
    figure = Figure(figsize=(12, 0.19 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(COLUMNS), sharey=True)
    for axis, (column, title) in zip(axes, COLUMNS.items(), strict=True):
        for mode, colour in COLOURS.items():
            own = [line for line in lines if line["calibrator"] == mode]
            y = [place[line["group"], line["row"]] for line in own]
            x = [line[column] for line in own]
            error = [
                [line[column] - line[f"{column} low"] for line in own],
                [line[f"{column} high"] - line[column] for line in own],
            ]
            axis.errorbar(
                x, y, xerr=error, fmt="o", markersize=3.5, linewidth=1, color=colour, label=mode
            )
        default = next(line for line in lines if line["calibrator"] == "surprise")
        axis.axvline(default[column], color="0.6", linewidth=0.8, zorder=0)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="y", color="0.92", linewidth=0.6)
    axes[0].set_yticks(list(place.values()), [f"{g}: {n}" for g, n in names], fontsize=7)
    axes[0].set_ylim(min(place.values()) - 0.8, 0.8)
    axes[0].legend(fontsize=8, title="calibrator", title_fontsize=8, loc="lower center")
    return figure
