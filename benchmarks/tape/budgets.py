"""Searches at equal budgets on the calculator tape, from three finished comparisons.

Run first (each resumes; on two cores side by side with OMP_NUM_THREADS=1)::

    search.compare --config configs/tape/main/budgets.yaml
    search.compare --config configs/tape/main/methods.yaml
    search.compare --config configs/tape/main/remedies.yaml
    python -m benchmarks.tape.budgets

``tape_budgets``: beam search against best-of-N and votes at equal policy tokens, at equal total
FLOPs and over N, at budgets of up to 64 traces. ``tape_methods``: every search beside beam search,
paired; ``tape_remedies``: the same on validation problems, three seeds, and with draws by count.
Each as ``benchmarks/results/<name>.{json,csv,png}``; over FLOPs and N as
``tape_budgets_flops.png`` and ``tape_budgets_n.png``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tape.main import (
    BEAM,
    RESULTS,
    accuracies,
    doublings,
    efficiency_ratios,
    read_csv,
    read_json,
    row,
    write_result,
)
from pav.cli import run
from search.records import read
from search.stats import bootstrap

COMMAND = "python -m benchmarks.tape.budgets"


@dataclass(frozen=True)
class BudgetsConfig:
    """Collect searches at equal budgets.

    Args:
        budgets: finished run of configs/tape/main/budgets.yaml.
        methods: finished run of configs/tape/main/methods.yaml.
        remedies: finished run of configs/tape/main/remedies.yaml.
    """

    budgets: str = "runs/tape_main/budgets"
    methods: str = "runs/tape_main/methods"
    remedies: str = "runs/tape_main/remedies"


def collect(config: BudgetsConfig) -> None:
    """Write both results."""
    directory = Path(config.budgets)
    differences = read_json(directory / "compare.json")
    metrics = [*_differences(differences), *doublings(differences)]
    metrics += efficiency_ratios(read_json(directory / "efficiency.json"))
    _write("tape_budgets", directory, metrics)
    for end in ("flops", "n"):
        shutil.copy(directory / f"compare_{end}.png", RESULTS / f"tape_budgets_{end}.png")
    shutil.copy(directory / "optimisation.png", RESULTS / "tape_budgets_optimisation.png")
    for name, beside in (("tape_methods", config.methods), ("tape_remedies", config.remedies)):
        _write(name, Path(beside), _beside_beam(Path(beside)))


def _differences(differences: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The beam minus best-of-N and votes, at equal tokens and at equal FLOPs."""
    return [
        row(f"{BEAM} N={d['a_n']} minus {d['b']} N={d['b_n']} ({d['kind']})", d["difference"],
            d["ci95"], None)
        for d in differences
        if d["kind"] in ("equal tokens", "equal FLOPs") and d["a"] == BEAM
    ]  # fmt: skip


def _beside_beam(directory: Path) -> list[dict[str, Any]]:
    """Every search minus the beam of the same budget: its places in the list of widths."""
    found = read_json(directory / "picks.json")
    points = {(p["method"], p["n"]): _correct(directory, p, found["problems"])
              for p in found["points"] if p["method"] != BEAM}  # fmt: skip
    beams = [p for p in found["points"] if p["method"] == BEAM]
    widths: dict[str, list[int]] = {}
    for method, n in points:
        widths.setdefault(method, []).append(n)
    out = []
    for method, own in widths.items():
        if len(own) != len(beams):
            continue  # best-of-N, which is shown at more budgets
        for beam, n in zip(beams, own, strict=True):
            ours = _correct(directory, beam, found["problems"])
            d = bootstrap(points[method, n] - ours)
            name = f"{method} N={n} minus {BEAM} N={beam['n']}"
            out.append(row(name, d.mean, [d.low, d.high], None))
    return out


def _correct(
    directory: Path, point: dict[str, Any], problems: Sequence[str]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(problems, seeds) right or wrong of one point's picks."""
    columns = []
    for name, picked in zip(point["files"], point["picked"], strict=True):
        records = {r.problem_id: r for r in read(directory / name)}
        columns.append(
            [i >= 0 and records[p].candidates[i].correct
             for p, i in zip(problems, picked, strict=True)]
        )  # fmt: skip
    return np.array(columns, dtype=np.float64).T


def _write(name: str, directory: Path, metrics: Sequence[dict[str, Any]]) -> None:
    rows = read_csv(directory)
    manifest = read_json(directory / "manifest.json")
    write_result(name, [*metrics, *accuracies(rows)], rows, manifest, COMMAND)
    shutil.copy(directory / "compare.png", RESULTS / f"{name}.png")


if __name__ == "__main__":
    run(collect, BudgetsConfig, "benchmarks.tape.budgets")
