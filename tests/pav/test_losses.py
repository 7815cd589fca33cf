"""Losses on counts: what they agree on, and what each is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom
from torch import Tensor

from pav.train.losses import summed_loss

counts = st.integers(1, 20).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def loss(kind: Any, logit: float, k: float, n: float, *, spread: float = 2.0, **more: Any) -> float:
    share = more.get("share", 1.0)
    weight = more.get("weight", n * share)
    cells = [torch.full((1, 1), float(v)) for v in (logit, k * share, n * share, share, weight)]
    return summed_loss(kind, *cells, torch.tensor([spread])).item()


@given(logit=st.floats(-6, 6), k=st.integers(0, 1), spread=st.floats(-2, 6))
def test_one_rollout_gives_the_likelihood_losses_one_value(
    logit: float, k: int, spread: float
) -> None:
    bce = loss("bce", logit, k, 1)
    assert loss("hard", logit, k, 1) == pytest.approx(bce)
    assert loss("beta_binomial", logit, k, 1, spread=spread) == pytest.approx(bce, abs=1e-4)


@given(logit=st.floats(-5, 5), counts=counts, spread=st.floats(-1, 5))
def test_beta_binomial_is_scipys(logit: float, counts: tuple[int, int], spread: float) -> None:
    k, n = counts
    mean, size = 1 / (1 + math.exp(-logit)), math.exp(spread)
    expected = -betabinom.logpmf(k, n, mean * size, (1 - mean) * size) + math.log(math.comb(n, k))
    assert loss("beta_binomial", logit, k, n, spread=spread) == pytest.approx(expected, abs=1e-3)


@given(logit=st.floats(-4, 4), counts=counts)
def test_beta_binomial_without_scatter_is_bce_on_counts(
    logit: float, counts: tuple[int, int]
) -> None:
    k, n = counts
    assert loss("beta_binomial", logit, k, n, spread=9.0) == pytest.approx(
        loss("bce", logit, k, n), rel=0.05, abs=0.02
    )


@given(logit=st.floats(-4, 4), counts=counts, traces=st.integers(1, 9))
@pytest.mark.parametrize("kind", ["bce", "mse", "beta_binomial"])
def test_prefix_in_many_traces_weighs_as_much_as_in_one(
    kind: str, logit: float, counts: tuple[int, int], traces: int
) -> None:
    k, n = counts
    parts = traces * loss(kind, logit, k, n, share=1 / traces)
    assert parts == pytest.approx(loss(kind, logit, k, n), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", ["bce", "mse", "beta_binomial"])
def test_every_loss_on_counts_is_least_where_q_is_the_share_of_right_rollouts(kind: str) -> None:
    logits = torch.linspace(-3, 3, 601)
    values = torch.tensor([loss(kind, float(x), 3, 4, spread=9.0) for x in logits])
    best = torch.sigmoid(logits[values.argmin()])
    assert best == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("kind", ["bce", "hard", "mse", "beta_binomial"])
def test_label_that_is_missing_moves_nothing(kind: Any) -> None:
    logits: Tensor = torch.tensor([[0.3, -2.0]], requires_grad=True)
    k, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    spread = torch.zeros(2, requires_grad=True)
    summed_loss(kind, logits, k, n, torch.ones(1, 1), n, spread).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] != 0
    assert logits.grad[0, 1] == 0
    assert spread.grad is None or (spread.grad.isfinite().all() and spread.grad[1] == 0)
