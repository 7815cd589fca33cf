"""``python -m benchmarks.labels.budget``: what labels are worth, by strategy and tokens.

Run first (each resumes; about 17 minutes of one core in all)::

    data_gen.rollouts --config configs/tape/labels/held_out.yaml
    python -m benchmarks.labels.pool

Writes ``benchmarks/results/labels_budget`` (tokens at equal quality), ``labels_fig13`` (rollouts a
prefix against solutions, PAV paper Fig. 13) and ``labels_fig14`` (first pit against all prefixes,
Fig. 14), each as ``.json``, ``.csv`` and ``.png``. Quality is the Brier score of Q on held-out
prefixes where the paper has the accuracy of a beam search. See ``benchmarks/labels/study.py`` for
the design.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.labels.measure import curve, irreducible, measure
from benchmarks.labels.ratio import Curve, bound, brier, brier_difference, token_ratio
from benchmarks.labels.study import (
    ADAPTIVE,
    ARMS,
    ENDINGS,
    PITS,
    REFERENCE,
    SHARES,
    SWEEP,
    Arm,
    StudyConfig,
)
from pav.cli.run import run
from pav.core.files import json_text
from pav.evaluate.scored_labels import MODES

RESULTS = Path(__file__).parents[1] / "results"
COMMAND = "python -m benchmarks.labels.budget"
TARGET = 1 / 3
FULL = len(SHARES) - 1


@dataclass(frozen=True)
class BudgetConfig:
    """Measure the study of label budgets.

    Args:
        study: the pool and what belongs to it.
        trunks: frozen trunks of the verifiers; plots show the first.
    """

    study: StudyConfig = field(default_factory=StudyConfig)
    trunks: list[str] = field(default_factory=lambda: ["pav:strong"])


@dataclass(frozen=True)
class Measured:
    """Curves of all arms on one trunk, read through one calibrator.

    Attributes:
        trunk: its name.
        mode: the calibrator.
        curves: by arm.
        limit: labels as sharp as those of ``n_mc`` 16 at the price of one rollout per prefix.
        floor: Brier score of a predictor that knows Q.
    """

    trunk: str
    mode: str
    curves: dict[Arm, Curve]
    limit: Curve
    floor: float

    @property
    def where(self) -> str:
        """For the names of metrics."""
        return (
            f"{self.trunk}, calibrator {'with' if self.mode == 'surprise' else 'without'} surprise"
        )


def budget(config: BudgetConfig) -> None:
    """Measure what is missing and write all results (see :class:`BudgetConfig`)."""
    floor, n_held_out = irreducible(config.study)
    found, table = [], []
    for trunk in config.trunks:
        rows = measure(config.study, ARMS, trunk)
        table += [_flat(trunk, row) for row in rows]
        for mode in reversed(MODES):
            curves = {arm: curve(rows, arm, mode) for arm in ARMS}
            limit = curve(rows, SWEEP[-1], mode, "tokens_of_one")
            found.append(Measured(trunk, mode, curves, limit, floor))
    common = _common(config, n_held_out)
    shown = [m for m in found if m.trunk == config.trunks[0]]
    ours = [REFERENCE, SWEEP[-1], SWEEP[0], *ADAPTIVE, *PITS, *ENDINGS]
    for name, metrics, arms in (
        ("labels_budget", [r for m in found for r in _ratios(m)], ours),
        ("labels_fig13", [r for m in found for r in _fig13(m)], list(SWEEP)),
        ("labels_fig14", [r for m in found for r in _fig14(m)], _pairs()),
    ):
        names = {arm.name for arm in arms}
        _write(
            name, [{**row, **common} for row in metrics], [r for r in table if r["arm"] in names]
        )
        _plot(RESULTS / f"{name}.png", shown, arms)
    print("next: python -m benchmarks.summary")


def _ratios(m: Measured) -> list[dict[str, Any]]:
    """Tokens for the Brier score that all_prefixes reaches with all of its tokens."""
    rows = [_row(f"Brier score of a predictor that knows Q ({m.trunk})", m.floor)]
    for reference in (REFERENCE, SWEEP[-1]):
        for arm in (a for a in m.curves if a != reference):
            is_ours = arm in ADAPTIVE
            value, interval = token_ratio(m.curves[arm], m.curves[reference])
            least = bound(m.curves[arm], m.curves[reference])
            name = f"{least}tokens of {arm.name} / {reference.name} at the latter's Brier score"
            target = {"op": "<=", "value": TARGET} if is_ours else None
            rows.append(_row(f"{name} ({m.where})", value, interval, target))
        least = bound(m.limit, m.curves[reference])
        limit = f"limit of all: {least}tokens of n_mc 16 at the price of n_mc 1 / {reference.name}"
        rows.append(_row(f"{limit} ({m.where})", *token_ratio(m.limit, m.curves[reference])))
    return rows + [
        _row(f"Brier score, {arm.name}, whole budget ({m.where})", *brier(c, FULL))
        for arm, c in m.curves.items()
    ]


def _fig13(m: Measured) -> list[dict[str, Any]]:
    return [
        _row(f"Brier score, n_mc {arm.n_mc}, budget share {share} ({m.where})",
             *brier(m.curves[arm], s))
        for arm in SWEEP
        for s, share in enumerate(SHARES)
    ]  # fmt: skip


def _pairs() -> list[Arm]:
    return [arm for pit in PITS for arm in (pit, Arm("all_prefixes", pit.n_mc))]


def _fig14(m: Measured) -> list[dict[str, Any]]:
    return [
        _row(
            f"Brier score, {pit.name} minus all_prefixes, budget share {share} ({m.where})",
            *brier_difference(m.curves[pit], m.curves[Arm("all_prefixes", pit.n_mc)], s),
        )
        for pit in PITS
        for s, share in enumerate(SHARES)
    ]


def _row(
    metric: str,
    value: float,
    ci95: list[float] | None = None,
    target: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {"metric": metric, "value": value, "ci95": ci95, "target": target}


def _flat(trunk: str, row: dict[str, Any]) -> dict[str, Any]:
    """A measurement without its columns by problem."""
    count = sum(row["held_out"])
    briers = {f"brier_{mode}": sum(row[mode]) / count for mode in MODES}
    return {"trunk": trunk, **{k: v for k, v in row.items() if not isinstance(v, list)}, **briers}


def _common(config: BudgetConfig, n_held_out: int) -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "seeds": list(range(config.study.replicates)),
        "n_problems": n_held_out,
        "command": COMMAND,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU",
        "date": date.today().isoformat(),
        "commit": git.stdout.strip() or "unknown",
    }


def _write(name: str, metrics: list[dict[str, Any]], table: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json_text(metrics) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print(f"{len(metrics)} metrics in {target}")


def _plot(path: Path, shown: Sequence[Measured], arms: Sequence[Arm]) -> None:
    """Brier score over tokens, a panel per calibrator."""
    figure, axes = plt.subplots(1, len(shown), figsize=(6.2 * len(shown), 4.6), squeeze=False)
    for axis, m in zip(axes[0], shown, strict=True):
        for arm in arms:
            tokens_S, brier_S = m.curves[arm].whole
            axis.plot(tokens_S, brier_S, **_style(arm), label=arm.name)
        axis.plot(*m.limit.whole, color="gray", linewidth=1, label="n_mc 16 at the price of 1")
        axis.axhline(m.floor, color="black", linestyle=":", label="a predictor that knows Q")
        axis.set_xscale("log")
        axis.set_xlabel("tokens sampled for training labels")
        axis.set_title(f"frozen {m.where}", fontsize=9)
    axes[0][0].set_ylabel("Brier score on held-out prefixes")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _style(arm: Arm) -> dict[str, Any]:
    lines = {"all_prefixes": "-", "first_pit": "--", "adaptive": "-."}
    colours = {
        1: "tab:blue",
        2: "tab:cyan",
        4: "tab:green",
        8: "tab:orange",
        16: "tab:red",
    }
    colour = colours.get(arm.n_mc, "tab:pink")
    if arm.strategy == "adaptive" and arm.n_mc:
        colour = "tab:purple"
    return {
        "linestyle": ":" if arm.endings else lines[arm.strategy],
        "color": colour,
        "marker": "x" if arm.endings else "o",
        "markersize": 4,
    }


if __name__ == "__main__":
    run(budget, BudgetConfig, "benchmarks.labels.budget")
