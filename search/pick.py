"""The final pick among finished candidates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from pav.verifier import ORM
from search.records import Candidate

Pick = Literal["last", "min", "orm", "vote", "orm_vote", "majority"]


def pick(candidates: Sequence[Candidate], rule: Pick, head: str) -> int | None:
    """Index of the pick; None where nothing finished. Ties go to the earlier candidate.

    Args:
        candidates: the final set; unfinished ones are never picked.
        rule: ``last`` Q of the last step, ``min`` over all steps, ``orm`` head, ``vote`` weighted
            by the last Q, ``orm_vote`` weighted by the ORM, ``majority``.
        head: the Q head that ``last``, ``min`` and ``vote`` read.
    """
    finished = [i for i, c in enumerate(candidates) if c.finished]
    if not finished:
        return None

    def weight(i: int) -> float:
        c = candidates[i]
        if rule == "majority":
            return 1.0
        if rule in ("orm", "orm_vote"):
            return c.q[ORM][-1]
        return min(c.q[head][1:]) if rule == "min" else c.q[head][-1]

    if rule in ("last", "min", "orm"):
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
