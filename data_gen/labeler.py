"""Label solutions, breadth-first: a solution, then rollouts from its prefixes, round by round.

A round is one solution per problem and the rollouts of its prefixes. The rollouts of a round start
when every problem has those of the round before, so that a run stopped at any time has labelled all
problems to within one round of each other. The engine stays busy meanwhile: the solutions of the
next round are sampled while a round is rolled out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from math import inf
from time import monotonic
from typing import Any

from data_gen.inspect.watch import Watch, minutes_left, tokens_per_solution
from data_gen.store import Store
from data_gen.strategies import Plan, Request, next_rollouts
from pav.core.errors import UserError
from pav.core.progress import Reporter
from pav.core.seeds import seed_of
from pav.core.steps import Stepper
from pav.engine.loop import drive
from pav.engine.remote import RemoteEngine
from pav.engine.vllm import VllmEngine
from pav.grading.sandbox import GuardedGrader
from pav.labels.tables import Completion, Trace, prefix_key
from pav.policy.policy import Policy, Sampler
from pav.tasks.base import Problem, Split

REPORT_SECONDS = 2.0


class OutOfTime(Exception):
    """The time that the user gave is over."""


@dataclass(frozen=True)
class PlannedTrace:
    """A solution that a run labels.

    Attributes:
        split: of the problem.
        problem: the problem.
        writer: name of the policy that samples it, or of whoever wrote it.
        index: among the traces of this writer and problem.
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
class RolloutPolicy:
    """A policy with its engine."""

    policy: Policy
    engine: VllmEngine | RemoteEngine
    sampler: Sampler

    @property
    def name(self) -> str:
        """What labels call the policy."""
        return self.policy.config.label

    async def finish(
        self, prompt: list[int], prefix: list[int], seed: int
    ) -> tuple[list[int], bool]:
        """Sample after ``prompt + prefix`` to the end; (new ids, whether it was truncated).

        Truncated: by the length cap, or by a cut step that is not scored, at which search stops.
        """
        ids = prompt + prefix
        room = self.sampler.max_length - len(ids)
        if room <= 0:
            return [], True
        out = await self.engine.sample(
            ids,
            self.sampler,
            stop_ids=sorted(self.policy.stepper.eos_ids),
            max_tokens=room,
            seed=seed,
            until=self.policy.stepper,
        )
        stepper = self.policy.stepper
        whole = prefix + out.ids
        is_cut = not stepper.rule.score_cut and stepper.step_ends(whole)[-1:] != [len(whole)]
        return out.ids, is_cut or not out.stopped


@dataclass(frozen=True)
class Labeler:
    """What labels a solution.

    Attributes:
        grader: the task's.
        rollout_policies: rollout policies, the base first.
        plan: how rollouts are spent; names the same policies.
        seed: run seed; every request's seed is a hash of it and of the request's key.
        store: where finished solutions and rollouts go.
        deadline: on the monotonic clock; it ends the run.
        watch: counts what is sampled, and may end the run.
    """

    grader: GuardedGrader
    rollout_policies: list[RolloutPolicy]
    plan: Plan
    seed: int
    store: Store
    deadline: float = inf
    watch: Watch = field(default_factory=Watch)

    async def trace(self, planned: PlannedTrace) -> Trace:
        """The solution: the store's, the given one, or a new sample."""
        if planned.trace_id in self.store.traces:
            return self.store.traces[planned.trace_id]
        problem = planned.problem
        if planned.given is not None:
            ids, truncated = planned.given
        else:
            rollout_policy = next(r for r in self.rollout_policies if r.name == planned.writer)
            key = prefix_key(problem.id, [])
            ids, truncated = await rollout_policy.finish(
                rollout_policy.policy.encode(problem),
                [],
                seed_of(self.seed, "seed", planned.writer, key, planned.index),
            )
        policy = self.rollout_policies[0].policy
        grade = self.grader.grade(policy.text(ids), problem)
        trace = Trace(
            trace_id=planned.trace_id,
            problem_id=problem.id,
            question=problem.question,
            gold=problem.gold,
            split=planned.split,
            policy=planned.writer,
            seed_index=planned.index,
            ids=ids,
            step_ends=policy.stepper.step_ends(ids),
            answer=grade.answer,
            correct=grade.correct and not truncated,
            truncated=truncated,
        )
        self.store.add(trace)
        if planned.given is None:
            self.watch.see(trace)
        return trace

    async def rollouts(self, trace: Trace, problem: Problem) -> None:
        """Rollouts from the prefixes of ``trace`` until the plan wants no more."""
        stepper = self.rollout_policies[0].policy.stepper
        # Once per solution: encoding for every rollout took 5% of a run.
        rollout_policies = {r.name: (r, r.policy.encode(problem)) for r in self.rollout_policies}
        while requests := next_rollouts(self.plan, trace, self.store.completions, stepper):
            await asyncio.gather(
                *(self._rollout(r, problem, *rollout_policies[r.policy]) for r in requests)
            )

    async def _rollout(
        self, request: Request, problem: Problem, rollout_policy: RolloutPolicy, prompt: list[int]
    ) -> None:
        key, prefix, index = request.key, request.prefix, request.index
        ids, truncated = await rollout_policy.finish(
            prompt, prefix, seed_of(self.seed, "rollout", rollout_policy.name, key, index)
        )
        grade = self.grader.grade(rollout_policy.policy.text(prefix + ids), problem)
        # A truncated rollout is a failure, whatever its text says.
        correct = grade.correct and not truncated
        completion = Completion(
            key,
            problem.id,
            rollout_policy.name,
            index,
            prefix,
            ids,
            grade.answer,
            correct,
            truncated,
        )
        self.store.add(completion)
        self.watch.see(completion)


