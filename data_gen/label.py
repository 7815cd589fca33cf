"""Label solutions, breadth-first: a seed, then rollouts from its prefixes, round by round.

A round is one seed solution per problem and the rollouts of its prefixes. The rollouts of a round
start when every problem has those of the round before, so that a run stopped at any time has
labelled all problems to within one round of each other. The engine stays busy meanwhile: the seeds
of the next round are sampled while a round is rolled out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from math import inf
from time import monotonic
from typing import Any

from data_gen.store import Key, Store
from pav.engine import Engine, drive, seed_of
from pav.errors import UserError
from pav.labels import Completion, Trace, prefix_key
from pav.policy import Policy, Sampler
from pav.progress import Reporter
from pav.tasks.base import Problem, Split, Task


class OutOfTime(Exception):
    """The time that the user gave is over."""


@dataclass(frozen=True)
class Seed:
    """A seed solution that a run labels.

    Attributes:
        split: of the problem.
        problem: the problem.
        writer: name of the policy that samples it, or of whoever wrote it.
        index: among the seeds of this writer and problem.
        given: (ids, truncated) of a solution that is there already.
    """

    split: Split
    problem: Problem
    writer: str
    index: int
    given: tuple[list[int], bool] | None = None

    @property
    def trace_id(self) -> str:
        """Key of the trace it becomes."""
        return f"{self.problem.id}/{self.writer}/{self.index}"


@dataclass(frozen=True)
class Roller:
    """A policy with its engine."""

    policy: Policy
    engine: Engine
    sampler: Sampler

    @property
    def name(self) -> str:
        """What labels call the policy."""
        return self.policy.config.label

    async def finish(
        self, problem: Problem, prefix: list[int], seed: int
    ) -> tuple[list[int], bool]:
        """Sample from ``prefix`` to the end; (new ids, whether it was truncated).

        Truncated: by the length cap, or by a cut step that is not scored, at which search stops.
        """
        ids = self.policy.encode(problem) + prefix
        room = self.sampler.max_length - len(ids)
        if room <= 0:
            return [], True
        out = await self.engine.sample(
            ids,
            self.sampler,
            stop_ids=sorted(self.policy.stepper.eos_ids),
            max_tokens=room,
            seed=seed,
        )
        stepper = self.policy.stepper
        whole = prefix + out.ids
        is_cut = not stepper.rule.score_cut and stepper.step_ends(whole)[-1:] != [len(whole)]
        return out.ids, is_cut or not out.stopped


@dataclass(frozen=True)
class Labeler:
    """What labels a solution.

    Attributes:
        task: the grader.
        rollers: rollout policies, the base first.
        n_mc: rollouts per prefix and rollout policy.
        seed: run seed; every request's seed is a hash of it and of the request's key.
        store: where finished solutions and rollouts go.
        deadline: on the monotonic clock; what finishes later ends the run.
    """

    task: Task
    rollers: list[Roller]
    n_mc: int
    seed: int
    store: Store
    deadline: float = inf

    async def trace(self, seed: Seed) -> Trace:
        """The seed solution: the store's, the given one, or a new sample."""
        if seed.trace_id in self.store.traces:
            return self.store.traces[seed.trace_id]
        problem = seed.problem
        if seed.given is not None:
            ids, truncated = seed.given
        else:
            roller = next(r for r in self.rollers if r.name == seed.writer)
            key = prefix_key(problem.id, [])
            ids, truncated = await roller.finish(
                problem, [], seed_of(self.seed, "seed", seed.writer, key, seed.index)
            )
        policy = self.rollers[0].policy
        grade = self.task.grade(policy.text(ids), problem)
        trace = Trace(
            trace_id=seed.trace_id,
            problem_id=problem.id,
            question=problem.question,
            gold=problem.gold,
            split=seed.split,
            policy=seed.writer,
            seed_index=seed.index,
            ids=ids,
            step_ends=policy.stepper.step_ends(ids),
            answer=grade.answer,
            correct=grade.correct and not truncated,
            truncated=truncated,
        )
        self._keep(trace)
        return trace

    async def rollouts(self, trace: Trace, problem: Problem) -> None:
        """Rollouts from all prefixes of ``trace``; skips what is there."""
        await asyncio.gather(
            *(
                self._rollout(roller, index, ids, problem)
                for ids in prefixes(trace)
                for roller in self.rollers
                for index in range(self.n_mc)
            )
        )

    async def _rollout(
        self, roller: Roller, index: int, prefix: list[int], problem: Problem
    ) -> None:
        key = prefix_key(problem.id, prefix)
        if (key, roller.name, index) in self.store.completions:
            return
        ids, truncated = await roller.finish(
            problem, prefix, seed_of(self.seed, "rollout", roller.name, key, index)
        )
        grade = self.task.grade(roller.policy.text(prefix + ids), problem)
        # A truncated rollout is a failure, whatever its text says.
        correct = grade.correct and not truncated
        self._keep(
            Completion(
                key, problem.id, roller.name, index, prefix, ids, grade.answer, correct, truncated
            )
        )

    def _keep(self, record: Trace | Completion) -> None:
        self.store.add(record)
        if monotonic() >= self.deadline:
            raise OutOfTime


