"""Which of the shipped policies makes the best prover, from a finished pilot.

    data_gen.rollouts --config configs/tape/labels/pilot.yaml
    data_gen.select_prover runs/tape_pilot
    python -m benchmarks.tape.select_prover

Writes ``benchmarks/results/tape_select_prover.{json,csv,png}``: the statistics of Theorem 3.1 of
the PAV paper, in the format of all results. There is no target: what is recommended is what the
statistics say, not what a search with that prover reaches.
"""

from __future__ import annotations

import csv
import json
import platform
import shutil
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks.tape.main import RESULTS, commit, row
from data_gen.provers.command import PICTURE, RESULT, STATISTICS
from data_gen.store import read_manifest
from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text

COMMAND = "python -m benchmarks.tape.select_prover"


@dataclass(frozen=True)
class SelectProverResultConfig:
    """Collect what data_gen.select_prover found.

    Args:
        labels: the pilot.
    """

    labels: str = "runs/tape_pilot"


def collect(config: SelectProverResultConfig) -> None:
    """Write the statistics of every candidate."""
    directory = Path(config.labels)
    if not (directory / RESULT).exists():
        raise UserError(
            f"labels {config.labels!r} has no {RESULT}; run data_gen.select_prover there"
        )
    found = json.loads((directory / RESULT).read_text())
    shared = {
        "seeds": [read_manifest(directory)["seed"]],
        "n_problems": found["problems"],
        "command": COMMAND,
        "machine": f"{platform.processor() or platform.machine()}, no GPU",
        "date": date.today().isoformat(),
        "commit": commit(),
    }
    covered = "share of the base's visits that could be judged"
    metrics = [row(covered, found["covered"], None, None)]
    rows = []
    for candidate in found["candidates"]:
        name, chosen = candidate["name"], candidate["name"] == found["recommended"]
        line = {"prover": name, "recommended": chosen, "solves": candidate["success"]}
        for statistic in STATISTICS:
            value, ci95 = candidate[statistic]["value"], candidate[statistic]["ci95"]
            mark = " (recommended)" if chosen else ""
            metrics.append(row(f"prover {name}{mark}: {statistic}", value, ci95, None))
            line |= {statistic: value, f"{statistic}_low": ci95[0], f"{statistic}_high": ci95[1]}
        rows.append(line)
    target = RESULTS / "tape_select_prover.json"
    target.write_text(json_text([{**m, **shared} for m in metrics]) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    shutil.copy(directory / PICTURE, target.with_suffix(".png"))
    print(f"{len(metrics)} metrics in {target}\nnext: python -m benchmarks.summary")


if __name__ == "__main__":
    run(collect, SelectProverResultConfig, "benchmarks.tape.select_prover")
