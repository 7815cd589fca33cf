"""Writes ``benchmarks/results/<name>.{json,csv,png}`` (format: :mod:`benchmarks.summary`)."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from pav.core.files import json_text

RESULTS = Path(__file__).parents[1] / "results"


def metric(
    name: str, value: float, ci95: Sequence[float] | None = None, **more: Any
) -> dict[str, Any]:
    """One row, without what all rows of a result share; ``more`` overrides that."""
    return {"metric": name, "value": value, "ci95": ci95 and list(ci95), "target": None, **more}


def write(
    name: str,
    metrics: Sequence[Mapping[str, Any]],
    table: Sequence[Mapping[str, Any]],
    figure: Figure,
    seeds: Sequence[int],
    n_problems: int,
    command: str,
) -> None:
    """Write metrics (JSON), measurements (CSV) and their picture (PNG)."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    common = {
        "seeds": list(seeds),
        "n_problems": n_problems,
        "command": command,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} thread(s), no GPU",
        "date": date.today().isoformat(),
        "commit": git.stdout.strip() or "unknown",
    }
    target = RESULTS / f"{name}.json"
    target.write_text(json_text([{**common, **m} for m in metrics]) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    figure.savefig(target.with_suffix(".png"), dpi=130)
    print(f"{len(metrics)} metrics in {target}\nnext: python -m benchmarks.summary")
