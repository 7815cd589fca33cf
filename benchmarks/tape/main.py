"""The main result on the calculator tape, from two finished comparisons.

Run first (each resumes; on two cores side by side with OMP_NUM_THREADS=1)::

    search.compare --config configs/tape/main/compare.yaml
    search.compare --config configs/tape/main/ablations.yaml
    python -m benchmarks.tape.main

Beam search against best-of-N and votes at equal policy tokens, at equal total FLOPs and over N, at
budgets of up to 64 traces; beside other picks and beside merged duplicates, paired. Writes
``benchmarks/results/tape_main.{json,csv,png}``, and ``tape_main_{flops,n,...}.png``.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.results import machine
from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text
from pav.core.statistics import bootstrap
from search.run.records import read

RESULTS = Path(__file__).parents[1] / "results"
BEAM = "PAV beam"
# Beam width -> budget in traces -> required lead over best-of-N by the ORM.
LEADS = {2: (8, 0.15), 4: (16, 0.15), 8: (32, 0.08)}
ARGMAX, SAME_PICK = "best-of-N, ORM", "best-of-N, picked as PAV beam picks"
# Of these test problems nobody had looked at a search when weighed duplicates were thought of.
UNSEEN = 150
VOTES = ("best-of-N, ORM-weighted vote", "majority vote")
COMMAND = "python -m benchmarks.tape.main"


@dataclass(frozen=True)
class MainConfig:
    """Collect the main result.

    Args:
        compare: finished run of configs/tape/main/compare.yaml.
        ablations: finished run of configs/tape/main/ablations.yaml.
    """

    compare: str = "runs/tape_main/compare"
    ablations: str = "runs/tape_main/ablations"


def collect(config: MainConfig) -> None:
    """Write the metrics, each against its target."""
    run_directory = Path(config.compare)
    differences = read_json(run_directory / "compare.json")
    main_rows, ablation_rows = read_csv(run_directory), read_csv(Path(config.ablations))
    rows = [*main_rows, *ablation_rows]
    manifest = read_json(run_directory / "manifest.json")
    ablation_seeds = read_json(Path(config.ablations) / "manifest.json")["seeds"]
    ratios = _efficiency_ratios(read_json(run_directory / "efficiency.json"))
    metrics = [*_leads(differences), *_equal_flops(differences), *_doublings(differences), *ratios]
    metrics += beside_beam(run_directory)
    metrics += beside_beam(run_directory, UNSEEN)
    metrics += accuracies(main_rows)
    metrics += [{**m, "seeds": ablation_seeds} for m in accuracies(ablation_rows)]
    write_result("tape_main", metrics, rows, manifest, COMMAND)
    shutil.copy(run_directory / "compare.png", RESULTS / "tape_main.png")
    for end in ("flops", "n"):
        shutil.copy(run_directory / f"compare_{end}.png", RESULTS / f"tape_main_{end}.png")
    shutil.copy(run_directory / "optimisation.png", RESULTS / "tape_main_optimisation.png")
    shutil.copy(Path(config.ablations) / "compare.png", RESULTS / "tape_main_ablations.png")


def write_result(
    name: str,
    metrics: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, str]],
    manifest: dict[str, Any],
    command: str,
) -> None:
    """Write ``<name>.json`` (metrics) and ``<name>.csv`` (rows) of a comparison's ``manifest``."""
    common = {
        "seeds": manifest["seeds"],
        "n_problems": manifest["problems"],
        "command": command,
        "machine": machine(),
        "date": date.today().isoformat(),
        "commit": commit(),
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json_text([{**common, **m} for m in metrics]) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(metrics)} metrics in {target}\nnext: python -m benchmarks.summary")


