"""Traces of likelihood rewards: the policy's chain, and the reference answer after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

import numpy as np

from pav.core.seeds import seed_of
from pav.core.steps import Ending
from pav.policy.policy import Policy
from pav.rl.chain import Chain, Tags, answer_in, chain_of, endings, reference_ids
from pav.rl.trace import Trace
from pav.tasks.base import Problem, Task


@dataclass(frozen=True)
class References:
    """What follows chains.

    Attributes:
        policy: whose tokens.
        task: has the form of an answer where no tag opens it.
        tags: of the answer.
        seed: of the reference that is drawn where a problem has several.
    """

    policy: Policy
    task: Task
    tags: Tags
    seed: int

    @cached_property
    def endings(self) -> tuple[Ending, Ending]:
        """Where sampling ends: of chains alone, and of whole solutions."""
        return endings(self.policy, self.tags)

    def room(self, problem: Problem) -> int:
        """Tokens that the longest reference of ``problem`` may take after a chain."""
        nothing = Chain([], False)
        return max(len(self._ids(problem, answer, nothing)) for answer in answers(problem))

    def forced(self, problem: Problem, version: int) -> list[int]:
        """The drawn reference as it follows the end of a step, its opening tag included."""
        return self._ids(problem, self.drawn(problem, version), Chain([], False))

    def drawn(self, problem: Problem, version: int) -> str:
        """The reference of an iteration: each is as likely, so the mean reward is that of all."""
        found = answers(problem)
        if len(found) == 1:
            return found[0]
        return Random(seed_of(self.seed, "reference", version, problem.id)).choice(found)

    def after(self, trace: Trace, answer: str) -> Trace:
        """``trace`` cut to its chain, ``answer`` after it."""
        chain = chain_of(self.policy, self.tags, trace.ids)
        size = len(chain.ids)
        return replace(
            trace,
            ids=chain.ids,
            sampled_T=trace.sampled_T[:size],
            ends=[end for end in trace.ends if end <= size],
            reference=self._ids(trace.problem, answer, chain),
            is_tagged=chain.is_tagged,
        )

    def empty(self, problem: Problem, prompt: list[int], version: int) -> Trace:
        """No chain at all, and a reference: what fine-tuning learns."""
        nothing = Trace(
            problem, 0, prompt, [], np.zeros(0, np.float32), [], False, None, False, version
        )
        return self.after(nothing, self.drawn(problem, version))

    def graded(self, ids: Sequence[int]) -> str:
        """What the grader reads: the text between two tags, else all of a solution."""
        answer = answer_in(self.policy, self.tags, ids) if self.tags.closing else None
        return self.policy.text(ids) if answer is None else answer

    def exact(self, trace: Trace) -> tuple[str | None, bool]:
        """The answer of a whole solution, and whether it equals a reference."""
        answer = answer_in(self.policy, self.tags, trace.ids)
        if answer is None or trace.truncated:
            return None, False
        return answer.strip(), answer.strip() in [a.strip() for a in answers(trace.problem)]

    def _ids(self, problem: Problem, answer: str, chain: Chain) -> list[int]:
        return reference_ids(self.policy, self.task, self.tags, problem, answer, chain)


def answers(problem: Problem) -> Sequence[str]:
    """All references of a problem."""
    return [problem.gold or "", *problem.others]
