"""Losses on counts: what they agree on, and what each is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pav.train.losses import summed_loss

counts = st.integers(1, 20).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def loss(kind: Any, logit: float, k: float, n: float, **more: float) -> float:
    share = more.get("share", 1.0)
    weight = more.get("weight", n * share)
    cells = [torch.full((1, 1), float(v)) for v in (logit, k * share, n * share, weight)]
    return summed_loss(kind, *cells).item()


@given(logit=st.floats(-6, 6), k=st.integers(0, 1))
def test_one_rollout_gives_the_likelihood_losses_one_value(logit: float, k: int) -> None:
    assert loss("hard", logit, k, 1) == pytest.approx(loss("bce", logit, k, 1))


@given(logit=st.floats(-4, 4), counts=counts, traces=st.integers(1, 9))
@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_prefix_in_many_traces_weighs_as_much_as_in_one(
    kind: str, logit: float, counts: tuple[int, int], traces: int
) -> None:
    k, n = counts
    parts = traces * loss(kind, logit, k, n, share=1 / traces)
    assert parts == pytest.approx(loss(kind, logit, k, n), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_every_loss_on_counts_is_least_where_q_is_the_share_of_right_rollouts(kind: str) -> None:
    logits = torch.linspace(-3, 3, 601)
    values = torch.tensor([loss(kind, float(x), 3, 4) for x in logits])
    best = torch.sigmoid(logits[values.argmin()])
    assert best == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("kind", ["bce", "hard", "mse"])
def test_label_that_is_missing_moves_nothing(kind: Any) -> None:
    logits: Tensor = torch.tensor([[0.3, -2.0]], requires_grad=True)
    k, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    summed_loss(kind, logits, k, n, n).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] != 0
    assert logits.grad[0, 1] == 0
