"""The final pick among finished candidates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

from pav.core.errors import UserError
from pav.core.heads import ORM
from pav.verifier.score import Pick, Values

# Rules that need the values of all steps, not of the last one alone.
EVERY_STEP: tuple[Pick, ...] = ("min", "pav")
ORM_RULES: tuple[Pick, ...] = ("orm", "orm_vote")
# Score of a step from the values before and after it.
StepScore = Callable[[Values, Values], float]


@dataclass(frozen=True)
class Candidate:
    """One solution, complete or not.

    Attributes:
        ids: solution ids.
        ends: step ends.
        q: head -> Q after step 0, 1, ...; best-of-N: the last step's alone unless all were asked.
        score: what search ranked it by at its last step; minus infinity where it was cut.
        finished: complete.
        truncated: cut by the length cap.
        text: its text.
        answer: what the grader read.
        correct: whether that is right.
        tokens: tokens sampled for it alone (best-of-N), 0 in a beam, whose prefixes are shared.
    """

    ids: list[int]
    ends: list[int]
    q: dict[str, list[float]]
    score: float
    finished: bool
    truncated: bool
    text: str = ""
    answer: str | None = None
    correct: bool = False
    tokens: int = 0


def pick(
    candidates: Sequence[Candidate], rule: Pick, head: str, score: StepScore | None = None
) -> int | None:
    """Index of the pick; None where nothing finished. Ties go to the earlier candidate.

    Args:
        candidates: the final set; unfinished ones are never picked.
        rule: ``last`` Q of the last step, ``min`` Q over all steps, ``pav`` the lowest step score
            (PAV as ORM: paper, Section 4.5), ``orm`` head, ``vote`` weighted by the last Q,
            ``orm_vote`` weighted by the ORM, ``majority``.
        head: the Q head that ``last``, ``min`` and ``vote`` read.
        score: the step score that ``pav`` reads.
    """
    finished = [i for i, c in enumerate(candidates) if c.finished]
    if not finished:
        return None

    def weight(i: int) -> float:
        c = candidates[i]
        if rule == "majority":
            return 1.0
        if rule in ORM_RULES:
            return c.q[ORM][-1]
        if rule == "pav":
            if score is None:
                raise ValueError("the pick pav needs a step score")
            return lowest_step(c, score)
        return min(c.q[head][1:]) if rule == "min" else c.q[head][-1]

    if rule in ("last", "min", "pav", "orm"):
        return max(finished, key=weight)
    votes: dict[str | None, float] = defaultdict(float)
    for i in finished:
        # Unparsable solutions do not vote together.
        if candidates[i].answer is not None:
            votes[candidates[i].answer] += weight(i)
    if not votes:
        return finished[0]
    winner = max(votes, key=lambda a: votes[a])
    return max((i for i in finished if candidates[i].answer == winner), key=weight)


def lowest_step(candidate: Candidate, score: StepScore) -> float:
    """The lowest score of a candidate's steps; its values after every step must be there."""
    states = [
        dict(zip(candidate.q, values, strict=True))
        for values in zip(*candidate.q.values(), strict=True)
    ]
    return min(score(before, after) for before, after in pairwise(states))


def check_pick(rule: Pick, heads: Sequence[str], base_head: str, scorer: str) -> None:
    """Refuse a rule that reads what a scorer does not give.

    Raises:
        UserError: naming the rules that can be used.
    """
    missing = "an ORM head" if rule in ORM_RULES and ORM not in heads else ""
    if rule not in (*ORM_RULES, "majority") and not base_head:
        missing = "a Q head"
    if missing:
        usable = [
            r
            for r in get_args(Pick)
            if r == "majority" or (ORM in heads if r in ORM_RULES else base_head)
        ]
        raise UserError(
            f"pick {rule} reads {missing}, which {scorer!r} does not have; choose "
            f"{', '.join(usable[:-1])} or {usable[-1]}"
        )
