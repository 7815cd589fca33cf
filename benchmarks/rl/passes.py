"""What policies solve after RL on the tape, in N tries: ``python -m benchmarks.rl.passes``.

Reads the policies that ``benchmarks.rl.tape`` left. Of every test problem each policy draws as many
solutions, the start twice as many. Reports pass@N, the share of right solutions that are *sound*
(no line of them is wrong: an answer of two digits is right by luck in 1% of the wrong ones), and of
the problems that the start never solved the share that each policy solves. Writes
``rl_tape_<regime>_passes.json``, ``.csv`` and ``.png`` to ``benchmarks/results``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.rl.runs import write_rows
from benchmarks.rl.tape import ARMS, RESULTS
from benchmarks.speed.results import commit, machine, metric
from pav.cli.run import run
from pav.core.advantage import best_of_k_from_counts
from pav.core.errors import UserError
from pav.core.files import json_text
from pav.core.statistics import bootstrap
from pav.engine.vllm import VllmEngine
from pav.grading.sandbox import GuardedGrader
from pav.policy.policy import PolicyConfig, Sampler, load_policy
from pav.rl.chain import Tags
from pav.rl.references import References
from pav.rl.rollout import Actor, rollout
from pav.tasks.tape import Tape

LENGTH = 160


@dataclass(frozen=True)
class PassesConfig:
    """pass@N of policies after RL.

    Args:
        regime: which start.
        runs: where ``benchmarks.rl.tape`` left its runs.
        arms: whose policies.
        seed: of those runs.
        problems: test problems.
        samples: of each.
    """

    regime: Literal["dense", "rare"] = "rare"
    runs: str = "runs/rl_tape"
    arms: tuple[str, ...] = ("outcome", "record", "pav_base")
    seed: int = 0
    problems: int = 100
    samples: int = 128


@dataclass(frozen=True)
class Solved:
    """Counts (P,) of right and of sound solutions of each problem, of ``n`` drawn."""

    right_P: NDArray[np.int64]
    sound_P: NDArray[np.int64]
    n: int


def passes(config: PassesConfig) -> None:
    """Sample and report (see the module)."""
    start = yaml.safe_load(ARMS.read_text())["starts"][config.regime].get("init", "pav:base")
    paths = {"start": start}
    for arm in config.arms:
        path = Path(config.runs) / config.regime / arm / f"seed{config.seed}" / "last"
        if not (path / "config.json").exists():
            raise UserError(f"no policy at {str(path)!r}; run benchmarks.rl.tape first")
        paths[arm] = str(path)
    found = {
        name: _solved(path, config.problems, config.samples * (1 + (name == "start")))
        for name, path in paths.items()
    }
    _report(config, found)


def _solved(path: str, problems: int, samples: int) -> Solved:
    task = Tape()
    policy = load_policy(PolicyConfig(path), task.step_rule)
    references = References(policy, task, Tags(*task.answer_tags), 0)
    engine = VllmEngine(policy.path, "float32", LENGTH, trained=True)
    asked = list(islice(task.problems("test"), problems))
    with GuardedGrader(task) as grader:
        engine.start()
        actor = Actor(engine, policy, Sampler(max_length=LENGTH), grader, references, 0)
        traces = rollout(actor, asked, samples, ("passes",), 0)
        engine.shutdown()
    right, sound = [], []
    for trace in traces:
        steps = [policy.text(trace.ids[a:b]) for a, b in pairwise([0, *trace.ends])]
        right.append(trace.correct)
        sound.append(trace.correct and not any(task.slips(steps, trace.problem)))
    print(f"{path}: {np.mean(right):.4f} right, {np.mean(sound):.4f} sound", flush=True)
    return Solved(
        np.array(right, dtype=int).reshape(problems, -1).sum(1),
        np.array(sound, dtype=int).reshape(problems, -1).sum(1),
        samples,
    )


def _report(config: PassesConfig, found: dict[str, Solved]) -> None:
    tries = [2**k for k in range(config.samples.bit_length()) if 2**k <= config.samples]
    start = found["start"]
    rows: list[dict[str, Any]] = []
    metrics = []
    for name, solved in found.items():
        for what, count_P in (("right", solved.right_P), ("sound", solved.sound_P)):
            never_P = (start.right_P if what == "right" else start.sound_P) == 0
            for n in tries:
                each_P = best_of_k_from_counts(count_P, solved.n, n)
                interval = bootstrap(each_P[:, None])
                rows.append({"regime": config.regime, "policy": name, "what": what, "tries": n,
                             "share": round(interval.mean, 4), "low": round(interval.low, 4),
                             "high": round(interval.high, 4)})  # fmt: skip
                if n in (1, 8, config.samples):
                    label = f"RL tape, {config.regime}, {name}: pass@{n}, {what}"
                    bounds = [interval.low, interval.high]
                    metrics.append(metric(label, interval.mean, None, bounds))
            if name != "start" and never_P.any():
                new = bootstrap((count_P[never_P] > 0).astype(float)[:, None])
                said = f"never {what} of {start.n} at the start, share solved in {solved.n}"
                metrics.append(metric(f"RL tape, {config.regime}, {name}: {said} "
                                      f"({int(never_P.sum())} problems)", new.mean, None,
                                      [new.low, new.high]))  # fmt: skip
    common = {
        "seeds": [config.seed], "n_problems": config.problems, "machine": machine(),
        "date": date.today().isoformat(), "commit": commit(),
        "command": f"python -m benchmarks.rl.passes --regime {config.regime} --problems "
        f"{config.problems} --samples {config.samples}",
    }  # fmt: skip
    target = RESULTS / f"rl_tape_{config.regime}_passes.json"
    target.write_text(json_text([{**m, **common} for m in metrics]) + "\n")
    write_rows(rows, target.with_suffix(".csv"))
    draw(rows, config, target.with_suffix(".png"))
    for m in metrics:
        print(f"{m['metric']}: {m['value']:.3f} {m['ci95'] or ''}")
    print(f"figures: {target}\nplot: {target.with_suffix('.png')}")


def draw(rows: list[dict[str, Any]], config: PassesConfig, target: Path) -> None:
    """pass@N of right and of sound solutions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["policy"] for row in rows))
    for ax, what in zip(axes, ("right", "sound"), strict=True):
        for number, name in enumerate(names):
            own = [row for row in rows if row["policy"] == name and row["what"] == what]
            x = [row["tries"] for row in own]
            ax.plot(x, [row["share"] for row in own], "o-", ms=3, color=f"C{number}", label=name)
            ax.fill_between(x, [row["low"] for row in own], [row["high"] for row in own],
                            color=f"C{number}", alpha=0.12, lw=0)  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xlabel("tries")
        ax.set_title("a right answer" if what == "right" else "a right answer, every line right")
    axes[0].set_ylabel(f"share of {config.problems} test problems (95% over problems)")
    axes[0].legend(fontsize=8)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    run(passes, PassesConfig, "benchmarks.rl.passes")
