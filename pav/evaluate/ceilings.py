"""How good any predictor could be on labels made of few rollouts: the metrics of one that knows Q.

What a prefix's k of n says of its true value Q falls short the more, the smaller n is, and no
verifier can be better than that. Counts of a single rollout cannot tell a prefix of Q = 0.5 from a
mix of Q = 0 and Q = 1, so ceilings need prefixes with at least two, and n must not have been chosen
by looking at k. Two kinds of estimate are used:

* from moments, unbiased, for Brier: k(n-k) / (n(n-1)) has mean Q(1-Q), the part of the score that
  no predictor can avoid; what is above it is the mean squared error against the true Q;
* from the distribution of Q (in an advantage: of both Qs), deconvolved from the counts by maximum
  likelihood, for everything else: the metric is computed on Qs drawn given each prefix's counts.
  With n = 2 only two moments of Q are known; these ceilings are then good to about 0.02 of AUC and
  0.06 of a rank or an advantage correlation, from n = 4 on to half of that; where the prefixes have
  but a few different Qs, Spearman's is too low by up to 0.1 (``tests/pav/test_metrics.py``).

Axes: N prefixes or steps, C distinct counts, G points of a grid of Qs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from pav.evaluate.metrics import NAMES, NAN, Array, Counts, advantage_metrics, value_metrics

# Fewer prefixes than this tell nothing about the distribution of Q.
MIN_ROWS = 50
# Share of the prefixes whose noise must be known for a ceiling to be one of them all.
_MOST = 0.9
_ROUNDS = 1000


def irreducible_brier(counts: Counts) -> float:
    """Unbiased estimate of E[Q(1-Q)] per rollout: the Brier score of a predictor that knows Q.

    NaN if a prefix has a single rollout: nothing about its noise is known.
    """
    if not len(counts) or not counts.telling_N.all():
        return NAN
    k, n = counts.k_N, counts.n_N
    noise = np.where(counts.exact_N, 0.0, k * (n - k) / (n * np.maximum(n - 1, 1)))
    return float((n * noise).sum() / n.sum())


def ceilings(counts: Counts, seed: int = 0) -> dict[str, float]:
    """The metrics of :func:`value_metrics` for a predictor that knows Q; NaN where nobody can tell.

    From prefixes with two rollouts and more. ``brier`` is :func:`irreducible_brier`.
    """
    telling = counts[counts.telling_N]
    noisy = ~telling.exact_N
    if len(telling) < max(MIN_ROWS, _MOST * len(counts)):
        return {"rows": len(telling)} | dict.fromkeys(NAMES, NAN)
    if not noisy.any():  # the truth itself
        return value_metrics(telling.share_N, telling)
    found = value_metrics(draw_q(telling, np.random.default_rng(seed)), telling)
    found["brier"] = irreducible_brier(telling)
    found["resolution"] = found["reliability"] + found["brier_constant"] - found["brier"]
    return found


def draw_q(counts: Counts, rng: np.random.Generator) -> Array:
    """(N,) one Q for every prefix, given its counts and the distribution of Q over all of them."""
    grid = _grid(65)
    likelihood_CG, of_N, weight_C = _likelihood(counts, grid)
    posterior_CG = likelihood_CG * deconvolve(likelihood_CG, weight_C)
    return grid[_draw(posterior_CG, of_N, rng)]


def deconvolve(likelihood_CG: Array, weight_C: Array, start_G: Array | None = None) -> Array:
    """(G,) shares of the grid points under which the counts C are most likely (EM).

    It starts from ``start_G`` (by default equal shares), to which it stays as close as the counts
    allow, and stops long before it has sharpened into a few spikes.
    """
    points = likelihood_CG.shape[1]
    share_G = np.full(points, 1 / points) if start_G is None else start_G
    weight_C = weight_C / weight_C.sum()
    for _ in range(_ROUNDS):
        share_G = share_G * ((weight_C / (likelihood_CG @ share_G)) @ likelihood_CG)
    return share_G


def _grid(points: int) -> Array:
    """Values from 0 to 1, denser at both ends, where the noise is small."""
    return np.asarray(np.sin(np.linspace(0, np.pi / 2, points)) ** 2)


def _likelihood(counts: Counts, grid_G: Array) -> tuple[Array, NDArray[np.intp], Array]:
    """(C, G) chance of each distinct count, which of them a prefix has (N,), how many have it."""
    kinds, of_N, weight_C = np.unique(
        np.stack([counts.k_N, counts.n_N, counts.exact_N]),
        axis=1,
        return_inverse=True,
        return_counts=True,
    )
    k, n, exact = kinds[:, :, None]
    known = np.asarray(grid_G[None] == k / n, dtype=float)
    chance = np.where(exact > 0, known, binom.pmf(k, n, grid_G[None]))
    return chance, of_N.ravel(), weight_C.astype(float)


def _draw(weight_CG: Array, of_N: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """(N,) a grid point for every prefix."""
    out = np.zeros(len(of_N), dtype=np.intp)
    for c in range(len(weight_CG)):
        rows = np.flatnonzero(of_N == c)
        p = weight_CG[c] / weight_CG[c].sum()
        out[rows] = rng.choice(len(p), size=len(rows), p=p)
    return out


def advantage_ceilings(before: Counts, after: Counts, seed: int = 0) -> dict[str, float]:
    """The metrics of :func:`advantage_metrics` for a predictor that knows both Qs; NaN as there.

    Both Qs of a step are drawn together from their joint distribution. A few rollouts cannot tell
    steps that change nothing from steps that change little, of which ``sign`` is made: it assumes
    that all sizes of change are as likely before the counts are seen, ``sign_low`` that half of
    the steps change nothing. They bracket the truth, or nearly, and meet as n grows.
    """
    telling_N = before.telling_N & after.telling_N
    if telling_N.sum() < max(MIN_ROWS, _MOST * len(telling_N)):
        undefined = dict.fromkeys(("sign", "sign_low", "correlation"), NAN)
        return {"rows": int(telling_N.sum())} | undefined
    before, after = before[telling_N], after[telling_N]
    if (before.exact_N & after.exact_N).all():
        known = advantage_metrics(after.share_N - before.share_N, before, after)
        return known | {"sign_low": known["sign"]}
    grid = _grid(25)
    kinds = [_likelihood(c, grid) for c in (before, after)]
    pairs, of_N, weight_C = np.unique(
        np.stack([kinds[0][1], kinds[1][1]]), axis=1, return_inverse=True, return_counts=True
    )
    both = kinds[0][0][pairs[0]][:, :, None] * kinds[1][0][pairs[1]][:, None, :]
    likelihood_CG = both.reshape(len(weight_C), -1)
    still_G = (np.eye(len(grid)) / len(grid) + np.full((len(grid),) * 2, len(grid) ** -2)) / 2
    found: list[dict[str, float]] = []
    for start_G in (None, still_G.ravel()):
        share_G = deconvolve(likelihood_CG, weight_C.astype(float), start_G)
        drawn = _draw(likelihood_CG * share_G, of_N.ravel(), np.random.default_rng(seed))
        a_N = grid[drawn % len(grid)] - grid[drawn // len(grid)]
        found.append(advantage_metrics(a_N, before, after))
    return found[0] | {"sign_low": min(f["sign"] for f in found)}