def _leads(differences: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for d in differences:
        if d["kind"] != "equal tokens" or d["a"] != BEAM:
            continue
        name, target = f"{BEAM} N={d['a_n']} minus {d['b']} N={d['b_n']} (equal tokens", None
        if d["a_n"] in LEADS:
            budget, lead = LEADS[d["a_n"]]
            wanted = {ARGMAX: lead, SAME_PICK: lead, **dict.fromkeys(VOTES, 0.0)}
            name, target = f"{name}, budget {budget} traces", {"op": ">=", "value": wanted[d["b"]]}
        out.append(row(f"{name})", d["difference"], d["ci95"], target))
    return out


def _equal_flops(differences: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row(f"{BEAM} N={d['a_n']} minus {d['b']} N={d['b_n']} (equal FLOPs)", d["difference"],
            d["ci95"], None)
        for d in differences
        if d["kind"] == "equal FLOPs" and d["a"] == BEAM
    ]  # fmt: skip


def beside_beam(directory: Path, last: int = 0) -> list[dict[str, Any]]:
    """Every search minus the beam of the same budget: its places in the list of widths.

    Args:
        directory: of a finished comparison.
        last: of so many of its problems alone, the last ones.
    """
    found = read_json(directory / "picks.json")
    problems = found["problems"][-last:]
    results = {(p["method"], p["n"]): _correct(directory, p, found["problems"])[-last:]
              for p in found["points"] if p["method"] != BEAM}  # fmt: skip
    beams = [p for p in found["points"] if p["method"] == BEAM]
    widths: dict[str, list[int]] = {}
    for method, n in results:
        widths.setdefault(method, []).append(n)
    out = []
    for method, own in widths.items():
        if len(own) != len(beams):
            continue  # best-of-N, which is shown at more budgets
        for beam, n in zip(beams, own, strict=True):
            ours = _correct(directory, beam, found["problems"])[-last:]
            d = bootstrap(results[method, n] - ours)
            name = f"{method} N={n} minus {BEAM} N={beam['n']}"
            if last:
                name += f", last {len(problems)} problems"
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


def _doublings(differences: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """No over-optimisation: the interval of acc(2N) - acc(N) never lies wholly below 0."""
    return [
        row(
            f"{BEAM} upper end of 95% of acc({d['a_n']}) - acc({d['b_n']})",
            d["ci95"][1],
            d["ci95"],
            {"op": ">=", "value": 0.0},
        )
        for d in differences
        if d["kind"] == "doubling" and d["a"] == BEAM
    ]


def _efficiency_ratios(efficiency: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much less the beam spends to be as good as the largest best-of-N by the ORM."""
    return [
        row(
            f"{BEAM}: {e['axis']} of {ARGMAX} at its best over those of the beam that is as good",
            e["ratio"],
            [e["low"], e["high"]],
            None,
        )
        for e in efficiency
        if e["method"] == BEAM and e["baseline"] == ARGMAX
    ]


def accuracies(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Accuracy and costs of every row of a ``compare.csv``."""
    out = []
    for r in rows:
        n = f"N={r['n']}"
        if r["matched_to_beam_n"]:
            n += f" (tokens of beam {r['matched_to_beam_n']})"
        interval = [float(r["low"]), float(r["high"])]
        found = row(f"accuracy, {r['method']}, {n}", float(r["accuracy"]), interval, None)
        keys = (
            "policy_tokens",
            "verifier_tokens",
            "verifier_cached",
            "total_flops",
            "seconds",
            "oracle",
        )
        settings = json.loads(r["settings"])
        # Seconds are NaN where a run was resumed; NaN is no JSON.
        costs = {k: None if r[k] == "nan" else float(r[k]) for k in keys}
        out.append({**found, **costs, "settings": settings})
    return out


def row(
    name: str, value: float, ci95: list[float] | None, target: dict[str, Any] | None
) -> dict[str, Any]:
    """One metric, without what all of a result share."""
    return {"metric": name, "value": value, "ci95": ci95, "target": target}


def read_json(path: Path) -> Any:
    """A file of a finished comparison."""
    if not path.exists():
        raise UserError(f"{str(path)!r} is missing; let search.compare finish first")
    return json.loads(path.read_text())


def read_csv(directory: Path) -> list[dict[str, str]]:
    """The table of a finished comparison."""
    path = directory / "compare.csv"
    if not path.exists():
        raise UserError(f"{str(path)!r} is missing; let search.compare finish first")
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def commit() -> str:
    """What is checked out."""
    out = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return out.stdout.strip() or "unknown"


if __name__ == "__main__":
    run(collect, MainConfig, "benchmarks.tape.main")
