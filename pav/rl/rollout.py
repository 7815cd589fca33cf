"""Sampling: what the policy writes, and what the grader says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pav.core.seeds import seed_of
from pav.engine.loop import drive
from pav.grading.sandbox import GuardedGrader
from pav.policy.policy import Policy, Sampler
from pav.rl.engines import Serving
from pav.rl.references import References
from pav.rl.trace import Trace
from pav.tasks.base import Problem

# One token is most probable: what is sampled from it alone is greedy.
GREEDY = 1


@dataclass(frozen=True)
class Actor:
    """What samples.

    Attributes:
        engine: the policy in service.
        policy: its tokenizer, prompt and step rule.
        sampler: temperature and length cap.
        grader: the task's.
        references: where answers begin and end.
        seed: of the run; every sample's seed is a hash of it and of the sample's key.
    """

    engine: Serving
    policy: Policy
    sampler: Sampler
    grader: GuardedGrader
    references: References
    seed: int

    async def trace(
        self,
        problem: Problem,
        index: int,
        key: Sequence[object],
        version: int,
        greedy: bool = False,
        prefix: Sequence[int] = (),
        reserve: int | None = None,
    ) -> Trace:
        """One solution, graded; what follows ``prefix`` is sampled, without log-probabilities.

        With ``reserve`` it ends where an answer begins: nothing is graded, and so many tokens are
        left free for a reference.
        """
        stepper, prompt = self.policy.stepper, self.policy.encode(problem)
        sampler = replace(self.sampler, top_k=GREEDY) if greedy else self.sampler
        room = max(0, sampler.max_length - len(prompt) - len(prefix))
        chains, whole = self.references.endings
        if reserve is not None:
            room = max(0, room - reserve)
        ids = list(prefix)
        logprobs, stopped = np.zeros(0, np.float32), False
        if room:
            out = await self.engine.sample(
                [*prompt, *prefix],
                sampler,
                stop_ids=sorted(stepper.eos_ids),
                max_tokens=room,
                seed=seed_of(self.seed, *key, problem.id, index),
                until=whole if reserve is None else chains,
                logprobs=not greedy and not prefix,
            )
            if out.version != version:
                raise RuntimeError(
                    f"a trace of policy version {out.version} came where {version} was expected"
                )
            ids, stopped = [*ids, *out.ids], out.stopped
            logprobs = logprobs if out.logprobs is None else out.logprobs
        ends = stepper.step_ends(ids)
        if reserve is not None:
            truncated = not stopped
            return Trace(
                problem, index, prompt, ids, logprobs, ends, truncated, None, False, version
            )
        truncated = not stopped or (not stepper.rule.score_cut and ends[-1:] != [len(ids)])
        grade = self.grader.grade(self.references.graded(ids), problem)
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
    chain: bool = False,
) -> list[Trace]:
    """``group`` traces of every problem, those of a problem one after the other.

    Args:
        actor: what samples.
        problems: what is solved.
        group: traces of each.
        key: names these samples: their seeds depend on it, on the problem and on the index alone.
        version: the policy's; traces of another one are refused.
        greedy: take the most probable token; no log-probabilities then.
        chain: end each where an answer would begin (``reserve`` of :meth:`Actor.trace`).
    """
    found: list[tuple[int, Trace]] = []

    async def numbered(
        number: int, problem: Problem, index: int, reserve: int | None
    ) -> tuple[int, Trace]:
        return number, await actor.trace(problem, index, key, version, greedy, reserve=reserve)

    reserves = [actor.references.room(p) if chain else None for p in problems]
    jobs = [
        partial(numbered, p * group + i, problem, i, reserves[p])
        for p, problem in enumerate(problems)
        for i in range(group)
    ]
    drive([actor.engine], jobs, found.append, len(jobs))
    return [trace for _, trace in sorted(found, key=lambda pair: pair[0])]
