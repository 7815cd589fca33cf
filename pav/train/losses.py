"""Losses on Monte-Carlo counts: what a head's logit is told by k successes of n rollouts.

Axes: N labelled positions, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

# hard: BCE on labels that data.hardened() made 0 or 1.
Loss = Literal["bce", "hard", "mse"]


def summed_loss(
    kind: Loss,
    logits_NH: Tensor,
    k_NH: Tensor,
    n_NH: Tensor,
    weight_NH: Tensor,
) -> Tensor:
    """The loss summed over all labels (a scalar); dividing by ``weight_NH.sum()`` gives its mean.

    Args:
        kind: ``bce`` on k/n, ``mse`` of Q against k/n.
        logits_NH: head logits.
        k_NH: right rollouts, times the share of its prefix that a position stands for.
        n_NH: rollouts, times that share; 0 where a head has no label.
        weight_NH: n times the weight of the label's class.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    target = k_NH / n_NH.clamp_min(1e-9)
    if kind == "mse":
        return (weight_NH * (torch.sigmoid(logits_NH) - target) ** 2).sum()
    return binary_cross_entropy_with_logits(logits_NH, target, weight=weight_NH, reduction="sum")
