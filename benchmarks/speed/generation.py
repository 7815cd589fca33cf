"""Generation speed of label runs: ``OMP_NUM_THREADS=1 python -m benchmarks.speed.generation``.

In one process, on one engine and on the same requests (ids, sampler, seeds), by turns:

``data_gen``
    what ``data_gen.rollouts`` does once its engine is loaded: breadth-first rounds, grading,
    journal, sealed tables.
``raw vLLM``
    every request given to vLLM at once.
``usual loop``
    one problem at a time, one generate call per prefix: the solution, then its prefixes, each
    with its ``n_mc`` samples. On the first problems only; its rate does not depend on how many.

Ratios are means over turns with t intervals, each turn's of its own rates. Seconds are those of the
clock and those of the processor. With one thread on a CPU the ratio of the latter is what an idle
machine shows by the clock, also where other work shares the machine. Tokens per step say how full
the engine is.
Writes ``benchmarks/results/speed_generation.{json,csv,png}``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from benchmarks.speed.results import metric, result, write
from data_gen.config import RolloutsConfig
from data_gen.engines import loaded
from data_gen.labeler import Labeler, PlannedTrace, RolloutPolicy, label
from data_gen.rollouts import _rounds as rounds_of
from data_gen.store import Store
from data_gen.strategies import Plan
from pav.cli.run import run
from pav.core.seeds import seed_of
from pav.engine.loading import EngineConfig
from pav.engine.vllm import VllmEngine
from pav.grading.sandbox import GuardedGrader
from pav.labels.tables import prefix_key, prefixes
from pav.policy.policy import PolicyConfig, Sampler, load_policy

SAMPLER = Sampler(max_length=160)
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.speed.generation"
# n_mc -> (times the usual loop, at least; solutions per problem).
CASES = {4: (8.0, 2), 16: (3.0, 1)}


@dataclass(frozen=True)
class GenerationConfig:
    """Generation speed of label runs.

    Args:
        policy: the base policy.
        problems: problems, two solutions of each at ``n_mc`` 4 and one at 16.
        usual_problems: problems of the usual loop at ``n_mc`` 4; at 16 half of them.
        turns: how often each way is measured.
        engine: device settings.
    """

    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig("pav:base"))
    problems: int = 256
    usual_problems: int = 8
    turns: int = 5
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class Call:
    """Requests of one generate call of the usual loop: (most tokens, seed) of each sample."""

    problem: str
    ids: list[int]
    samples: list[tuple[int, int]]


@dataclass(frozen=True)
class Turn:
    """What one way made in one turn.

    Attributes:
        tokens: sampled.
        steps: of the engine.
        clock: seconds.
        cpu: processor seconds.
    """

    tokens: int
    steps: int
    clock: float
    cpu: float

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens per second of the clock and of the processor."""
        return self.tokens / self.clock, self.tokens / self.cpu


def generation(config: GenerationConfig) -> None:
    """Measure and write (see the module)."""
    rows: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    labels = RolloutsConfig(output="", policy=config.policy, sampler=SAMPLER, engine=config.engine)
    policies = [load_policy(config.policy, labels.task.step_rule)]
    with loaded(labels, policies) as rollout_policies:
        for n_mc, (least, n_traces) in CASES.items():
            labels = RolloutsConfig(
                output="", policy=config.policy, sampler=SAMPLER, validation_problems=0,
                n_mc=n_mc, n_traces=n_traces,
                problems=config.problems // 2 if n_traces == 1 else config.problems,
            )  # fmt: skip
            turns = _case(labels, rollout_policies[0], rounds_of(labels, policies), config)
            metrics += _metrics(n_mc, least, turns)
            rows += [
                {"n_mc": n_mc, "turn": i, "way": way, "tokens": turn.tokens, "steps": turn.steps,
                 "seconds": round(turn.clock, 2), "cpu_seconds": round(turn.cpu, 2)}
                for i, ways in enumerate(turns) for way, turn in ways.items()
            ]  # fmt: skip
    write("generation", metrics, rows, [0], config.problems, COMMAND)
    _plot(rows, result("generation", "png"))


