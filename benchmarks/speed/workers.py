"""Two workers against one process: ``OMP_NUM_THREADS=1 python -m benchmarks.speed.workers``.

Makes the same label run with the engine in this process and with two workers on this machine, by
turns, once models are loaded; needs two free cores. The requests are the same. vLLM's rounding
depends on what else is in a batch, so that a sampled token may differ: it is counted how often, and
whether success rates agree. Writes ``benchmarks/results/speed_workers.{json,csv,png}``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scipy.stats import beta, norm

from benchmarks.speed.generation import mean_and_interval
from benchmarks.speed.results import metric, result, write
from data_gen.config import RolloutsConfig
from data_gen.engines import loaded
from data_gen.labeler import Labeler, RolloutPolicy, label
from data_gen.rollouts import _rounds as rounds_of
from data_gen.store import Store
from pav.cli.run import run
from pav.engine.remote import RemoteEngine
from pav.grading.sandbox import GuardedGrader
from pav.labels.tables import Completion, Trace, prefix_key
from pav.policy.policy import PolicyConfig, Sampler, load_policy

SAMPLER = Sampler(max_length=160)
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.speed.workers"


@dataclass(frozen=True)
class WorkersConfig:
    """Two workers against one process.

    Args:
        policy: the base policy.
        problems: problems, two solutions each, four rollouts per prefix.
        workers: workers to compare with one process.
        turns: how often each is measured.
    """

    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig("pav:base"))
    problems: int = 256
    workers: int = 2
    turns: int = 3


@dataclass(frozen=True)
class Made:
    """A label run.

    Attributes:
        traces: its solutions.
        completions: its rollouts.
        tokens: sampled.
        seconds: by the clock, model loading left out.
    """

    traces: list[Trace]
    completions: list[Completion]
    tokens: int
    seconds: float

    @property
    def answers(self) -> dict[tuple[str, str, int], list[int]]:
        """Sampled ids by request; solutions stand at index -1 - seed index."""
        found = {(c.prefix_key, c.policy, c.index): c.ids for c in self.completions}
        for t in self.traces:
            found[prefix_key(t.problem_id, []), t.policy, -1 - t.seed_index] = t.ids
        return found


def workers(config: WorkersConfig) -> None:
    """Measure and write (see the module)."""
    one = RolloutsConfig(
        output="", policy=config.policy, sampler=SAMPLER, problems=config.problems,
        validation_problems=0,
        n_traces=2, n_mc=4, dry_run=True,
    )  # fmt: skip
    policies = [load_policy(config.policy, one.task.step_rule)]
    two = replace(one, workers=config.workers)
    turns: list[tuple[Made, Made]] = []
    # Engine of this process and workers at once: who is not asked takes no core.
    with loaded(one, policies) as here, loaded(two, policies) as there:
        _wait(there[0])
        for number in range(config.turns):
            turns.append((_made(one, here), _made(two, there)))
            for made in turns[-1]:
                print(f"turn {number}: {made.tokens} tokens in {made.seconds:.1f} s")
    metrics = _metrics(config, turns)
    rows = [
        {"turn": i, "workers": n, "traces": len(made.traces), "rollouts": len(made.completions),
         "right": sum(c.correct for c in made.completions), "tokens": made.tokens,
         "seconds": round(made.seconds, 2)}
        for i, pair in enumerate(turns) for n, made in zip((1, config.workers), pair, strict=True)
    ]  # fmt: skip
    write("workers", metrics, rows, [one.seed], config.problems, COMMAND)
    _plot(rows, result("workers", "png"))


def _wait(rollout_policy: RolloutPolicy) -> None:
    """Until all workers have loaded their models."""
    engine = rollout_policy.engine
    assert isinstance(engine, RemoteEngine)
    while any("starting" in line for line in engine.lines):
        engine.step()


def _made(config: RolloutsConfig, rollout_policies: list[RolloutPolicy]) -> Made:
    engine = rollout_policies[0].engine
    if not isinstance(engine, RemoteEngine):  # workers keep a few blocks of the turn before
        engine.start()
        engine.reset_prefix_cache()
    rounds = rounds_of(config, [rollout_policy.policy for rollout_policy in rollout_policies])
    with TemporaryDirectory() as name, Store(Path(name), {}) as store:
        labeler = Labeler(
            GuardedGrader(config.task), rollout_policies, config.plan, config.seed, store
        )
        before, started = engine.usage.generated, time.perf_counter()
        label(labeler, rounds, config.concurrency * config.workers)
        seconds = time.perf_counter() - started
        tokens = engine.usage.generated - before
        return Made([*store.traces.values()], [*store.completions.values()], tokens, seconds)


def _metrics(config: WorkersConfig, turns: list[tuple[Made, Made]]) -> list[dict[str, Any]]:
    names = f"{config.workers} workers against one process"
    rates = [(a.tokens / a.seconds, b.tokens / b.seconds) for a, b in turns]
    speed, ci95 = mean_and_interval([b / a for a, b in rates])
    one, two = turns[0]
    answers = one.answers, two.answers
    # A solution that differs has other prefixes: what only one run asked for is left out.
    both = answers[0].keys() & answers[1].keys()
    n, different = len(both), sum(answers[0][key] != answers[1][key] for key in both)
    low = float(beta.ppf(0.025, different, n - different + 1)) if different else 0.0
    high = float(beta.ppf(0.975, different + 1, n - different))
    alone = len(answers[0].keys() ^ answers[1].keys())
    (k1, n1), (k2, n2) = (
        (sum(c.correct for c in made.completions), len(made.completions)) for made in (one, two)
    )
    pooled = (k1 + k2) / (n1 + n2)
    z = (k1 / n1 - k2 / n2) / (pooled * (1 - pooled) * (1 / n1 + 1 / n2)) ** 0.5
    return [
        metric(f"{names}: tokens/s, ratio ({config.workers} cores)", speed, None, ci95),
        metric(f"{names}: share of samples that differ", different / n, ("<=", 0.001), (low, high)),
        metric(f"{names}: requests that only one of them made, share", alone / (n + alone)),
        metric(f"{names}: |z| of the rollouts' success rates", abs(z),
               ("<=", float(norm.ppf(0.975)))),
    ]  # fmt: skip


def _plot(rows: Sequence[dict[str, Any]], target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, n in enumerate(dict.fromkeys(row["workers"] for row in rows)):
        rates = [row["tokens"] / row["seconds"] for row in rows if row["workers"] == n]
        axes.bar(i, sum(rates) / len(rates), color="0.8")
        axes.plot([i] * len(rates), rates, "k.", ms=4)
    axes.set_xticks([0, 1], ["one process", f"{rows[-1]['workers']} workers"])
    axes.set_ylabel("tokens/s (a dot is a turn)")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    run(workers, WorkersConfig, "benchmarks.speed.workers")
