"""Runs of ``pav.rl`` that benchmarks compare: each in a process of its own, on one core."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def run_once(settings: dict[str, Any], output: Path) -> None:
    """One run of pav.rl, unless it is there; one that was stopped goes on."""
    if (output / "last" / "config.json").exists():
        return
    output.mkdir(parents=True, exist_ok=True)
    file = output / "settings.yaml"
    # An arm that collapses is a result.
    file.write_text(yaml.safe_dump(settings | {"output": str(output), "guards": "off"}))
    print(f"== pav.rl --config {file}", flush=True)
    subprocess.run(
        [sys.executable, "-m", "pav.rl", "--config", str(file)],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """Metrics of a run, oldest first; none where there is no run."""
    file = directory / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of the same keys as CSV."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
