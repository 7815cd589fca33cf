"""Losses on Monte-Carlo counts: what a head's logit is told by k successes of n rollouts.

Axes: N labelled positions, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

# hard: BCE on labels that data.hardened() made 0 or 1.
Loss = Literal["bce", "hard", "mse", "beta_binomial"]
# A concentration above this is a binomial for any n we meet, and lgamma loses digits beyond it.
_MAX_LOG_SPREAD = 9.0


def summed_loss(
    kind: Loss,
    logits_NH: Tensor,
    k_NH: Tensor,
    n_NH: Tensor,
    share_N1: Tensor,
    weight_NH: Tensor,
    log_spread_H: Tensor | None = None,
) -> Tensor:
    """The loss summed over all labels (a scalar); dividing by ``weight_NH.sum()`` gives its mean.

    Args:
        kind: ``bce`` on k/n, ``mse`` of Q against k/n, ``beta_binomial`` likelihood of k of n.
        logits_NH: head logits.
        k_NH: right rollouts, times the share.
        n_NH: rollouts, times the share; 0 where a head has no label.
        share_N1: share of its prefix that a position stands for (1 / traces that hold it).
        weight_NH: n times the weight of the label's class.
        log_spread_H: log concentration of every head (``beta_binomial`` only): rollouts of a prefix
            scatter more than a binomial around what the head can tell of that prefix.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    if kind == "mse":
        target = k_NH / n_NH.clamp_min(1e-9)
        return (weight_NH * (torch.sigmoid(logits_NH) - target) ** 2).sum()
    if kind == "beta_binomial":
        assert log_spread_H is not None
        return _beta_binomial(logits_NH, k_NH, n_NH, share_N1, weight_NH, log_spread_H)
    target = k_NH / n_NH.clamp_min(1e-9)
    return binary_cross_entropy_with_logits(logits_NH, target, weight=weight_NH, reduction="sum")


def _beta_binomial(
    logits: Tensor, k: Tensor, n: Tensor, share: Tensor, weight: Tensor, log_spread: Tensor
) -> Tensor:
    import torch

    # lgamma differences of large numbers: single precision is not enough.
    right, count = (k / share).double(), (n / share).double()
    spread = log_spread.clamp(max=_MAX_LOG_SPREAD).exp().double()
    mean = torch.sigmoid(logits.double()).clamp(1e-6, 1 - 1e-6)
    a, b = mean * spread, (1 - mean) * spread
    wrong = count - right
    likelihood = (
        torch.lgamma(right + a)
        - torch.lgamma(a)
        + torch.lgamma(wrong + b)
        - torch.lgamma(b)
        - torch.lgamma(count + a + b)
        + torch.lgamma(a + b)
    )
    # The class weight alone: n is in the likelihood already, as in the weight of the other losses.
    class_weight = (weight / n.clamp_min(1e-9)) * share
    return -(class_weight.double() * likelihood).sum().to(logits.dtype)
