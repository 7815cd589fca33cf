"""``search.alphallm``: beam search by Q and AlphaLLM's bonus (PAV paper, Appendix K).

Prefixes whose children differ much in value are worth more visits. Among the prefixes s of a round

    score(child of s) = Q(child) + weight * U(s),    U(s) = sqrt(n(s) / sum over s' of n(s')),
    n(s) = 2 * I(s),    I(s) = max over children of |Q(s) - Q(child)|.

The factor 2 cancels. All children of one prefix have the same bonus, so it shifts width between
prefixes; in the first round it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pav.verifier.scoring import StepScorer
from search.methods.beam import BeamSettings, beam_search, with_score
from search.methods.context import SearchContext
from search.methods.expand import Prefix, SearchResult

# C of the paper.
WEIGHT = 0.25


async def alphallm_search(
    context: SearchContext, settings: BeamSettings, weight: float, scorer: StepScorer
) -> SearchResult:
    """Search one problem; of ``settings`` the prover, alpha and ``score_by`` are not used."""
    head = settings.base_head

    def rescore(
        places: Sequence[Prefix], children: list[tuple[int, Prefix]]
    ) -> list[tuple[int, Prefix]]:
        # A fused verifier values the root with its first children: step 0 is in every child.
        importance = dict.fromkeys((i for i, _ in children), 0.0)
        for i, child in children:
            before, after = child.candidate.q[head][-2:]
            importance[i] = max(importance[i], abs(before - after))
        bonus = bonuses(importance, weight)
        return [(i, with_score(c, c.values[head] + bonus[i])) for i, c in children]

    return await beam_search(context, settings, scorer, ("alphallm",), rescore)


def bonuses(importance: dict[int, float], weight: float) -> dict[int, float]:
    """``weight`` * U of every prefix from its importance I; 0 where no child differs from it."""
    total = sum(importance.values())
    if not total:
        return dict.fromkeys(importance, 0.0)
    return {i: weight * math.sqrt(value / total) for i, value in importance.items()}
