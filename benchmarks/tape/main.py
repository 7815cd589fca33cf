"""The main result on the calculator tape, from two finished comparisons.

Run first (each resumes; on two cores side by side with OMP_NUM_THREADS=1)::

    search.compare --config configs/tape/main/compare.yaml
    search.compare --config configs/tape/main/ablations.yaml
    python -m benchmarks.tape.main

Writes ``benchmarks/results/tape_main.{json,csv,png}``.
"""

from __future__ import annotations

import csv
import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pav.cli import run
from pav.errors import UserError

RESULTS = Path(__file__).parents[1] / "results"
BEAM = "PAV beam"
# Beam width -> budget in traces -> required lead over best-of-N by the ORM.
LEADS = {2: (8, 0.15), 4: (16, 0.15), 8: (32, 0.08)}
ARGMAX, SAME_PICK = "best-of-N, ORM", "best-of-N, picked as PAV beam picks"
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
    differences = _json(run_directory / "compare.json")
    main_rows, ablation_rows = _csv(run_directory), _csv(Path(config.ablations))
    rows = [*main_rows, *ablation_rows]
    manifest = _json(run_directory / "manifest.json")
    ablation_seeds = _json(Path(config.ablations) / "manifest.json")["seeds"]
    common = {
        "seeds": manifest["seeds"],
        "n_problems": manifest["problems"],
        "command": COMMAND,
        "machine": f"{platform.processor() or platform.machine()}, 2 cores, no GPU",
        "date": date.today().isoformat(),
        "commit": _commit(),
    }
    ratios = _ratios(_json(run_directory / "efficiency.json"))
    metrics = [*_leads(differences), *_doublings(differences), *ratios, *_accuracies(main_rows)]
    metrics += [{**m, "seeds": ablation_seeds} for m in _accuracies(ablation_rows)]
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / "tape_main.json"
    target.write_text(json.dumps([{**common, **m} for m in metrics], indent=1) + "\n")
    with (RESULTS / "tape_main.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    shutil.copy(run_directory / "compare.png", RESULTS / "tape_main.png")
    shutil.copy(run_directory / "optimisation.png", RESULTS / "tape_main_optimisation.png")
    shutil.copy(Path(config.ablations) / "compare.png", RESULTS / "tape_main_ablations.png")
    print(f"{len(metrics)} metrics in {target}\nnext: python -m benchmarks.summary")


def _leads(differences: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for d in differences:
        if d["kind"] != "equal tokens" or d["a"] != BEAM or d["a_n"] not in LEADS:
            continue
        budget, lead = LEADS[d["a_n"]]
        wanted = {ARGMAX: lead, SAME_PICK: lead, **dict.fromkeys(VOTES, 0.0)}
        if d["b"] in wanted:
            out.append(
                _metric(
                    f"{BEAM} N={d['a_n']} minus {d['b']} N={d['b_n']} (budget {budget} traces)",
                    d["difference"],
                    d["ci95"],
                    {"op": ">=", "value": wanted[d["b"]]},
                )
            )
    return out


def _doublings(differences: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """No over-optimisation: the interval of acc(2N) - acc(N) never lies wholly below 0."""
    return [
        _metric(
            f"{BEAM} upper end of 95% of acc({d['a_n']}) - acc({d['b_n']})",
            d["ci95"][1],
            d["ci95"],
            {"op": ">=", "value": 0.0},
        )
        for d in differences
        if d["kind"] == "doubling" and d["a"] == BEAM
    ]


def _ratios(efficiency: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much less the beam spends to be as good as the largest best-of-N by the ORM."""
    return [
        _metric(
            f"{BEAM}: {e['axis']} of {ARGMAX} at its best over those of the beam that is as good",
            e["ratio"],
            [e["low"], e["high"]],
            None,
        )
        for e in efficiency
        if e["method"] == BEAM and e["baseline"] == ARGMAX
    ]


def _accuracies(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    out = []
    for r in rows:
        n = f"N={r['n']}"
        if r["matched_to_beam_n"]:
            n += f" (tokens of beam {r['matched_to_beam_n']})"
        interval = [float(r["low"]), float(r["high"])]
        metric = _metric(f"accuracy, {r['method']}, {n}", float(r["accuracy"]), interval, None)
        keys = ("policy_tokens", "verifier_tokens", "verifier_cached", "seconds", "oracle")
        settings = json.loads(r["settings"])
        # Seconds are NaN where a run was resumed; NaN is no JSON.
        costs = {k: None if r[k] == "nan" else float(r[k]) for k in keys}
        out.append({**metric, **costs, "settings": settings})
    return out


def _metric(
    name: str, value: float, ci95: list[float] | None, target: dict[str, Any] | None
) -> dict[str, Any]:
    return {"metric": name, "value": value, "ci95": ci95, "target": target}


def _json(path: Path) -> Any:
    if not path.exists():
        raise UserError(f"{str(path)!r} is missing; let search.compare finish first")
    return json.loads(path.read_text())


def _csv(directory: Path) -> list[dict[str, str]]:
    path = directory / "compare.csv"
    if not path.exists():
        raise UserError(f"{str(path)!r} is missing; let search.compare finish first")
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _commit() -> str:
    out = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return out.stdout.strip() or "unknown"


if __name__ == "__main__":
    run(collect, MainConfig, "benchmarks.tape.main")
