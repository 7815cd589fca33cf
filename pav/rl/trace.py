"""What the policy wrote: a trace."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pav.tasks.base import Problem


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
        reference: ids of the reference answer after it, where ``ids`` are those of a chain
            (:mod:`pav.rl.references`).
        is_tagged: whether it opened an answer.
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
    reference: list[int] = field(default_factory=list)
    is_tagged: bool = True
