"""``search.beam``: beam search by Q_base + alpha * A_prover (PAV paper, Section 4).

The first step draws N*C children; later the kept beams share N*C draws. Finished and unfinished
candidates compete by the same score for the N places; a finished one draws no more. Duplicates are
merged, so that places are distinct and no width is wasted, and a place draws in proportion to how
often its step was drawn. The pick is among finished candidates only.

Where the next step is all but given (a line of arithmetic, say), all right children of a round are
one, and merged they hold one place of N: with equal shares (``duplicates: merge``) they draw C
children where the verifier would have given them all N*C, and the search is lost if none of the C
is right.

With one place (``--n 1``) it is greedy step search: the best of C steps, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pav.verifier.pick import Candidate
from pav.verifier.score import Score, Values, step_score
from pav.verifier.scoring import StepScorer
from search.methods.context import SearchContext
from search.methods.expand import Expander, Prefix, SearchResult, gather_or_cancel
from search.run.records import Node

Duplicates = Literal["weigh", "merge"]


@dataclass(frozen=True)
class BeamSettings:
    """Settings of one beam search.

    Attributes:
        n: places.
        samples: children per place (C; the paper takes 3).
        alpha: weight of the advantage; 0 ranks by Q_base alone.
        prover: a head (``q/<policy>``), ``bo<K>`` for Best-of-K of the base policy, or a weighted
            mean (``q/a:0.5,q/b:0.5``).
        base_head: head of Q_base.
        score_by: what ranks a step.
        duplicates: whether places share the draws in proportion to how often their last step was
            drawn (``weigh``), or alike (``merge``).
    """

    n: int
    samples: int
    alpha: float
    prover: str
    base_head: str
    score_by: Score = "q+a"
    duplicates: Duplicates = "weigh"

    def score(self, before: Values, after: Values) -> float:
        """Score of the step between two states."""
        return step_score(before, after, self.base_head, self.prover, self.alpha, self.score_by)


# Changes the scores of a round's children before they are ranked: (places, children by the index
# of their parent among them) -> the children.
Rescore = Callable[[Sequence[Prefix], list[tuple[int, Prefix]]], list[tuple[int, Prefix]]]


async def beam_search(
    context: SearchContext,
    settings: BeamSettings,
    scorer: StepScorer,
    name: tuple[object, ...] = ("beam",),
    rescore: Rescore | None = None,
) -> SearchResult:
    """Search one problem.

    Seeds derive from (seed, problem, ``name``, round, prefix, index).
    """
    seed, problem = context.seed, context.problem
    prompt = context.policy.encode(problem)
    if len(prompt) >= context.sampler.max_length:
        # Every draw is cut before its first token.
        return SearchResult([], settings.n * settings.samples, 0, [], [])
    expander = Expander(context, prompt, scorer, settings.score)
    places = [await expander.root()]
    weights = [1]
    truncated: list[Candidate] = []
    merged = 0
    steps: list[list[tuple[int, bool, float, str]]] = []
    nodes: list[list[Node]] = []
    round_number = 0

    async def grow(parent: int, index: int) -> tuple[int, Prefix | Candidate | None]:
        """One child of a place, scored; a bare candidate if truncated, None if a duplicate."""
        prefix = places[parent]
        ids = prefix.candidate.ids
        step = await expander.draw(prefix, (seed, problem.id, *name, round_number, *ids, index))
        if isinstance(step, Candidate):
            return parent, step
        # Claimed before it is scored: a duplicate costs the verifier nothing.
        key = tuple(ids + step.ids)
        claimed[key] = claimed.get(key, 0) + 1
        if claimed[key] > 1:
            return parent, None
        return parent, await expander.expanded(prefix, step)

    while any(not p.candidate.finished for p in places):
        active = [i for i, p in enumerate(places) if not p.candidate.finished]
        draws = settings.samples * (settings.n - (len(places) - len(active)))
        shares = divided(draws, [weights[i] for i in active])
        claimed: dict[tuple[int, ...], int] = {}
        expanded = await gather_or_cancel(
            grow(i, c) for i, share in zip(active, shares, strict=True) for c in range(share)
        )
        truncated += [c for _, c in expanded if isinstance(c, Candidate)]
        merged += sum(c is None for _, c in expanded)
        children = [(parent, c) for parent, c in expanded if isinstance(c, Prefix)]
        if rescore is not None:
            children = rescore(places, children)
        contenders = [(-1, p) for p in places if p.candidate.finished] + children
        # Sorting is stable: ties go to the earlier contender.
        contenders.sort(key=lambda c: -c[1].candidate.score)
        ranked = [(rank, i, p) for rank, (i, p) in enumerate(contenders) if i >= 0]
        steps.append(
            [
                (i, rank < settings.n, p.candidate.score, expander.last_step(p.candidate))
                for rank, i, p in ranked
            ]
        )
        nodes.append(
            [expander.node(p, [rank] if rank < settings.n else []) for rank, _, p in ranked]
        )
        places = [p for _, p in contenders[: settings.n]]
        weights = [1] * len(places)
        if settings.duplicates == "weigh":
            # A finished one of an earlier round was not drawn in this one, and draws no more.
            weights = [claimed.get(tuple(p.candidate.ids), 1) for p in places]
        round_number += 1
    return SearchResult([p.candidate for p in places], len(truncated), merged, steps, nodes)


def divided(draws: int, weights: Sequence[int]) -> list[int]:
    """``draws`` shared out in proportion to ``weights``, the earlier ones first among equals.

    A share of less than one draw may come to none.
    """
    whole = sum(weights)
    shares = [draws * weight // whole for weight in weights]
    rest = [draws * weight % whole for weight in weights]
    for i in sorted(range(len(weights)), key=lambda i: -rest[i])[: draws - sum(shares)]:
        shares[i] += 1
    return shares


def with_score(prefix: Prefix, score: float) -> Prefix:
    """The prefix under another score."""
    return replace(prefix, candidate=replace(prefix.candidate, score=score))