def _case(
    labels: RolloutsConfig,
    rollout_policy: RolloutPolicy,
    rounds: list[list[PlannedTrace]],
    config: GenerationConfig,
) -> list[dict[str, Turn]]:
    engine = rollout_policy.engine
    assert isinstance(engine, VllmEngine)
    first = {seed.problem.id for seed in rounds[0][: config.usual_problems * len(rounds) // 2]}
    turns = []
    for number in range(config.turns):
        ways = {}
        with TemporaryDirectory() as name, Store(Path(name), {}) as store:
            labeler = Labeler(
                GuardedGrader(labels.task), [rollout_policy], labels.plan, labels.seed, store
            )

            def work(labeler: Labeler = labeler, store: Store = store) -> int:
                before = engine.usage.generated
                label(labeler, rounds, labels.concurrency)
                store.seal({rollout_policy.name: ""})
                return engine.usage.generated - before

            ways["data_gen"] = _time(engine, work)
            calls = _calls(labels.plan, labeler, rollout_policy, rounds)
            asked = sum(len(call.samples) for call in calls)
            if asked != len(store.traces) + len(store.completions):
                raise RuntimeError("raw vLLM would not be given the requests of the label run")
        own = [call for call in calls if call.problem in first]
        ways["raw vLLM"] = _time(engine, partial(_raw, engine, rollout_policy, calls))
        ways["usual loop"] = _time(engine, partial(_one_by_one, engine, rollout_policy, own))
        turns.append(ways)
        for way, turn in ways.items():
            print(
                f"n_mc {labels.n_mc} turn {number} {way}: {turn.rates[0]:.0f} tokens/s, "
                f"{turn.rates[1]:.0f} by the processor, {turn.tokens / turn.steps:.0f} a step"
            )
    return turns


def _time(engine: VllmEngine, work: Callable[[], int]) -> Turn:
    engine.start()
    engine.reset_prefix_cache()
    inner, steps = engine._engine.step, 0

    def step() -> Any:
        nonlocal steps
        steps += 1
        return inner()

    engine._engine.step = step
    clock, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    engine._engine.step = inner
    return Turn(tokens, steps, clock, cpu)


def _calls(
    plan: Plan, labeler: Labeler, rollout_policy: RolloutPolicy, rounds: list[list[PlannedTrace]]
) -> list[Call]:
    """The requests that a label run made, in the order of the usual loop within a round."""
    most, name, seen = rollout_policy.sampler.max_length, rollout_policy.name, set()
    calls = []
    for seed in (seed for seeds in rounds for seed in seeds):
        prompt, pid = rollout_policy.policy.encode(seed.problem), seed.problem.id
        key = prefix_key(pid, [])
        number = seed_of(labeler.seed, "seed", name, key, seed.index)
        calls.append(Call(pid, prompt, [(most - len(prompt), number)]))
        for prefix in prefixes(labeler.store.traces[seed.trace_id]):
            key, ids = prefix_key(pid, prefix), prompt + prefix
            if key in seen or len(ids) >= most:
                continue
            seen.add(key)
            numbers = [seed_of(labeler.seed, "rollout", name, key, i) for i in range(plan.n_mc)]
            calls.append(Call(pid, ids, [(most - len(ids), number) for number in numbers]))
    return calls


def _one_by_one(engine: VllmEngine, rollout_policy: RolloutPolicy, calls: Sequence[Call]) -> int:
    """Tokens of the calls, each when the one before has ended."""
    return sum(_raw(engine, rollout_policy, [call]) for call in calls)


def _raw(engine: VllmEngine, rollout_policy: RolloutPolicy, calls: Sequence[Call]) -> int:
    """Tokens that vLLM makes of ``calls``, all given at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    vllm, number, tokens = engine._engine, 0, 0
    for call in calls:
        for most, seed in call.samples:
            parameters = SamplingParams(
                temperature=rollout_policy.sampler.temperature,
                top_p=rollout_policy.sampler.top_p,
                top_k=rollout_policy.sampler.top_k,
                seed=seed,
                max_tokens=most,
                stop_token_ids=sorted(rollout_policy.policy.stepper.eos_ids),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            vllm.add_request(f"raw {number}", {"prompt_token_ids": call.ids}, parameters)
            number += 1
    while vllm.has_unfinished_requests():
        tokens += sum(len(o.outputs[0].token_ids) for o in vllm.step() if o.finished)
    return tokens


def _metrics(n_mc: int, least: float, turns: list[dict[str, Turn]]) -> list[dict[str, Any]]:
    out = []
    for i, by in enumerate(("clock", "processor")):
        for name, over, under, target in (
            ("data_gen.rollouts over raw vLLM", "data_gen", "raw vLLM", (">=", 0.95)),
            ("data_gen.rollouts over the usual loop", "data_gen", "usual loop", (">=", least)),
            ("ceiling: raw vLLM over the usual loop", "raw vLLM", "usual loop", None),
        ):
            ratios = [t[over].rates[i] / t[under].rates[i] for t in turns]
            value, ci95 = mean_and_interval(ratios)
            title = f"{name}, tokens/s, n_mc {n_mc}, by the {by}"
            out.append(metric(title, value, target, ci95))
    return out


def mean_and_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and 95% t interval; no interval of one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    half = float(
        student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    )
    return mean, (mean - half, mean + half)


def _plot(rows: Sequence[dict[str, Any]], target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, (n_mc, way) in enumerate(dict.fromkeys((r["n_mc"], r["way"]) for r in rows)):
        own = [r for r in rows if (r["n_mc"], r["way"]) == (n_mc, way)]
        rates = [r["tokens"] / r["cpu_seconds"] for r in own]
        axes.bar(i, np.mean(rates), color="0.8")
        axes.plot([i] * len(rates), rates, "k.", ms=4)
        axes.annotate(f"{np.mean(rates):.0f}", (i, 0), (0, 3), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    names = dict.fromkeys(f"{row['way']}\nn_mc {row['n_mc']}" for row in rows)
    axes.set_xticks(range(len(names)), list(names), fontsize=8)
    axes.set_ylabel("tokens per processor second\n(a dot is a turn)")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    run(generation, GenerationConfig, "benchmarks.speed.generation")
