"""What a search of the library finds: an answer, and the tree behind it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pav.policy.cost import Cost
from pav.verifier.pick import Candidate
from search.run.records import Record


@dataclass(frozen=True)
class Child:
    """A step that a search drew and scored.

    Attributes:
        parent: the place, among those of the round before, whose solution it goes on from; 0 in
            the first round.
        kept: whether it stood in the next round.
        score: what it was ranked by.
        text: its text, without the line end.
        places: where it stood in the next round; empty if it was pruned. Its own children name
            one of these as their parent.
        finished: whether it ends a solution.
        q: Q of every head after it.
    """

    parent: int
    kept: bool
    score: float
    text: str
    places: list[int]
    finished: bool
    q: dict[str, float]


@dataclass(frozen=True)
class Found:
    """What a search found for one question.

    Attributes:
        question: the question.
        answer: the answer of the picked solution, as the task's grader reads it; None where nothing
            finished or nothing could be read.
        text: the picked solution; empty where nothing finished.
        tree: rounds of scored children, in the order of their rank; best-of-N has none.
        cost: tokens spent, by kind.
        candidates: the final set of solutions.
        picked: index of the picked one among them; None where nothing finished.
        error: why the search failed; None where it did not.
    """

    question: str
    answer: str | None
    text: str
    tree: list[list[Child]]
    cost: Cost
    candidates: list[Candidate]
    picked: int | None
    error: str | None

    @property
    def correct(self) -> bool:
        """Whether the picked solution is right; False where the question came without answer."""
        return self.picked is not None and self.candidates[self.picked].correct


def found_in(record: Record) -> Found:
    """What a search left, as the library shows it."""
    picked = None if record.picked is None else record.candidates[record.picked]
    tree = [
        [
            Child(parent, kept, score, text, node.places, node.finished, node.q)
            for (parent, kept, score, text), node in zip(children, nodes, strict=True)
        ]
        for children, nodes in zip(record.steps, record.nodes, strict=True)
    ]
    return Found(
        record.question,
        record.answer,
        picked.text if picked else "",
        tree,
        Cost(**{f.name: getattr(record, f.name) for f in fields(Cost)}),
        record.candidates,
        record.picked,
        record.error,
    )
