"""Writes ``benchmarks/results/speed_<name>.{json,csv}`` (format: :mod:`benchmarks.summary`).

On a machine with a GPU the name ends in ``_gpu``, so that figures of both kinds stand side by side.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pav.core.files import json_text
from pav.engine.vllm import VllmEngine

RESULTS = Path(__file__).parents[1] / "results"
Target = tuple[str, float] | None
GPU = torch.cuda.is_available()
SECOND = "second" if GPU else "processor second"


def seconds() -> float:
    """A clock: with a GPU that on the wall, else the processor's, which other work on the machine
    does not move.
    """
    return time.perf_counter() if GPU else time.process_time()


def in_process(engine: object) -> VllmEngine:
    """An engine that is in this process, as one is without workers."""
    assert isinstance(engine, VllmEngine)
    return engine


def result(name: str, suffix: str) -> Path:
    """Where a result of a benchmark goes."""
    return RESULTS / f"speed_{name}{'_gpu' if GPU else ''}.{suffix}"


def metric(
    name: str, value: float, target: Target = None, ci95: Sequence[float] | None = None
) -> dict[str, Any]:
    """One row, without what all rows of a run share."""
    op = None if target is None else {"op": target[0], "value": target[1]}
    return {"metric": name, "value": value, "ci95": ci95 and list(ci95), "target": op}


def machine() -> str:
    """Processor, cores, threads and GPU."""
    device = torch.cuda.get_device_name() if GPU else "no GPU"
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} thread(s), {device}"
    )


def commit() -> str:
    """What is checked out."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def write(
    name: str,
    metrics: Sequence[Mapping[str, Any]],
    table: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    n_problems: int,
    command: str,
) -> None:
    """Write metrics (JSON) and measurements (CSV)."""
    common = {
        "seeds": list(seeds),
        "n_problems": n_problems,
        "command": command,
        "machine": f"{machine()}, load average {os.getloadavg()[1]:.1f}",
        "date": date.today().isoformat(),
        "commit": commit(),
    }
    RESULTS.mkdir(exist_ok=True)
    target = result(name, "json")
    target.write_text(json_text([{**m, **common} for m in metrics]) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    for m in metrics:
        print(f"{m['metric']}: {m['value']:.4g}")
    print(f"{len(metrics)} metrics in {target}\nnext: python -m benchmarks.summary")


def bars(
    heights: Sequence[tuple[str, float]], what: str, target: Path, *, log: bool = False
) -> None:
    """A bar for every (name, height); ``what`` names the axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.8 + 0.36 * len(heights)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([name for name, _ in heights], [height for _, height in heights], log=log)
    labels = [f"{h:,.0f}" if h >= 100 else f"{h:.3g}" for _, h in heights]
    axes.bar_label(drawn, labels, padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(what)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150)
