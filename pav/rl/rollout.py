"""Sampling: what the policy writes, and what the grader says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pav.core.seeds import seed_of
from pav.engine.loop import drive
from pav.grading.sandbox import GuardedGrader
from pav.policy.policy import Policy, Sampler
from pav.rl.engines import Serving
from pav.tasks.base import Problem

# One token is most probable: what is sampled from it alone is greedy.
GREEDY = 1


@dataclass(frozen=True)
class Trace:
    """A solution that the policy wrote.

    Attributes:
        problem: what it solves.
        index: which of its group.
        prompt: ids of the prompt.
        ids: ids of the solution, its end-of-sequence token included.
        sampled_T: (tokens,) log-probability of each under the policy that sampled it.
        ends: exclusive ends of its complete steps.
        truncated: whether the length cap, or a step too long to be scored, ended it.
        answer: what the grader read.
        correct: what the grader says; never true of a truncated one.
        version: of the policy: updates behind it.
    """

    problem: Problem
    index: int
    prompt: list[int]
    ids: list[int]
    sampled_T: NDArray[np.float32]
    ends: list[int]
    truncated: bool
    answer: str | None
    correct: bool
    version: int


@dataclass(frozen=True)
class Actor:
    """What samples.

    Attributes:
        engine: the policy in service.
        policy: its tokenizer, prompt and step rule.
        sampler: temperature and length cap.
        grader: the task's.
        seed: of the run; every sample's seed is a hash of it and of the sample's key.
    """

    engine: Serving
    policy: Policy
    sampler: Sampler
    grader: GuardedGrader
    seed: int

    async def trace(
        self,
        problem: Problem,
        index: int,
        key: Sequence[object],
        version: int,
        greedy: bool = False,
        prefix: Sequence[int] = (),
    ) -> Trace:
        """One solution, graded; what follows ``prefix`` is sampled, without log-probabilities."""
        stepper, prompt = self.policy.stepper, self.policy.encode(problem)
        sampler = replace(self.sampler, top_k=GREEDY) if greedy else self.sampler
        room = max(0, sampler.max_length - len(prompt) - len(prefix))
        ids = list(prefix)
        logprobs, stopped = np.zeros(0, np.float32), False
        if room:
            out = await self.engine.sample(
                [*prompt, *prefix],
                sampler,
                stop_ids=sorted(stepper.eos_ids),
                max_tokens=room,
                seed=seed_of(self.seed, *key, problem.id, index),
                until=stepper,
                logprobs=not greedy and not prefix,
            )
            if out.version != version:
                raise RuntimeError(
                    f"a trace of policy version {out.version} came where {version} was expected"
                )
            ids, stopped = [*ids, *out.ids], out.stopped
            logprobs = logprobs if out.logprobs is None else out.logprobs
        ends = stepper.step_ends(ids)
        truncated = not stopped or (not stepper.rule.score_cut and ends[-1:] != [len(ids)])
        grade = self.grader.grade(self.policy.text(ids), problem)
        return Trace(
            problem, index, prompt, ids, logprobs, ends, truncated, grade.answer,
            grade.correct and not truncated, version,
        )  # fmt: skip


def rollout(
    actor: Actor,
    problems: Sequence[Problem],
    group: int,
    key: Sequence[object],
    version: int,
    greedy: bool = False,
) -> list[Trace]:
    """``group`` traces of every problem, those of a problem one after the other.

    Args:
        actor: what samples.
        problems: what is solved.
        group: traces of each.
        key: names these samples: their seeds depend on it, on the problem and on the index alone.
        version: the policy's; traces of another one are refused.
        greedy: take the most probable token; no log-probabilities then.
    """
    found: list[tuple[int, Trace]] = []

    async def numbered(number: int, problem: Problem, index: int) -> tuple[int, Trace]:
        return number, await actor.trace(problem, index, key, version, greedy)

    jobs = [
        partial(numbered, p * group + i, problem, i)
        for p, problem in enumerate(problems)
        for i in range(group)
    ]
    drive([actor.engine], jobs, found.append, len(jobs))
    return [trace for _, trace in sorted(found, key=lambda pair: pair[0])]
