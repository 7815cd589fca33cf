"""What the process that leads workers costs, and how many workers it can feed.

    OMP_NUM_THREADS=1 data_gen.rollouts --policy pav:base --problems 128 --validation_problems 0 \\
        --n_traces 1 --n_mc 4 --output runs/speed/one
    OMP_NUM_THREADS=1 python -m benchmarks.speed.overhead

All work of the leading process is done as in a label run (grading, journal, queue); solutions and
rollouts are drawn from those of a finished run in place of a model. Once they are in the same
process, which tells what the queue adds. Then workers are simulated behind the queue: each answers
at the rate that the finished run was made at, on a clock that counts the processor seconds of the
leading process and its waiting. The work of the workers costs the leading process nothing, as on
machines with cores enough. Writes ``benchmarks/results/speed_overhead.{json,csv,png}``.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.speed.results import metric, result, write
from data_gen.label_run import Run, base_policy, read_run, task_of
from data_gen.labeler import Labeler, PlannedTrace, RolloutPolicy, label
from data_gen.store import Store
from data_gen.strategies import plan_of
from pav.cli.run import run
from pav.engine.loading import EngineConfig
from pav.engine.remote import Call, Model, remote_engines
from pav.engine.worker import Finished, Lease, Load, Message, Started
from pav.grading.sandbox import GuardedGrader
from pav.policy.inference import Sampled, Usage
from pav.policy.policy import Sampler

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.speed.overhead"
WORKERS = (1, 4, 16, 64, 128)
MOST = 64
# Samples that a worker's engine finishes in a step.
GROUP = 8


@dataclass(frozen=True)
class OverheadConfig:
    """What the process that leads workers costs.

    Args:
        labels: a finished run of one process and one policy, strategy all_prefixes.
        problems: problems per simulated worker.
        seconds: that the run took, model loading left out; by default as its journal says.
    """

    labels: str = "runs/speed/one"
    problems: int = 64
    seconds: float | None = None


def overhead(config: OverheadConfig) -> None:
    """Measure and write (see the module)."""
    made = read_run(config.labels)
    rate = (len(made.traces) + len(made.completions)) / (config.seconds or made.seconds)
    rows = []
    for workers in (0, *WORKERS):
        rows.append(_simulated(made, workers, max(workers, MOST // 4) * config.problems, rate))
        print(rows[-1])
    alone, most = rows[0], next(r for r in rows if r["workers"] == MOST)
    each = {r["workers"]: 1000 * r["cpu_seconds"] / r["samples"] for r in rows}
    full = most["samples"] / most["cpu_seconds"]
    metrics = [
        metric("queue: processor seconds of the leading process per 1000 labels "
               f"({MOST} workers)", each[MOST] - each[0]),
        metric("leading process without a queue: processor seconds per 1000 labels", each[0]),
        metric(f"leading process: samples/s at which its core is full ({MOST} workers)", full),
        metric("a worker: samples/s (tape base policy, one core)", rate),
        metric("workers on the tape that fill the leading process's core", full / rate),
        *(metric(f"{r['workers']} simulated workers: share of the samples/s of so many alone",
                 r["share_of_ideal"]) for r in rows[1:]),
    ]  # fmt: skip
    write("overhead", metrics, rows, [made.manifest["seed"]], alone["problems"], COMMAND)
    _plot(rows[1:], full / rate, result("overhead", "png"))


def _simulated(made: Run, workers: int, problems: int, rate: float) -> dict[str, Any]:
    """One label run of ``problems`` with ``workers`` behind the queue; 0 for no queue."""
    task = task_of(made, None)
    policy = base_policy(made, task)
    sampler = Sampler(**made.manifest["sampler"])
    answers = [Sampled(c.ids, not c.truncated) for c in made.completions.values()]
    solutions = cycle((t.ids, t.truncated) for t in made.traces.values())
    rounds = [
        [
            PlannedTrace("train", problem, "given", 0, next(solutions))
            for problem in islice(task.problems("train"), problems)
        ]
    ]
    simulation = Simulation(answers, rate)
    engine: Any = Here(answers)
    if workers:
        model = Model(
            policy.path, policy.config.dtype, sampler.max_length, EngineConfig(), (policy.stepper,)
        )
        (engine,) = remote_engines(simulation, [model], workers)
    with TemporaryDirectory() as name, Store(Path(name), {}) as store:
        rollout_policy = RolloutPolicy(policy, engine, sampler)
        labeler = Labeler(
            GuardedGrader(task),
            [rollout_policy],
            plan_of(made.manifest),
            made.manifest["seed"],
            store,
        )
        simulation.started = started = time.process_time()
        label(labeler, rounds, 256 * max(1, workers))
        cpu = time.process_time() - started - simulation.own
        samples = len(store.completions)
    seconds = cpu + simulation.waited
    return {
        "workers": workers, "problems": problems, "samples": samples,
        "cpu_seconds": round(cpu, 3), "simulated_seconds": round(seconds, 3),
        "samples_per_second": round(samples / seconds, 1),
        "share_of_ideal": round(samples / seconds / (workers * rate), 4) if workers else None,
        "busy": round(cpu / seconds, 4),
    }  # fmt: skip


@dataclass
class Here:
    """An engine of this process that knows all answers."""

    answers: Sequence[Sampled]
    usage: Usage = field(default_factory=Usage)
    in_flight: int = 0
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
        self.waiting.append((future, self.answers[call["seed"] % len(self.answers)]))
        return await future


@dataclass
class Engine:
    """What a simulated worker holds, and when its next :data:`GROUP` is done."""

    held: deque[tuple[int, Call]] = field(default_factory=deque)
    done_at: float = 0.0


@dataclass
class Simulation:
    """Workers that know all answers and give them at ``rate`` samples a second.

    Attributes:
        started: processor seconds of this process at the start.
        own: of it the simulation's, with what the workers would do.
        waited: seconds that the leading process has waited for an answer.
    """

    answers: Sequence[Sampled]
    rate: float
    started: float = 0.0
    own: float = 0.0
    waited: float = 0.0
    engines: dict[int, Engine] = field(default_factory=dict)
    starting: list[int] = field(default_factory=list)

    def start(self, worker: int) -> None:
        self.engines[worker] = Engine()

    def send(self, worker: int, message: Load | Lease) -> None:
        if isinstance(message, Load):
            self.starting.append(worker)
            return
        sent = pickle.dumps(message)
        before = time.process_time()
        engine = self.engines[worker]
        if not engine.held:
            engine.done_at = self._now(before) + GROUP / self.rate
        engine.held.extend(pickle.loads(sent))  # noqa: S301 (our own bytes)
        self.own += time.process_time() - before

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        before = time.process_time()
        found: list[tuple[int, Message]] = [(w, Started(0, w, "here")) for w in self.starting]
        self.starting.clear()
        working = {w: e for w, e in self.engines.items() if e.held}
        now = self._now(before)
        if working and not found:
            wait = max(0.0, min(e.done_at for e in working.values()) - now)
            self.waited, now = self.waited + wait, now + wait
        said = []
        for worker, engine in working.items():
            if engine.done_at <= now:
                calls = [engine.held.popleft() for _ in range(min(GROUP, len(engine.held)))]
                engine.done_at += GROUP / self.rate
                answers = [(n, self.answers[c.seed % len(self.answers)]) for n, c in calls]
                said.append((worker, pickle.dumps(Finished(answers))))
        self.own += time.process_time() - before
        return found + [(w, pickle.loads(message)) for w, message in said]  # noqa: S301

    def _now(self, cpu: float) -> float:
        return cpu - self.started - self.own + self.waited

    def end(self, worker: int) -> None:
        raise AssertionError(f"worker {worker} was said to be silent")

    def close(self) -> None:
        self.engines.clear()


def _plot(rows: Sequence[dict[str, Any]], full: float, target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    workers = [r["workers"] for r in rows]
    axes.plot(workers, [r["share_of_ideal"] for r in rows], "o-", label="samples/s over ideal")
    axes.plot(workers, [r["busy"] for r in rows], "s--", label="leading process busy")
    axes.axvline(full, color="0.6", lw=0.8)
    axes.annotate("core of the leading\nprocess is full", (full, 0.05), (3, 0),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set(
        xscale="log", xlabel="simulated workers (tape base policy, a core each)", ylim=(0, 1.1)
    )
    axes.set_xticks(workers, [str(w) for w in workers])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    run(overhead, OverheadConfig, "benchmarks.speed.overhead")
