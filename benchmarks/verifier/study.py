"""What makes a verifier good: ``OMP_NUM_THREADS=1 python -m benchmarks.verifier.study``.

Run first (each resumes; minutes each)::

    data_gen.rollouts --config configs/tape/demo/rollouts.yaml       # 100 problems, one rollout
    data_gen.rollouts --config configs/tape/verifier/labels_mc.yaml  # and _validation
    search.beam --verifier pav:reference --n 4 --split train --problems 100 \
        --output runs/verifier/searched_train
    data_gen.rollouts --config configs/tape/verifier/labels_round2.yaml
    search.beam --verifier pav:reference --n 16 --split validation --problems 60 \
        --output runs/verifier/searched
    data_gen.rollouts --config configs/tape/verifier/labels_searched.yaml

A row is a verifier that differs from the default (heads on the frozen strong policy, 8 seeds a
problem, half of them the prover's, one rollout a prefix) in one thing; labels cost the same tokens
unless the row says otherwise. Calibrators are fitted on the first half of the validation problems,
figures are of the other half, intervals are 95% bootstraps over its problems; those of a difference
are paired. Rows that are there already (``output``) are not made again.
Writes ``benchmarks/results/verifier_study.{json,csv,png}``.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.verifier.figures import Figure, figures_of, interval, weights
from benchmarks.verifier.fitting import values_of
from benchmarks.verifier.plot import draw
from benchmarks.verifier.results import metric, write
from benchmarks.verifier.rows import DEFAULT, Row, rows
from benchmarks.verifier.setting import HEADS, Study
from pav.cli.run import run
from pav.evaluate.report import first_half
from pav.evaluate.scored_labels import MODES
from pav.labels.tables import read_labels
from pav.policy.policy import PolicyConfig, load_policy
from pav.tasks.tape import Tape

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.verifier.study"
# With intervals, and in the JSON; the others are in the CSV.
SHOWN = (
    "no slip q/base", "no slip, equal depth q/base", "any first slip q/base", "AUC q/base",
    "AUC q/prover", "A corr q/prover", "Brier q/prover", "AUC orm",
)  # fmt: skip
IN_JSON = ("no slip, equal depth q/base", "AUC q/prover", "A corr q/prover", "AUC orm")


@dataclass(frozen=True)
class StudyConfig:
    """What makes a verifier good.

    Args:
        labels: label runs of training problems.
        validation: label run that rows are judged on.
        searched: label run of searched prefixes of validation problems.
        output: directory of what is made.
        seeds: training seeds of heads (a trained trunk has one).
        only: groups or names of rows to make now; empty for all.
        collect: write the results (all rows must be there).
    """

    labels: list[str] = field(
        default_factory=lambda: [
            "runs/demo/labels",
            "runs/verifier/labels_mc",
            "runs/verifier/labels_round2",
        ]
    )
    validation: str = "runs/verifier/labels_validation"
    searched: str = "runs/verifier/labels_searched"
    output: str = "runs/verifier/study"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    only: list[str] = field(default_factory=list)
    collect: bool = True


def study(config: StudyConfig) -> None:
    """Make what is missing, then write the results (see the module)."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    directory = Path(config.output)
    directory.mkdir(parents=True, exist_ok=True)
    judged_on = {"validation": read_labels([config.validation])}
    if Path(config.searched, "traces").is_dir():
        judged_on["searched"] = read_labels([config.searched])
    task = Tape()
    policy = load_policy(PolicyConfig(), task.step_rule)
    setting = Study(read_labels(config.labels), judged_on, policy, task, directory)
    for row in rows():
        path = directory / f"{row.key}.npz"
        if path.exists() or (config.only and not {row.group, row.name} & {*config.only}):
            continue
        values = values_of(setting, row, config.seeds)
        np.savez_compressed(path, **values)  # type: ignore[arg-type]
        print(f"{row.group}: {row.name}, {float(values['seconds']):.0f} s a seed", flush=True)
    if config.collect:
        collect(config, setting, directory)


def collect(config: StudyConfig, setting: Study, directory: Path) -> None:
    """Figures of every row, against the row that it is compared with."""
    figures, problems = {}, {}
    for name, judged in setting.judged.items():
        half = np.array([first_half(e.problem_id) for e in judged.examples])
        held_N = ~half[judged.scored.example_N]
        ids = {p: i for i, p in enumerate(sorted({e.problem_id for e in judged.examples}))}
        problem_N = np.array([ids[e.problem_id] for e in judged.examples])[judged.scored.example_N]
        figures[name] = figures_of(judged, held_N)
        problems[name] = {shown: weights(problem_N, figures[name][shown].rows) for shown in SHOWN}
        if name == "validation":
            count = len(np.unique(problem_N[held_N]))
    table: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    spread: dict[tuple[str, str, str, str, str], np.ndarray] = {}
    there = [row for row in rows() if (directory / f"{row.key}.npz").exists()]
    for row in there:
        values = np.load(directory / f"{row.key}.npz")
        for name, by_name in figures.items():
            for mode in MODES if name in values else ():
                line = _line(row, values, name, mode)
                for shown, figure in by_name.items():
                    q_SN = _values(values[name], figure, mode)
                    line[shown] = _mean(figure, q_SN)
                    if shown not in SHOWN:
                        continue
                    key = (row.group, row.name, name, mode, shown)
                    spread[key] = np.array([_mean(figure, q_SN, w) for w in problems[name][shown]])
                    low, high = interval(spread[key])
                    other = ("default", DEFAULT.name) if row.like is None else row.like
                    base = spread.get((*other, name, mode, shown))
                    line[f"{shown} low"], line[f"{shown} high"] = low, high
                    if base is not None and row != DEFAULT:
                        gain = interval(spread[key] - base)
                        line[f"{shown} gain low"], line[f"{shown} gain high"] = gain
                    if name == "validation" and shown in IN_JSON:
                        what = f"{row.group}: {row.name}, {mode}: {shown}"
                        seeds = config.seeds if row.mode == "frozen" else [0]
                        metrics.append(metric(what, line[shown], (low, high), seeds=seeds))
                table.append(line)
    columns = list({c: None for line in table for c in line})
    table = [{c: _short(line.get(c, "")) for c in columns} for line in table]
    write(
        "verifier_study", metrics, table, draw(table), config.seeds, count, COMMAND
    )  # fmt: skip


def _line(row: Row, values: Any, name: str, mode: str) -> dict[str, Any]:
    return {
        "group": row.group,
        "row": row.name,
        "judged on": name,
        "calibrator": mode,
        "compared with": ": ".join(row.like or ("default", DEFAULT.name)),
        "label tokens": int(values["tokens"]),
        "cpu seconds": float(values["seconds"]),
        "seeds": len(values[name]),
    }


def _values(q_SHMN: np.ndarray, figure: Figure, mode: str) -> np.ndarray:
    found: np.ndarray = q_SHMN[:, HEADS.index(figure.head), MODES.index(mode)].astype(np.float64)
    return found


def _mean(figure: Figure, q_SN: np.ndarray, weight: np.ndarray | None = None) -> float:
    w = np.ones(len(figure.rows)) if weight is None else weight
    return float(np.mean([figure.of(q_N, w) for q_N in q_SN]))


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    run(study, StudyConfig, "benchmarks.verifier.study")
