"""Writes ``benchmarks/results/planted_<figure>.{json,csv,png}``."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import t as student

from pav.core.files import json_text

matplotlib.use("Agg")


def mean_and_interval(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """Mean over seeds and its 95% t interval; None for a single seed."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return float(x.mean()), None
    half = float(student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return float(x.mean()), [float(x.mean()) - half, float(x.mean()) + half]


def _commit() -> str:
    out = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return out.stdout.strip() or "unknown"


@dataclass
class Results:
    """Rows of one figure in the format of :mod:`benchmarks.summary`, and its table and plot.

    Attributes:
        directory: where the files go.
        name: their stem, e.g. ``planted_3a``.
        command: what was run.
        rows: what was measured so far.
        commit: the checked-out one.
    """

    directory: Path
    name: str
    command: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    commit: str = field(default_factory=_commit)

    def add(
        self,
        metric: str,
        values: float | Sequence[float],
        seeds: Sequence[int],
        target: tuple[str, float] | None = None,
        **more: Any,
    ) -> None:
        """One row: the mean over ``seeds`` of one value each, or a single value."""
        listed = [float(values)] if isinstance(values, (int, float)) else list(values)
        machine = platform.processor() or platform.machine()
        machine += f", {torch.get_num_threads()} thread(s), no GPU"
        mean, interval = mean_and_interval(listed)
        self.rows.append(
            {
                "metric": f"planted: {metric}",
                "value": mean,
                "ci95": interval,
                "target": None if target is None else {"op": target[0], "value": target[1]},
                "seeds": list(seeds),
                "n_problems": 1,
                "command": self.command,
                "machine": machine,
                "date": date.today().isoformat(),
                "commit": self.commit,
                **more,
            }
        )

    def write(self, table: Sequence[dict[str, Any]], figure: Figure) -> None:
        """Write the three files and say where they are."""
        self.directory.mkdir(parents=True, exist_ok=True)
        stem = self.directory / self.name
        stem.with_suffix(".json").write_text(json_text(self.rows) + "\n")
        with stem.with_suffix(".csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        figure.savefig(stem.with_suffix(".png"), dpi=130)
        for row in self.rows:
            interval = row["ci95"] and " [{:.4g}, {:.4g}]".format(*row["ci95"])
            print(f"{row['metric']}: {row['value']:.4g}{interval or ''}")
        print(f"results in {stem}.json, .csv and .png\nnext: python -m benchmarks.summary")