@dataclass
class _Clock:
    """Turned with the engines, so that time is up also where no worker answers or has started.

    Now and then it reports: the first solution of a large model may take many minutes.
    """

    deadline: float
    report: Callable[[], None]
    next: float = 0.0

    @property
    def busy(self) -> bool:
        return monotonic() >= min(self.deadline, self.next)

    def step(self) -> None:
        if monotonic() >= self.deadline:
            raise OutOfTime
        self.report()
        self.next = monotonic() + REPORT_SECONDS


def missing(
    rounds: list[list[PlannedTrace]], plan: Plan, store: Store, stepper: Stepper
) -> list[list[PlannedTrace]]:
    """What the store lacks of ``rounds``."""

    def is_missing(planned: PlannedTrace) -> bool:
        trace = store.traces.get(planned.trace_id)
        return trace is None or bool(next_rollouts(plan, trace, store.completions, stepper))

    return [[t for t in traces if is_missing(t)] for traces in rounds]


class _Turns:
    """Tells when a round may start: when the rounds before it are finished."""

    def __init__(self, missing: list[int]) -> None:
        self._owed = missing
        self._starts = [asyncio.Event() for _ in missing]
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


def label(labeler: Labeler, rounds: list[list[PlannedTrace]], concurrency: int) -> None:
    """Label what the store lacks of ``rounds``, ``concurrency`` solutions at a time.

    Raises:
        OutOfTime: at the deadline; what is in flight is dropped.
        GraderFailed: if the grader fails too often.
        UserError: if the store cannot be written.
    """
    store = labeler.store
    todo = missing(rounds, labeler.plan, store, labeler.rollout_policies[0].policy.stepper)
    turns = _Turns([len(traces) for traces in todo])

    async def job(number: int, planned: PlannedTrace) -> Exception | None:
        try:
            # No solution is more than a round ahead.
            await turns.start_of(number - 1)
            trace = await labeler.trace(planned)
            await turns.start_of(number)
            # The prefixes that it shares with earlier solutions of the problem are there by now.
            await labeler.rollouts(trace, planned.problem)
        except UserError as error:
            # Several jobs may meet the same full disk; the first one ends the run.
            return error
        turns.finished_one(number)
        return None

    jobs: list[Callable[[], Coroutine[Any, Any, Exception | None]]] = [
        partial(job, number, t) for number, traces in enumerate(todo) for t in traces
    ]
    total = sum(map(len, rounds))
    done = before = total - len(jobs)
    engines = [r.engine for r in labeler.rollout_policies]
    watch, started = labeler.watch, monotonic()
    sampled_before = sum(e.usage.generated for e in engines)
    room = max(r.sampler.max_length for r in labeler.rollout_policies)
    with Reporter("rollouts", total, "solutions") as reporter:
        reporter.update(done)

        def report() -> None:
            seconds = max(monotonic() - started, 1e-9)
            tokens = sum(e.usage.generated + e.in_flight for e in engines) - sampled_before
            each = tokens_per_solution(watch, labeler.plan, tokens, room)
            left = minutes_left(len(jobs), done - before, tokens, seconds, each)
            lines = [line for e in engines if isinstance(e, RemoteEngine) for line in e.lines]
            note = f"{len(store.completions)} rollouts, {tokens / seconds:.0f} tokens/s"
            reporter.update(done, f"{note}, {watch.shares}", lines, left)

        def advance(error: Exception | None) -> None:
            nonlocal done
            if error is not None:
                raise error
            done += 1
            report()

        # The clock comes last: what an engine's step finished is kept.
        drive([*engines, _Clock(labeler.deadline, report)], jobs, advance, concurrency)
