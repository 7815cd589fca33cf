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

import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from scipy.stats import t as student

from benchmarks.rl.runs import rows_of, run_once, write_rows
from benchmarks.speed.results import commit, machine, metric
from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text

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


# Iterations whose fresh samples are taken together, and those at the end of a run.
BLOCK, LAST = 5, 10


@dataclass(frozen=True)
class Curve:
    """What an arm's runs say. S seeds, I iterations, E evaluations.

    Attributes:
        samples: traces of an iteration.
        right_SI: share of right ones among an iteration's: the policy's before its update, on
            problems that it has not seen.
        steps_SI: steps of them.
        iteration_E: iterations behind each evaluation.
        accuracy_SE: held-out accuracy of every seed.
    """

    samples: int
    right_SI: Array
    steps_SI: Array
    iteration_E: Array
    accuracy_SE: Array


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
    """Of the seeds whose runs are there, as far as all of them are."""
    runs = [rows_of(_directory(config, name, seed)) for seed in range(config.seeds)]
    trained = [[row for row in rows if "train/accuracy" in row] for rows in runs if rows]
    if not trained:
        return None
    evaluations = [[row for row in rows if "accuracy" in row] for rows in runs if rows]
    count, kept = min(map(len, trained)), min(map(len, evaluations))

    def table(rows_S: list[list[dict[str, Any]]], key: str, size: int) -> Array:
        return np.array([[row[key] for row in rows[:size]] for rows in rows_S])

    return Curve(
        int(trained[0][0]["samples"]),
        table(trained, "train/accuracy", count),
        table(trained, "train/steps", count),
        table(evaluations[:1], "iteration", kept)[0],
        table(evaluations, "accuracy", kept),
    )


def blocks(values_SI: Array) -> Array:
    """Means (S, B) of every five iterations."""
    count = values_SI.shape[1] // BLOCK
    return np.asarray(values_SI[:, : count * BLOCK].reshape(len(values_SI), count, BLOCK).mean(2))


def samples_to(curve: Curve, accuracy: float) -> float:
    """Samples after which the mean over seeds, in blocks of five iterations, first is as high as
    ``accuracy``; infinite if it never is.
    """
    reached = np.flatnonzero(blocks(curve.right_SI).mean(0) >= accuracy)
    return float((reached[0] + 1) * BLOCK * curve.samples) if len(reached) else float("inf")


def over_seeds(values_S: Array) -> tuple[float, list[float] | None]:
    """Mean and 95% interval (Student's t) over seeds; no interval of one."""
    mean, seeds = float(values_S.mean()), len(values_S)
    if seeds == 1:
        return mean, None
    half = float(student.ppf(0.975, seeds - 1) * values_S.std(ddof=1) / np.sqrt(seeds))
    return mean, [mean - half, mean + half]


def _report(config: TapeRlConfig, curves: dict[str, Curve], problems: int) -> None:
    rows, metrics = [], []
    outcome = curves.get(OUTCOME)
    best = None if outcome is None else float(blocks(outcome.right_SI).mean(0).max())
    for name, curve in curves.items():
        late_S = curve.right_SI[:, -LAST:].mean(1)
        seeds, iterations = curve.right_SI.shape
        prefix = f"RL tape, {config.regime}, {name}, {seeds} seed{'s' * (seeds > 1)}"
        what = f"right of fresh samples in the last {LAST} of {iterations} iterations"
        metrics.append(metric(f"{prefix}: {what}", *_placed(over_seeds(late_S))))
        held_out = over_seeds(curve.accuracy_SE[:, -1])
        metrics.append(metric(f"{prefix}: held-out accuracy at the end", *_placed(held_out)))
        if outcome is not None and best is not None and name != OUTCOME:
            ratio = samples_to(outcome, best) / samples_to(curve, best)
            said = (
                "samples of outcome alone to its best five iterations, by its own to as good ones"
            )
            metrics.append(metric(f"{prefix}: {said}", ratio, (">=", 5)))
            paired = min(seeds, len(outcome.right_SI))
            gap_S = late_S[:paired] - outcome.right_SI[:paired, -LAST:].mean(1)
            gap, between = over_seeds(gap_S)
            said = f"right in the last {LAST} iterations minus outcome alone"
            metrics.append(metric(f"{prefix}: {said}", gap, (">=", 0.06), between))
        right_SB, steps_SB = blocks(curve.right_SI), blocks(curve.steps_SI)
        rows += [
            {"regime": config.regime, "arm": name, "seed": seed, "iterations": (b + 1) * BLOCK,
             "samples": (b + 1) * BLOCK * curve.samples,
             "right": round(float(right_SB[seed, b]), 4),
             "steps": round(float(steps_SB[seed, b]), 2)}
            for seed in range(seeds) for b in range(right_SB.shape[1])
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
    write_rows(rows, target.with_suffix(".csv"))
    if tries := _tries(config, list(curves)):
        write_rows(tries, RESULTS / f"rl_tape_{config.regime}_tries.csv")
    draw(curves, config, target.with_suffix(".png"))
    for m in metrics:
        print(f"{m['metric']}: {m['value']:.3f} {m['ci95'] or ''}")
    print(f"figures: {target}\nplot: {target.with_suffix('.png')}")


def _placed(found: tuple[float, list[float] | None]) -> tuple[float, None, list[float] | None]:
    """Without a target."""
    return found[0], None, found[1]


def _tries(config: TapeRlConfig, names: list[str]) -> list[dict[str, Any]]:
    """What every try of an arm came to."""
    plan = yaml.safe_load(ARMS.read_text())["tries"]
    found = []
    for name in names:
        for number, changes in enumerate(plan.get(name, [])):
            if rows := rows_of(_try_directory(config, name, number)):
                found.append({"regime": config.regime, "arm": name, "try": number,
                              "changes": json_text(changes, None),
                              "right": round(_late(rows), 4)})  # fmt: skip
    return found


def draw(curves: dict[str, Curve], config: TapeRlConfig, target: Path) -> None:
    """Right samples, held-out accuracy and steps over iterations; samples stand at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for number, (name, curve) in enumerate(curves.items()):
        right_SB, steps_SB = blocks(curve.right_SI), blocks(curve.steps_SI)
        middle_B = (np.arange(right_SB.shape[1]) + 0.5) * BLOCK
        shown = ((middle_B, right_SB), (curve.iteration_E, curve.accuracy_SE), (middle_B, steps_SB))
        for ax, (x, values_S) in zip(axes, shown, strict=True):
            ax.plot(x, values_S.mean(0), "o-", ms=3, color=f"C{number}", label=name)
            ax.fill_between(x, values_S.min(0), values_S.max(0),
                            color=f"C{number}", alpha=0.15, lw=0)  # fmt: skip
    axes[0].set_ylabel(f"right of fresh samples, {BLOCK} iterations at a time")
    axes[1].set_ylabel("held-out accuracy, one sample at T = 1")
    axes[2].set_ylabel("steps per training trace")
    per = next(iter(curves.values())).samples
    for ax in axes:
        ax.set_xlabel("iterations")
        top = ax.secondary_xaxis("top", functions=(lambda x: x * per, lambda x: x / per))
        top.set_xlabel("samples")
    axes[0].legend(fontsize=8)
    said = "one seed" if config.seeds == 1 else f"mean and range of {config.seeds} seeds"
    figure.suptitle(f"Online RL on the tape, {config.regime} start: {said}")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    run(tape, TapeRlConfig, "benchmarks.rl.tape")
