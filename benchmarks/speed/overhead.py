"""What the process that leads workers costs, and how many it can feed.

    data_gen.rollouts --policy pav:base ... --output runs/speed/one
    OMP_NUM_THREADS=1 python -m benchmarks.speed.overhead

Makes a finished label run once more, with its samples looked up in place of sampled, on processor
time: all work of the leading process (rounds, grading, journal), once with the samples in the same
process and once with 64 workers behind the queue, whose own work is not counted. The difference is
what the queue costs. Writes ``benchmarks/results/speed_overhead.{json,csv}``.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.speed.results import metric, write
from data_gen.label import Labeler, Roller, Seed, label
from data_gen.pool import Call, Finished, Message, Model, Pool, Started
from data_gen.runs import Run, base_policy, read_run, task_of
from data_gen.store import Store
from data_gen.strategies import plan_of
from pav.cli import run
from pav.engine import EngineConfig, Sampled, Usage, seed_of
from pav.labels import prefix_key
from pav.policy import Sampler
from pav.tasks.base import Problem

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.speed.overhead"
WORKERS = 64


@dataclass(frozen=True)
class OverheadConfig:
    """What the process that leads workers costs.

    Args:
        labels: a finished run of one policy, strategy all_prefixes.
        engine_tokens_per_second: of one worker alone on an idle machine; the length of the run's
            samples turns it into samples per second.
        turns: repeats.
    """

    labels: str = "runs/speed/one"
    engine_tokens_per_second: float = 9000.0
    turns: int = 3


def overhead(config: OverheadConfig) -> None:
    """Measure and write (see the module)."""
    made = read_run(config.labels)
    answers = _answers(made)
    rows = []
    for turn in range(config.turns):
        for workers in (0, WORKERS):
            rows.append({"turn": turn, "workers": workers, "labels": len(made.completions),
                         "cpu_seconds": _again(made, answers, workers)})  # fmt: skip
            print(rows[-1])
    best = {n: min(r["cpu_seconds"] for r in rows if r["workers"] == n) for n in (0, WORKERS)}
    samples = len(answers)
    per_worker = config.engine_tokens_per_second / (made.generated / samples)
    metrics = [
        metric("queue: processor seconds per 1000 labels",
               1000 * (best[WORKERS] - best[0]) / len(made.completions)),
        metric("leading process: processor seconds per 1000 labels, queue included",
               1000 * best[WORKERS] / len(made.completions)),
        metric(f"leading process: samples/s at which one core is full ({WORKERS} workers)",
               samples / best[WORKERS]),
        metric(f"leading process: workers of {config.engine_tokens_per_second:.0f} tokens/s "
               f"({per_worker:.0f} samples/s of the tape) that fill one core",
               samples / best[WORKERS] / per_worker),
    ]  # fmt: skip
    problems = len({t.problem_id for t in made.traces.values()})
    write("overhead", metrics, rows, [made.manifest["seed"]], problems, COMMAND)


def _answers(made: Run) -> dict[int, Sampled]:
    """Samples of a run by the seeds of their requests."""
    seed = made.manifest["seed"]
    found = {}
    for c in made.completions.values():
        number = seed_of(seed, "rollout", c.policy, c.prefix_key, c.index)
        found[number] = Sampled(c.ids, not c.truncated)
    for t in made.traces.values():
        number = seed_of(seed, "seed", t.policy, prefix_key(t.problem_id, []), t.seed_index)
        found[number] = Sampled(t.ids, not t.truncated)
    return found


def _again(made: Run, answers: dict[int, Sampled], workers: int) -> float:
    """Processor seconds of the leading process for the whole run."""
    task = task_of(made, None)
    policy = base_policy(made, task)
    sampler = Sampler(**made.manifest["sampler"])
    rounds: dict[int, list[Seed]] = {}
    for t in made.traces.values():
        assert t.split in ("train", "validation")
        seed = Seed(t.split, Problem(t.problem_id, t.question, t.gold), t.policy, t.seed_index)
        rounds.setdefault(t.seed_index, []).append(seed)
    transport = Looked(answers)
    engine: Any = Here(answers)
    if workers:
        model = Model(policy.path, policy.config.dtype, sampler.max_length, EngineConfig())
        engine = Pool(transport, [model], workers, None).engines[0]
    with TemporaryDirectory() as name, Store(Path(name), {}) as store:
        roller = Roller(policy, engine, sampler)
        labeler = Labeler(task, [roller], plan_of(made.manifest), made.manifest["seed"], store)
        started = time.process_time()
        label(labeler, [rounds[i] for i in sorted(rounds)], 256 * max(1, workers))
        seconds = time.process_time() - started - transport.seconds
        assert store.completions == made.completions
    return seconds


@dataclass
class Here:
    """An engine of this process that knows all answers."""

    answers: dict[int, Sampled]
    usage: Usage = field(default_factory=Usage)
    waiting: list[tuple[asyncio.Future[Sampled], Sampled]] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def step(self) -> None:
        for future, answer in self.waiting:
            future.set_result(answer)
        self.waiting.clear()

    async def sample(self, ids: Sequence[int], sampler: Sampler, **call: Any) -> Sampled:
        future: asyncio.Future[Sampled] = asyncio.get_running_loop().create_future()
        self.waiting.append((future, self.answers[call["seed"]]))
        return await future


@dataclass
class Looked:
    """Workers that know all answers; they say a few at a time, as an engine's steps do.

    Attributes:
        seconds: processor seconds of the workers' own work.
    """

    answers: dict[int, Sampled]
    held: dict[int, deque[Call]] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def start(self, worker: int) -> None:
        self.held[worker] = deque()
        self.started.append(worker)

    def send(self, worker: int, calls: list[Call]) -> None:
        sent = pickle.dumps(calls)
        before = time.process_time()
        self.held[worker].extend(pickle.loads(sent))  # noqa: S301 (our own bytes)
        self.seconds += time.process_time() - before

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        found: list[tuple[int, Message]] = [(w, Started(w, "here")) for w in self.started]
        self.started.clear()
        for worker, held in self.held.items():
            if not held:
                continue
            before = time.process_time()
            calls = [held.popleft() for _ in range(min(8, len(held)))]
            said = pickle.dumps(Finished([(c.number, self.answers[c.seed]) for c in calls]))
            self.seconds += time.process_time() - before
            found.append((worker, pickle.loads(said)))  # noqa: S301 (our own bytes)
        return found

    def close(self) -> None:
        self.held.clear()


if __name__ == "__main__":
    run(overhead, OverheadConfig, "benchmarks.speed.overhead")
