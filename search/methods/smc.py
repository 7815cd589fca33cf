"""``search.smc``: particle filtering (sequential Monte Carlo) with Q as potential.

N particles take a step each, are weighted and resampled, until all are finished. A finished one
stays among those that are resampled, a truncated one has weight 0. After the last step nothing is
resampled: what is left is the final set.

Weights:

* ``change``: Q after the step over Q before it, the change of log Q. The weights of a path multiply
  to its last Q, so that the particles follow policy * Q, as SMC theory has it.
* ``q``: Q after the step, at every step anew.
* ``odds``: Q / (1 - Q), the softmax of Q's logit: with ``multinomial`` resampling this is the
  particle filtering of "Rollout Roulette" (arXiv 2502.01618).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pav.core.seeds import seed_of
from pav.verifier.pick import Candidate
from pav.verifier.scoring import StepScorer
from search.methods.context import SearchContext
from search.methods.expand import Expander, Prefix, SearchResult, gather_or_cancel
from search.run.records import Node

Weight = Literal["change", "q", "odds"]
Resampling = Literal["systematic", "multinomial"]
# Q of 0 or 1 is a rounded one.
TINY = 1e-7


@dataclass(frozen=True)
class SmcSettings:
    """Settings of one particle filter.

    Attributes:
        n: particles.
        head: the Q that weights them.
        weight: how.
        resampling: ``systematic`` (one draw, least noise) or ``multinomial``.
    """

    n: int
    head: str
    weight: Weight = "change"
    resampling: Resampling = "systematic"


async def particle_filter(
    context: SearchContext, settings: SmcSettings, scorer: StepScorer
) -> SearchResult:
    """Search one problem.

    Seeds derive from (seed, problem, "smc", round, prefix, particle), those of the resampling from
    (seed, problem, "smc", round, "resample").
    """
    seed, problem = context.seed, context.problem
    prompt = context.policy.encode(problem)
    if len(prompt) >= context.sampler.max_length:
        return SearchResult([], settings.n, 0, [], [])
    head = settings.head
    expander = Expander(context, prompt, scorer, lambda _, after: after[head])
    particles = [await expander.root()] * settings.n
    truncated = 0
    steps: list[list[tuple[int, bool, float, str]]] = []
    nodes: list[list[Node]] = []

    async def move(index: int) -> Prefix | None:
        """A particle's next state; None if it was truncated."""
        prefix = particles[index]
        if prefix.candidate.finished:
            return prefix
        ids = prefix.candidate.ids
        step = await expander.draw(prefix, (seed, problem.id, "smc", len(steps), *ids, index))
        if isinstance(step, Candidate):
            return None
        # Particles that agree are read by the verifier once.
        key = tuple(ids + step.ids)
        if key not in scored:
            scored[key] = asyncio.ensure_future(expander.expanded(prefix, step))
        return await scored[key]

    while any(not p.candidate.finished for p in particles):
        scored: dict[tuple[int, ...], asyncio.Future[Prefix]] = {}
        moved = await gather_or_cancel(move(i) for i in range(len(particles)))
        truncated += sum(p is None for p in moved)
        drawn = [i for i, p in enumerate(particles) if not p.candidate.finished]
        alive = [i for i, p in enumerate(moved) if p is not None]
        done = all(p is None or p.candidate.finished for p in moved)
        if done:
            ancestors = alive
        else:
            fresh = set(drawn)
            weights = [
                0.0 if p is None else potential(p.candidate.q[head], settings.weight, i in fresh)
                for i, p in enumerate(moved)
            ]
            rng = np.random.default_rng(seed_of(seed, problem.id, "smc", len(steps), "resample"))
            ancestors = resample(weights, settings.n, settings.resampling, rng)
        offspring: dict[int, list[int]] = {i: [] for i in range(len(moved))}
        for place, ancestor in enumerate(ancestors):
            offspring[ancestor].append(place)
        children = [(i, p) for i in drawn if (p := moved[i]) is not None]
        steps.append(
            [
                (i, bool(offspring[i]), p.candidate.score, expander.last_step(p.candidate))
                for i, p in children
            ]
        )
        nodes.append([expander.node(p, offspring[i]) for i, p in children])
        particles = [p for i in ancestors if (p := moved[i]) is not None]
    return SearchResult([p.candidate for p in particles], truncated, 0, steps, nodes)


def potential(q: Sequence[float], weight: Weight, moved: bool) -> float:
    """Weight of a particle from its Q after step 0, 1, ...; ``moved``: by a step of this round."""
    last = min(max(q[-1], TINY), 1 - TINY)
    if weight == "change":
        return last / max(q[-2], TINY) if moved else 1.0
    return last if weight == "q" else last / (1 - last)


def resample(
    weights: Sequence[float], count: int, how: Resampling, rng: np.random.Generator
) -> list[int]:
    """``count`` indices, each drawn in proportion to its weight, in rising order.

    ``systematic``: index i comes floor or ceil of count * share of i times.
    """
    shares: NDArray[np.float64] = np.asarray(weights, dtype=np.float64)
    edges = np.cumsum(shares / shares.sum())
    if how == "systematic":
        points = (np.arange(count) + rng.random()) / count
    else:
        points = np.sort(rng.random(count))
    # Rounding may leave the last edge a hair under 1, or a point on the edge of a weight of 0.
    last = int(np.flatnonzero(shares)[-1])
    return [min(int(i), last) for i in np.searchsorted(edges, points, side="right")]
