"""``search.dvts``: diverse verifier tree search, N independent subtrees.

Each subtree is a greedy step search of its own: it draws C children of its one prefix and keeps the
best. Nothing crosses between subtrees, so a verifier's error spoils one of them and not all. Two
subtrees that end alike both stay in the final set: their votes are independent.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

from pav.verifier.scoring import StepScorer
from search.methods.beam import BeamSettings, beam_search
from search.methods.context import SearchContext
from search.methods.expand import SearchResult, gather_or_cancel


async def dvts_search(
    context: SearchContext, settings: BeamSettings, scorer: StepScorer
) -> SearchResult:
    """Search one problem in ``settings.n`` subtrees of ``settings.samples`` children a step.

    Subtree i depends on (seed, problem, i) alone: a run with n=m searches the first m of these.
    In ``steps`` and ``nodes`` place i is subtree i.
    """
    alone = replace(settings, n=1)
    trees = await gather_or_cancel(
        beam_search(context, alone, scorer, ("dvts", i)) for i in range(settings.n)
    )
    steps = [
        [
            # A child of the root has parent 0 everywhere.
            (i if number else 0, kept, score, text)
            for i, children in enumerate(rounds)
            for _, kept, score, text in children
        ]
        for number, rounds in enumerate(zip_longest(*(t.steps for t in trees), fillvalue=[]))
    ]
    nodes = [
        [
            replace(node, places=[i] if node.places else [])
            for i, children in enumerate(rounds)
            for node in children
        ]
        for rounds in zip_longest(*(t.nodes for t in trees), fillvalue=[])
    ]
    return SearchResult(
        [c for tree in trees for c in tree.candidates],
        sum(t.truncated for t in trees),
        sum(t.merged for t in trees),
        steps,
        nodes,
    )
