"""Draws architecture.svg: the flow of data, with the record on every arrow."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOM, DISK, ENGINE = "#dbe7f6", "#f6ecd2", "#dff0dc"
# name: (x, y, width, height, text, colour)
BOXES = {
    "task": (-0.2, 6.2, 2.9, 1.0, "task\npav/tasks, pav/grading", ROOM),
    "policy": (-0.2, 3.6, 2.9, 1.0, "policy, step rule\npav/policy", ROOM),
    "engine": (4.9, 3.6, 2.7, 1.0, "vLLM engine\npav/engine", ENGINE),
    "rollouts": (4.9, 6.2, 2.7, 1.0, "data_gen.rollouts\ndata_gen/", ROOM),
    "labels": (10.3, 6.2, 2.7, 1.0, "label run\njournal, Parquet", DISK),
    "train": (10.3, 3.6, 2.7, 1.0, "pav.train\npav/train", ROOM),
    "checkpoint": (10.3, 1.0, 2.7, 1.0, "checkpoint\npav.ckpt, pav.export/", DISK),
    "search": (4.9, 1.0, 2.7, 1.0, "search.beam, ...\nsearch/methods", ROOM),
    "records": (4.9, -1.6, 2.7, 1.0, "run directory\nbeam.jsonl", DISK),
    "serve": (-0.2, 1.0, 2.9, 1.0, "search.serve\nsearch/serve", ROOM),
    "compare": (10.3, -1.6, 2.7, 1.0, "search.compare\nsearch/compare", ROOM),
    "evaluate": (15.3, 3.6, 2.7, 1.0, "pav.evaluate\npav/evaluate", ROOM),
}  # fmt: skip
# from, side, to, side, record, shift of the text
ARROWS = [
    ("task", "r", "rollouts", "l", "Problem\nGrade", (0, 0.32)),
    ("task", "b", "policy", "t", "Problem", (0.75, 0)),
    ("policy", "r", "engine", "l", "prompt ids,\nSampler", (0, 0.36)),
    ("rollouts", "b-", "engine", "t-", "ids of a prefix", (-1.1, 0)),
    ("engine", "t+", "rollouts", "b+", "Sampled", (0.62, 0)),
    ("rollouts", "r", "labels", "l", "Trace,\nCompletion", (0, 0.36)),
    ("labels", "b", "train", "t", "Labels: k of n\nper prefix", (1.05, 0)),
    ("labels", "r", "evaluate", "t", "Labels", (0.2, 1.55)),
    ("train", "b", "checkpoint", "t", "VerifierMeta,\nrows, calibrators", (1.15, 0)),
    ("checkpoint", "r", "evaluate", "b", "Verifier", (0.2, -1.28)),
    ("checkpoint", "l", "search", "r", "Verifier:\nscore rows", (0, 0.36)),
    ("search", "t-", "engine", "b-", "ids of a step", (-1.0, 0)),
    ("engine", "b+", "search", "t+", "Sampled, Read", (0.95, 0)),
    ("search", "b", "records", "t", "Record: Candidate,\nNode, cost", (1.2, 0)),
    ("records", "r", "compare", "l", "Record", (0, 0.24)),
    ("search", "l", "serve", "r", "answer,\nvalues, cost", (0, 0.36)),
    ("records", "l", "rollouts", "l", "Candidate: a second round of labels", (-3.1, -3.35)),
]


def at(name: str, side: str) -> tuple[float, float]:
    """A point on a box's side; + and - are right and left of its middle."""
    x, y, w, h, *_ = BOXES[name]
    shift = {"+": 0.6, "-": -0.6}.get(side[-1], 0.0)
    return {
        "l": (x, y + h / 2),
        "r": (x + w, y + h / 2),
        "t": (x + w / 2 + shift, y + h),
        "b": (x + w / 2 + shift, y),
    }[side[0]]


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: str) -> None:
    """One arrow."""
    style = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=13, lw=1.3, color="#44546a",
        connectionstyle=bend, shrinkA=0, shrinkB=1,
    )  # fmt: skip
    axes.add_patch(style)


def main() -> None:
    """Write the picture beside this file."""
    # The same picture is the same file.
    plt.rcParams.update({"svg.hashsalt": "architecture", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(14, 7.6))
    for x, y, w, h, text, colour in BOXES.values():
        axes.add_patch(
            FancyBboxPatch((x, y), w, h, "round,pad=0,rounding_size=.12", fc=colour, ec="#44546a")
        )
        title, _, where = text.partition("\n")
        axes.text(x + w / 2, y + h * 0.64, title, ha="center", va="center", fontsize=10.5,
                  weight="bold")  # fmt: skip
        axes.text(x + w / 2, y + h * 0.3, where, ha="center", va="center", fontsize=9)
    for a, side_a, b, side_b, record, (dx, dy) in ARROWS:
        start, end = at(a, side_a), at(b, side_b)
        if (a, b) == ("records", "rollouts"):
            # Around everything: out to the left, up, and back in.
            axes.plot([start[0], -1.0, -1.0, 4.3], [start[1], start[1], 5.6, 5.6], lw=1.3,
                      color="#44546a", ls="--")  # fmt: skip
            arrow(axes, (4.3, 5.6), (4.9, 6.4), "arc3")
            axes.text(1.75, -0.85, record, ha="center", va="center", fontsize=9, style="italic")
            continue
        bend = "angle,angleA=0,angleB=90" if b == "evaluate" and a == "labels" else "arc3"
        if (a, b) == ("checkpoint", "evaluate"):
            bend = "angle,angleA=0,angleB=90"
        arrow(axes, start, end, bend)
        middle = ((start[0] + end[0]) / 2 + dx, (start[1] + end[1]) / 2 + dy)
        axes.text(*middle, record, ha="center", va="center", fontsize=9, style="italic",
                  color="#1f3864")  # fmt: skip
    for i, (colour, what) in enumerate([(ROOM, "code"), (ENGINE, "the one adapter to vLLM"),
                                        (DISK, "on disk")]):  # fmt: skip
        axes.add_patch(FancyBboxPatch((14.6, -0.75 - 0.5 * i), 0.35, 0.25, "round,pad=0",
                                      fc=colour, ec="#44546a"))  # fmt: skip
        axes.text(15.15, -0.63 - 0.5 * i, what, va="center", fontsize=9)
    axes.set(xlim=(-1.3, 18.3), ylim=(-1.9, 7.5), aspect="equal")
    axes.axis("off")
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
