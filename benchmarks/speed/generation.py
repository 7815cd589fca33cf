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

Seconds are those of the clock and those of the processor. With one thread on a CPU the ratio of the
latter is what an idle machine shows by the clock, also where other work shares the machine.
Writes ``benchmarks/results/speed_generation.{json,csv,png}``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.speed.results import RESULTS, metric, write
from data_gen.label import Labeler, Roller, Seed, label
from data_gen.rollouts import RolloutsConfig, loaded
from data_gen.rollouts import _rounds as rounds_of
from data_gen.store import Store
from data_gen.strategies import Plan, prefixes
from pav.cli import run
from pav.engine import Engine, EngineConfig, seed_of
from pav.labels import prefix_key
from pav.policy import PolicyConfig, load_policy

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.speed.generation"
# n_mc -> (times the usual loop, at least; solutions per problem).
CASES = {4: (8.0, 2), 16: (3.0, 1)}


@dataclass(frozen=True)
class GenerationConfig:
    """Generation speed of label runs.

    Args:
        policy: the base policy.
        problems: problems at ``n_mc`` 4; at 16 there are a quarter of them.
        usual_problems: problems of the usual loop.
        turns: how often each way is measured at ``n_mc`` 4; once at 16.
        engine: device settings.
    """

    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig("pav:base"))
    problems: int = 64
    usual_problems: int = 3
    turns: int = 2
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class Call:
    """Requests of one generate call of the usual loop: (most tokens, seed) of each sample."""

    problem: str
    ids: list[int]
    samples: list[tuple[int, int]]


@dataclass
class Speed:
    """What one way made in how many seconds, summed over its turns."""

    tokens: int = 0
    clock: float = 0.0
    cpu: float = 0.0

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens per second of the clock and of the processor."""
        return self.tokens / self.clock, self.tokens / self.cpu


def generation(config: GenerationConfig) -> None:
    """Measure and write (see the module)."""
    rows: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    labels = RolloutsConfig(output="", policy=config.policy, engine=config.engine)
    policies = [load_policy(config.policy, labels.task.step_rule)]
    with loaded(labels, policies) as rollers:
        for n_mc, (least, n_seeds) in CASES.items():
            few = n_mc > min(CASES)
            labels = RolloutsConfig(
                output="", policy=config.policy, validation_problems=0, n_mc=n_mc, n_seeds=n_seeds,
                problems=config.problems // 4 if few else config.problems,
            )  # fmt: skip
            rounds = rounds_of(labels, policies)
            speeds = _case(labels, rollers[0], rounds, config, 1 if few else config.turns)
            metrics += _metrics(n_mc, least, speeds)
            for way, speed in speeds.items():
                rows.append(
                    {"n_mc": n_mc, "way": way, "tokens": speed.tokens,
                     "seconds": round(speed.clock, 2), "cpu_seconds": round(speed.cpu, 2)}
                )  # fmt: skip
                print(rows[-1])
    write("generation", metrics, rows, [0], config.problems, COMMAND)
    _plot(rows, RESULTS / "speed_generation.png")


def _case(
    labels: RolloutsConfig,
    roller: Roller,
    rounds: list[list[Seed]],
    config: GenerationConfig,
    turns: int,
) -> dict[str, Speed]:
    engine = roller.engine
    assert isinstance(engine, Engine)
    speeds = {"data_gen": Speed(), "raw vLLM": Speed(), "usual loop": Speed()}
    for _ in range(turns):
        with TemporaryDirectory() as name, Store(Path(name), {}) as store:
            labeler = Labeler(labels.task, [roller], labels.plan, labels.seed, store)

            def work(labeler: Labeler = labeler, store: Store = store) -> int:
                before = engine.usage.generated
                label(labeler, rounds, labels.concurrency)
                store.seal({roller.name: ""})
                return engine.usage.generated - before

            _time(speeds["data_gen"], engine, work)
            calls = _calls(labels.plan, labeler, roller, rounds)
        _time(speeds["raw vLLM"], engine, lambda calls=calls: _raw(engine, roller, calls))
    first = {seed.problem.id for seed in rounds[0][: config.usual_problems]}
    own = [call for call in calls if call.problem in first]
    _time(speeds["usual loop"], engine, lambda: sum(_raw(engine, roller, [call]) for call in own))
    return speeds


def _time(speed: Speed, engine: Engine, work: Callable[[], int]) -> None:
    engine.reset_prefix_cache()
    clock, cpu = time.perf_counter(), time.process_time()
    speed.tokens += work()
    speed.clock += time.perf_counter() - clock
    speed.cpu += time.process_time() - cpu


def _calls(plan: Plan, labeler: Labeler, roller: Roller, rounds: list[list[Seed]]) -> list[Call]:
    """The requests that a label run made, in the order of the usual loop within a round."""
    most, name, seen = roller.sampler.max_length, roller.name, set()
    calls = []
    for seed in (seed for seeds in rounds for seed in seeds):
        prompt, pid = roller.policy.encode(seed.problem), seed.problem.id
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


def _raw(engine: Engine, roller: Roller, calls: Sequence[Call]) -> int:
    """Tokens that vLLM makes of ``calls``, all given at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    vllm, number, tokens = engine._engine, 0, 0
    for call in calls:
        for most, seed in call.samples:
            parameters = SamplingParams(
                temperature=roller.sampler.temperature,
                top_p=roller.sampler.top_p,
                top_k=roller.sampler.top_k,
                seed=seed,
                max_tokens=most,
                stop_token_ids=sorted(roller.policy.stepper.eos_ids),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            vllm.add_request(f"raw {number}", {"prompt_token_ids": call.ids}, parameters)
            number += 1
    while vllm.has_unfinished_requests():
        tokens += sum(len(o.outputs[0].token_ids) for o in vllm.step() if o.finished)
    return tokens


def _metrics(n_mc: int, least: float, speeds: dict[str, Speed]) -> list[dict[str, Any]]:
    ours, raw, usual = (speeds[way].rates for way in ("data_gen", "raw vLLM", "usual loop"))
    out = []
    for i, by in enumerate(("clock", "processor")):
        at = f"n_mc {n_mc}, by the {by}"
        out += [
            metric(f"data_gen.rollouts over raw vLLM, tokens/s, {at}", ours[i] / raw[i],
                   (">=", 0.95)),
            metric(f"data_gen.rollouts over the usual loop, tokens/s, {at}", ours[i] / usual[i],
                   (">=", least)),
            metric(f"ceiling: raw vLLM over the usual loop, tokens/s, {at}", raw[i] / usual[i]),
        ]  # fmt: skip
    return out


def _plot(rows: Sequence[dict[str, Any]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['way']}\nn_mc {row['n_mc']}" for row in rows]
    axes.bar(names, [row["tokens"] / row["cpu_seconds"] for row in rows])
    axes.tick_params(labelsize=8)
    axes.set_ylabel("tokens per processor second")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    run(generation, GenerationConfig, "benchmarks.speed.generation")
