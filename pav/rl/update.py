"""The update: one optimiser step on the traces of an iteration, in micro-batches.

Axes: B traces of a micro-batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from pav.rl.config import RlConfig
from pav.rl.learner import Reference, Said
from pav.rl.loss import kl, policy_loss, value_loss
from pav.verifier.forward import batches, pad


@dataclass(frozen=True)
class Sample:
    """A trace as the loss sees it.

    Attributes:
        ids: prompt and solution.
        prompt_length: tokens of the prompt, which carry no loss.
        sampled_T: (solution tokens,) log-probability of each under the policy that sampled it.
        weight_T: (solution tokens,) what its log-probability is multiplied with; with a value
            head, what that is to predict.
        coefficient: of every token of it in the loss (:func:`pav.rl.loss.normaliser`).
    """

    ids: list[int]
    prompt_length: int
    sampled_T: NDArray[np.float32]
    weight_T: NDArray[np.float64]
    coefficient: float


@dataclass
class Sums:
    """What an update adds up over the tokens of this process.

    Attributes:
        tokens: solution tokens that were computed.
        mismatch: of ``|log p - log p of the sampler|``, before the first step.
        largest: the largest of their ratios, either way round.
        beyond: tokens whose ratio is beyond 2.
        entropy: of exact entropies, in nats.
        k1, k3: of both estimates of the KL divergence from the start.
        clipped: tokens whose ratio was clipped or capped.
        residual, spread: of squared errors of the value head, and of squared targets around their
            mean.
        loss: of the whole step.
        norm: of the gradient, before it is scaled down.
    """

    tokens: float = 0.0
    mismatch: float = 0.0
    largest: float = 1.0
    beyond: float = 0.0
    entropy: float = 0.0
    k1: float = 0.0
    k3: float = 0.0
    clipped: float = 0.0
    residual: float = 0.0
    spread: float = 0.0
    loss: float = 0.0
    norm: float = 0.0


def rate(iteration: int, config: RlConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero, or the peak."""
    warm = config.warmup * config.iterations
    if iteration < warm:
        return (iteration + 1) / (warm + 1)
    if config.schedule == "constant":
        return 1.0
    done = (iteration - warm) / max(1.0, config.iterations - warm)
    return 0.5 * (1 + float(np.cos(np.pi * done)))


def update(
    fabric: Fabric,
    learner: Any,
    optimizer: torch.optim.Optimizer,
    reference: Reference | None,
    samples: Sequence[Sample],
    config: RlConfig,
) -> Sums:
    """One optimiser step.

    Args:
        fabric: of the processes that train together; gradients are those of all their samples.
        learner: a :class:`~pav.rl.learner.Learner` as set up by ``fabric``.
        optimizer: likewise.
        reference: the start; None where no KL divergence is asked for.
        samples: of this process; those whose tokens all have weight 0 may be left out.
        config: settings of the loss.
    """
    sums = Sums()
    parts = list(batches(samples, None, config.tokens_per_batch))
    optimizer.zero_grad()
    for number, batch in enumerate(parts):
        with fabric.no_backward_sync(learner, enabled=number + 1 < len(parts)):
            loss = _loss(fabric, learner, reference, batch, config, sums)
            # Gradients of processes are averaged; coefficients are of the sum over all.
            fabric.backward(loss * fabric.world_size)
            sums.loss += float(loss.detach())
    if not parts:  # the others wait for this process's gradients
        loss = _loss(fabric, learner, None, [_NOTHING], config, Sums())
        fabric.backward(loss)
    for group in optimizer.param_groups:  # the value head's gradient may not scale the policy's
        norm = torch.nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
        sums.norm = sums.norm or float(norm)
    optimizer.step()
    return sums


_NOTHING = Sample([0, 0, 0], 1, np.zeros(2, np.float32), np.zeros(2), 0.0)


def _loss(
    fabric: Fabric,
    learner: Any,
    reference: Reference | None,
    batch: Sequence[Sample],
    config: RlConfig,
    sums: Sums,
) -> Tensor:
    """The part of the loss that ``batch`` is."""
    ids = pad(batch).to(fabric.device)
    first = min(s.prompt_length for s in batch) - 1
    rows = [s.prompt_length - 1 - first for s in batch]

    def spread(values: Sequence[NDArray[np.floating]]) -> Tensor:
        """Values of solution tokens at their places among the targets, 0 elsewhere."""
        out = torch.zeros(len(batch), ids.shape[1] - 1 - first)
        for row, start, value in zip(out, rows, values, strict=True):
            row[start : start + len(value)] = torch.as_tensor(value)
        return out.to(fabric.device)

    mask = spread([np.ones(len(s.sampled_T)) for s in batch])
    sampled, weight = spread([s.sampled_T for s in batch]), spread([s.weight_T for s in batch])
    said: Said = learner(ids, first)
    logprob = said.logprob
    start = None if reference is None else reference.logprob(ids, first)
    target = weight
    if config.estimator == "value":
        weight = weight - said.value.detach() * mask
    if start is not None and config.kl_estimator == "k1":
        # The reward of a token is minus k1; its credit is that of all from it on.
        k1 = (kl(logprob, start, "k1") * mask).detach()
        weight = weight - config.kl * k1.flip(1).cumsum(1).flip(1)
    per_token = policy_loss(logprob, weight, mask, sampled, config.clip, config.importance_cap)
    if start is not None and config.kl_estimator == "k3":
        per_token = per_token + config.kl * kl(logprob, start, "k3") * mask
    if config.estimator == "value":
        per_token = per_token + value_loss(said.value, target, mask)
    coefficient = torch.tensor([[s.coefficient] for s in batch], device=fabric.device)
    _count(sums, said, mask, sampled, target, start, config)
    return (per_token * coefficient).sum()


@torch.no_grad()
def _count(
    sums: Sums,
    said: Said,
    mask: Tensor,
    sampled: Tensor,
    target: Tensor,
    start: Tensor | None,
    config: RlConfig,
) -> None:
    """Add what is logged of a micro-batch."""
    there = mask.bool()
    delta = (said.logprob - sampled)[there]
    sums.tokens += delta.numel()
    sums.mismatch += float(delta.abs().sum())
    if delta.numel():
        sums.largest = max(sums.largest, float(delta.abs().max().exp()))
    sums.beyond += float((delta.abs() > np.log(2)).sum())
    sums.entropy += float(said.entropy[there].sum())
    if start is not None:
        sums.k1 += float(kl(said.logprob, start, "k1")[there].sum())
        sums.k3 += float(kl(said.logprob, start, "k3")[there].sum())
    limit = config.importance_cap or (1 + config.clip if config.clip is not None else np.inf)
    sums.clipped += float((delta > np.log(limit)).sum())
    if config.estimator == "value":
        wanted = target[there]
        sums.residual += float((wanted - said.value[there]).square().sum())
        sums.spread += float((wanted - wanted.mean()).square().sum()) if wanted.numel() else 0.0