def prefixes(trace: Trace) -> list[list[int]]:
    """Solution ids of every prefix to label: step 0 and every step but the one that ends it."""
    ends = trace.step_ends if trace.truncated else trace.step_ends[:-1]
    return [[], *(trace.ids[:end] for end in ends)]


def owed(
    rounds: list[list[Seed]], policies: list[str], n_mc: int, store: Store
) -> list[list[Seed]]:
    """What the store lacks of ``rounds``."""
    return [
        [
            seed
            for seed in seeds
            if not is_labelled(store.traces.get(seed.trace_id), policies, n_mc, store.completions)
        ]
        for seeds in rounds
    ]


def is_labelled(
    trace: Trace | None, policies: Iterable[str], n_mc: int, completions: dict[Key, Completion]
) -> bool:
    """Whether every prefix of a trace has its ``n_mc`` rollouts under each of ``policies``."""
    if trace is None:
        return False
    keys = [prefix_key(trace.problem_id, ids) for ids in prefixes(trace)]
    return all((key, p, i) in completions for key in keys for p in policies for i in range(n_mc))


class _Turns:
    """Tells when a round may start: when the rounds before it are finished."""

    def __init__(self, owed: list[int]) -> None:
        self._owed = owed
        self._starts = [asyncio.Event() for _ in owed]
        self._next = 0
        self._open()

    def _open(self) -> None:
        while self._next < len(self._owed):
            self._starts[self._next].set()
            if self._owed[self._next]:
                return
            self._next += 1

    async def start_of(self, number: int) -> None:
        await self._starts[max(number, 0)].wait()

    def finished_one(self, number: int) -> None:
        self._owed[number] -= 1
        self._open()


def label(labeler: Labeler, rounds: list[list[Seed]], concurrency: int) -> None:
    """Label what the store lacks of ``rounds``, ``concurrency`` solutions at a time.

    Raises:
        OutOfTime: at the deadline; what is in flight is dropped.
        UserError: if the store cannot be written.
    """
    store = labeler.store
    todo = owed(rounds, [r.name for r in labeler.rollers], labeler.n_mc, store)
    turns = _Turns([len(seeds) for seeds in todo])

    async def job(number: int, seed: Seed) -> Exception | None:
        try:
            # No seed is more than a round ahead.
            await turns.start_of(number - 1)
            trace = await labeler.trace(seed)
            await turns.start_of(number)
            # The prefixes that it shares with earlier solutions of the problem are there by now.
            await labeler.rollouts(trace, seed.problem)
        except (UserError, OutOfTime) as error:
            # Several jobs may meet the same full disk; the first one ends the run.
            return error
        turns.finished_one(number)
        return None

    jobs: list[Callable[[], Coroutine[Any, Any, Exception | None]]] = [
        partial(job, number, seed) for number, seeds in enumerate(todo) for seed in seeds
    ]
    total = sum(map(len, rounds))
    done = total - len(jobs)
    engines = [r.engine for r in labeler.rollers]
    started = monotonic()
    with Reporter("rollouts", total, "solutions") as reporter:
        reporter.update(done)

        def advance(error: Exception | None) -> None:
            nonlocal done
            if error is not None:
                raise error
            done += 1
            tokens = sum(e.usage.generated for e in engines) / max(monotonic() - started, 1e-9)
            reporter.update(done, f"{len(store.completions)} rollouts, {tokens:.0f} tokens/s")

        drive(engines, jobs, advance, concurrency)
