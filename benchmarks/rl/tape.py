"""Online RL on the calculator tape: ``OMP_NUM_THREADS=1 python -m benchmarks.rl.tape``.

Two regimes. ``dense``: the shipped base policy, right in a tenth of its samples. ``rare``: an
earlier checkpoint of the same training, right in 1 to 2% of them, where nearly every group of
outcomes is dead. In each, every arm runs with every seed from the same start, on the same problems
and with as many samples per iteration. Every run is ``pav.rl`` in a process of its own, so the same
command goes on where it was stopped; about five minutes of a core for 30 iterations of a run.

Reads the arms of ``configs/tape/rl/arms.yaml``. Every arm that has ``tries`` there has as many as
the others: short runs with a seed of their own, of which the one is taken that is right most often
in its last ten iterations (fresh samples of problems that were not trained on before). Writes
``rl_tape_<regime>.json``, ``.csv``, ``_tries.csv`` and ``.png`` to ``benchmarks/results``.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from benchmarks.rl.runs import rows_of, run_once
from benchmarks.speed.results import commit, machine, metric
from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text
from pav.core.statistics import Interval, bootstrap

ARMS = Path("configs/tape/rl/arms.yaml")
RESULTS = Path(__file__).parents[1] / "results"
OUTCOME = "outcome"
TRY_SEED = 1000
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class TapeRlConfig:
    """Online RL on the tape.

    Args:
        regime: which start.
        output: where runs are kept.
        arms: names of arms; by default all of ``configs/tape/rl/arms.yaml``.
        seeds: of runs: problems, samples.
        iterations: of every run.
        try_iterations: of every try.
        only_report: make tables and plots of what is there.
    """

    regime: Literal["dense", "rare"] = "rare"
    output: str = "runs/rl_tape"
    arms: list[str] | None = None
    seeds: int = 3
    iterations: int = 60
    try_iterations: int = 20
    only_report: bool = False


@dataclass(frozen=True)
class Curve:
    """What an arm's runs say, by evaluation.

    Attributes:
        iteration_E: iterations behind each evaluation.
        samples_E: traces sampled until then.
        accuracy_SE: held-out accuracy of every seed.
        interval_SE: (low, high) of each over problems.
        steps_SE: steps per training trace around it.
        seconds_S: of each whole run.
    """

    iteration_E: Array
    samples_E: Array
    accuracy_SE: Array
    interval_SE: Array
    steps_SE: Array
    seconds_S: Array


def tape(config: TapeRlConfig) -> None:
    """Run what is missing, then report (see the module)."""
    plan = yaml.safe_load(ARMS.read_text())
    names = config.arms or list(plan["arms"])
    if unknown := set(names) - set(plan["arms"]):
        raise UserError(f"arms names {sorted(unknown)[0]!r}; choose from {', '.join(plan['arms'])}")
    start = plan["starts"][config.regime]
    if not config.only_report:
        _make_start(start)
        start = {k: v for k, v in start.items() if k != "made_by"}
        tuned = {name: _tuned(config, start, plan, name) for name in names}
        for seed in range(config.seeds):
            for name in names:
                output = _directory(config, name, seed)
                run_once(start | tuned[name] | {"seed": seed}, output)
    curves = {name: curve for name in names if (curve := _curve(config, name)) is not None}
    if not curves:
        raise UserError(f"no run of {config.regime} is in {config.output!r}; leave out only_report")
    _report(config, curves, plan["common"]["eval_problems"])


def _make_start(start: dict[str, Any]) -> None:
    """The start policy, where it is not there."""
    if "made_by" in start and not (Path(start["init"]) / "config.json").exists():
        subprocess.run([sys.executable, "-m", *start["made_by"]], check=True)


def _directory(config: TapeRlConfig, name: str, seed: int) -> Path:
    return Path(config.output) / config.regime / name / f"seed{seed}"


def _tuned(
    config: TapeRlConfig, start: dict[str, Any], plan: dict[str, Any], name: str
) -> dict[str, Any]:
    """Settings of an arm, those of its best try among them."""
    settings = {**plan["common"], **plan["arms"][name], "iterations": config.iterations}
    tries = plan["tries"].get(name, [])
    for number, changes in enumerate(tries):
        short = {"iterations": config.try_iterations, "eval_problems": 0, "seed": TRY_SEED}
        run_once(start | settings | changes | short, _try_directory(config, name, number))
    if not tries:
        return settings
    right = [_late(rows_of(_try_directory(config, name, i))) for i in range(len(tries))]
    best = int(np.argmax(right))
    print(f"== {name}: try {best} of {len(tries)}, {tries[best]}, right {right[best]:.3f}")
    return settings | tries[best]


def _try_directory(config: TapeRlConfig, name: str, number: int) -> Path:
    return Path(config.output) / config.regime / "tries" / name / str(number)


def _late(rows: list[dict[str, Any]]) -> float:
    """Share of right samples in the last ten iterations."""
    return float(np.mean([row["train/accuracy"] for row in rows if "train/accuracy" in row][-10:]))


def _curve(config: TapeRlConfig, name: str) -> Curve | None:
    """Of the seeds whose runs are there; evaluations that all of them have."""
    runs = []
    for seed in range(config.seeds):
        if rows := rows_of(_directory(config, name, seed)):
            runs.append(rows)
    if not runs:
        return None
    evaluations = [[row for row in rows if "accuracy" in row] for rows in runs]
    count = min(map(len, evaluations))
    first = evaluations[0][:count]

    def steps(rows: list[dict[str, Any]], iteration: float) -> float:
        last = max(iteration, 1)
        near = [
            row["train/steps"]
            for row in rows
            if "train/steps" in row and last - 5 <= row["iteration"] <= last
        ]
        return float(np.mean(near))

    return Curve(
        np.array([row["iteration"] for row in first]),
        np.array([row.get("samples", 0.0) for row in first]),
        np.array([[row["accuracy"] for row in rows[:count]] for rows in evaluations]),
        np.array(
            [
                [[row["accuracy_low"], row["accuracy_high"]] for row in rows[:count]]
                for rows in evaluations
            ]
        ),
        np.array([[steps(rows, row["iteration"]) for row in first] for rows in runs]),
        np.array([sum(row["seconds/all"] for row in rows) for rows in runs]),
    )


def samples_to(curve: Curve, accuracy: float) -> float:
    """Samples after which the mean over seeds first reaches ``accuracy``; infinite if never."""
    reached = np.flatnonzero(curve.accuracy_SE.mean(0) >= accuracy)
    return float(curve.samples_E[reached[0]]) if len(reached) else float("inf")


def _over_seeds(values_S: Array) -> Interval:
    return bootstrap(values_S[:, None])


def _report(config: TapeRlConfig, curves: dict[str, Curve], problems: int) -> None:
    rows, metrics = [], []
    outcome = curves.get(OUTCOME)
    best = None if outcome is None else float(outcome.accuracy_SE.mean(0).max())
    for name, curve in curves.items():
        end = _over_seeds(curve.accuracy_SE[:, -1])
        seeds = len(curve.accuracy_SE)
        if seeds == 1:  # then that of its problems says more
            end = Interval(end.mean, *map(float, curve.interval_SE[0, -1]))
        prefix = f"RL tape, {config.regime}, {name}, {seeds} seed{'s' * (seeds > 1)}"
        metrics.append(metric(f"{prefix}: held-out accuracy at the end", end.mean,
                              None, [end.low, end.high]))  # fmt: skip
        if outcome is not None and best is not None and name != OUTCOME:
            wanted, took = samples_to(outcome, best), samples_to(curve, best)
            metrics.append(metric(f"{prefix}: samples of outcome alone to its best, by its own",
                                  wanted / took if took else float("inf"), (">=", 5)))  # fmt: skip
            paired = min(seeds, len(outcome.accuracy_SE))
            gap = _over_seeds(curve.accuracy_SE[:paired, -1] - outcome.accuracy_SE[:paired, -1])
            between = None if paired == 1 else [gap.low, gap.high]
            metrics.append(metric(f"{prefix}: accuracy at the end minus that of outcome alone",
                                  gap.mean, (">=", 0.06), between))  # fmt: skip
        for seed in range(seeds):
            rows += [
                {"regime": config.regime, "arm": name, "seed": seed, "iteration": int(i),
                 "samples": int(n), "accuracy": round(float(a), 4), "steps": round(float(s), 2)}
                for i, n, a, s in zip(curve.iteration_E, curve.samples_E, curve.accuracy_SE[seed],
                                      curve.steps_SE[seed], strict=True)
            ]  # fmt: skip
    common = {
        "seeds": list(range(config.seeds)), "n_problems": problems, "machine": machine(),
        "date": date.today().isoformat(), "commit": commit(),
        "command": f"OMP_NUM_THREADS=1 python -m benchmarks.rl.tape --regime {config.regime} "
        f"--arms '[{', '.join(curves)}]' --seeds {config.seeds} "
        f"--iterations {config.iterations}",
    }  # fmt: skip
    target = RESULTS / f"rl_tape_{config.regime}.json"
    target.write_text(json_text([{**m, **common} for m in metrics]) + "\n")
    with target.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(curves, config, target.with_suffix(".png"))
    for m in metrics:
        print(f"{m['metric']}: {m['value']:.3f} {m['ci95'] or ''}")
    print(f"figures: {target}\nplot: {target.with_suffix('.png')}")


def draw(curves: dict[str, Curve], config: TapeRlConfig, target: Path) -> None:
    """Accuracy and steps per trace over iterations; samples stand at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for number, (name, curve) in enumerate(curves.items()):
        for ax, values_SE in zip(axes, (curve.accuracy_SE, curve.steps_SE), strict=True):
            ax.plot(curve.iteration_E, values_SE.mean(0), color=f"C{number}", label=name)
            ax.fill_between(curve.iteration_E, values_SE.min(0), values_SE.max(0),
                            color=f"C{number}", alpha=0.15, lw=0)  # fmt: skip
    axes[0].set_ylabel("held-out accuracy, one sample at T = 1")
    axes[1].set_ylabel("steps per training trace")
    any_curve = next(iter(curves.values()))
    per = any_curve.samples_E[-1] / max(1.0, any_curve.iteration_E[-1])
    for ax in axes:
        ax.set_xlabel("iterations")
        top = ax.secondary_xaxis("top", functions=(lambda x: x * per, lambda x: x / per))
        top.set_xlabel("samples")
    axes[0].legend(fontsize=8)
    shown = "one seed" if config.seeds == 1 else f"mean and range of {config.seeds} seeds"
    figure.suptitle(f"Online RL on the tape, {config.regime} start: {shown}")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    run(tape, TapeRlConfig, "benchmarks.rl.tape")
