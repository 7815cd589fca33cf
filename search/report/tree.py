"""The tree of a search, put together again from its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pav.core.errors import UserError
from pav.verifier.pick import Candidate
from search.run.records import Record

ROOT = -1


@dataclass(frozen=True)
class TreeStep:
    """A scored step of a search.

    Attributes:
        parent: index of the step before it; ``ROOT`` for a first step.
        places: how many places of the next round it got; 0 if it was pruned.
        finished: whether it ends a solution.
        score: what it was ranked by.
        text: its text.
        q: Q of every head after it, to 6 digits.
    """

    parent: int
    places: int
    finished: bool
    score: float
    text: str
    q: dict[str, float]


def tree(record: Record) -> list[TreeStep]:
    """All scored steps, round by round; none for best-of-N, and for versions without ``nodes``.

    Raises:
        UserError: if a step continues a place that no step of the round before holds.
    """
    found: list[TreeStep] = []
    held: dict[int, int] = {}
    for number, (children, nodes) in enumerate(zip(record.steps, record.nodes, strict=False)):
        now: dict[int, int] = {}
        for (place, _, score, text), node in zip(children, nodes, strict=False):
            parent = held.get(place) if number else ROOT
            if parent is None:
                raise UserError(
                    f"the record of problem {record.problem_id!r} ({record.method} N={record.n}) "
                    f"is broken: a step of round {number} continues place {place}, which no step "
                    "of the round before holds; remove its line and search it again"
                )
            now |= dict.fromkeys(node.places, len(found))
            found.append(TreeStep(parent, len(node.places), node.finished, score, text, node.q))
        held = now
    return found


def path_to(steps: Sequence[TreeStep], last: int) -> list[int]:
    """Indices of the steps from the first one to ``last``."""
    path = []
    while last != ROOT:
        path.append(last)
        last = steps[last].parent
    return path[::-1]


def last_steps(record: Record, steps: Sequence[TreeStep]) -> list[int | None]:
    """The last step of every candidate; None where the tree does not hold it.

    Candidates with the same steps (particles, independent subtrees) get different ones as long as
    there are any.
    """
    paths = [path_to(steps, i) for i, s in enumerate(steps) if s.finished and s.places]
    taken: set[int] = set()
    found: list[int | None] = []
    for candidate in record.candidates:
        fitting = [p for p in paths if _fits(candidate, [steps[i] for i in p])]
        # What is decoded step by step may differ from the whole in its white space alone.
        fitting.sort(key=lambda p: (_text(candidate.text) != _joined(steps, p), p[-1] in taken))
        found.append(fitting[0][-1] if fitting else None)
        taken |= {p[-1] for p in fitting[:1]}
    return found


def _fits(candidate: Candidate, path: Sequence[TreeStep]) -> bool:
    return len(path) == len(candidate.ends) and all(
        [round(v, 6) for v in values[1:]] == [s.q.get(head) for s in path]
        for head, values in candidate.q.items()
    )


def _joined(steps: Sequence[TreeStep], path: Sequence[int]) -> str:
    return _text("\n".join(steps[i].text for i in path))


def _text(text: str) -> str:
    return "".join(text.split())
