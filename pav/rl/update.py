"""The update: one optimiser step on the traces of an iteration, in micro-batches.

Where the reward is the likelihood of a reference answer, the answer's tokens follow the chain's.
What both are multiplied with is computed of the forward pass that gives the gradient: a micro-batch
holds whole groups then. A group too large for one is read once more before, without a gradient.

Axes: B traces of a micro-batch, T tokens, A tokens of a reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from pav.rl.advantage import BASELINES
from pav.rl.config import RlConfig
from pav.rl.learner import Learner, Reference, Said
from pav.rl.likelihood import weights
from pav.rl.loss import kl, policy_loss, value_loss
from pav.rl.processes import largest, whole
from pav.verifier.forward import batches, pad


@dataclass(frozen=True)
class Sample:
    """A trace as the loss sees it.

    Attributes:
        ids: prompt and solution, and the reference answer if that is rewarded.
        prompt_length: tokens of the prompt, which carry no loss.
        sampled_T: (solution tokens,) log-probability of each under the policy that sampled it.
        weight_T: (solution tokens,) what its log-probability is multiplied with; with a value
            head, what that is to predict; beside what a likelihood reward adds.
        coefficient: of every token of it in the loss (:func:`pav.rl.loss.normaliser`).
        number: among the traces of this process.
        weight_A: (reference tokens,) as ``weight_T``; None until it is known.
    """

    ids: list[int]
    prompt_length: int
    sampled_T: NDArray[np.float32]
    weight_T: NDArray[np.float64]
    coefficient: float
    number: int = 0
    weight_A: NDArray[np.float64] | None = None

    @property
    def reference_length(self) -> int:
        """Tokens of the reference answer, 0 without one."""
        return len(self.ids) - self.prompt_length - len(self.sampled_T)


@dataclass(frozen=True)
class Group:
    """Chains of one problem, which are weighed against each other."""

    samples: list[Sample]

    @property
    def ids(self) -> list[int]:
        """Of the longest."""
        return max((s.ids for s in self.samples), key=len)


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
        read: number of a sample -> (A,) log-probability of its reference answer's tokens.
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
    read: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, float]:
        """All but ``read``."""
        return {k: v for k, v in vars(self).items() if k != "read"}


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
    with fabric.autocast():
        # Not as set up: DDP gathers buffers in every pass, and processes read unequally many.
        parts = list(_parts(learner.module, samples, config, sums))
    # Processes gather weights and gradients together, so that all make as many passes.
    count = max(1, largest(fabric, len(parts)))
    optimizer.zero_grad()
    for number in range(count):
        batch, counted = (parts[number], sums) if number < len(parts) else ([_NOTHING], Sums())
        with fabric.no_backward_sync(learner, enabled=number + 1 < count):
            loss = _loss(fabric, learner, reference, batch, config, counted)
            # Gradients of processes are averaged; coefficients are of the sum over all.
            fabric.backward(loss * fabric.world_size)
            sums.loss += float(loss.detach())
    for group in optimizer.param_groups:  # the value head's gradient may not scale the policy's
        norm = torch.nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
        sums.norm = sums.norm or float(whole(norm))
    optimizer.step()
    return sums


def _parts(
    learner: Learner, samples: Sequence[Sample], config: RlConfig, sums: Sums
) -> Iterator[list[Sample]]:
    """Micro-batches: of whole groups where their weights are still to be found."""
    if not config.by_likelihood:
        yield from batches(samples, None, config.tokens_per_batch)
        return
    size = config.group
    groups = [Group(list(samples[i : i + size])) for i in range(0, len(samples), size)]
    limit = config.tokens_per_batch // size
    whole = [g for g in groups if len(g.ids) <= limit]
    for part in batches(whole, None, limit):
        yield [s for group in part for s in group.samples]
    large = [s for g in groups if len(g.ids) > limit for s in g.samples]
    read = references_read(learner, large, config.tokens_per_batch)
    sums.read |= {s.number: row for s, row in zip(large, read, strict=True)}
    yield from batches(weighed(large, read, config), None, config.tokens_per_batch)


@torch.no_grad()
def references_read(
    learner: Learner, samples: Sequence[Sample], tokens: int
) -> list[NDArray[np.float64]]:
    """(A,) log-probability of every token of the reference of each sample."""
    found: dict[int, NDArray[np.float64]] = {}
    device = next(learner.parameters()).device
    for batch in batches([replace(s, number=i) for i, s in enumerate(samples)], None, tokens):
        first = min(s.prompt_length for s in batch) - 1
        said: Said = learner(pad(batch).to(device), first)
        found |= {s.number: row for s, row in zip(batch, _ends(said, batch, first), strict=True)}
    return [found[i] for i in range(len(samples))]


def _ends(said: Said, batch: Sequence[Sample], first: int) -> list[NDArray[np.float64]]:
    """Log-probabilities of the references' tokens."""
    rows = said.logprob.detach().double().cpu().numpy()
    ends = [len(s.ids) - 1 - first for s in batch]
    return [row[end - s.reference_length : end]
            for row, end, s in zip(rows, ends, batch, strict=True)]  # fmt: skip


def weighed(
    samples: Sequence[Sample], read: Sequence[NDArray[np.float64]], config: RlConfig
) -> list[Sample]:
    """Samples of whole groups with the weights that a likelihood reward gives them.

    Args:
        samples: those of a group one after the other.
        read: (A,) log-probability of the reference's tokens after each.
        config: which reward.
    """
    found = []
    baseline = BASELINES[config.estimator]
    for i in range(0, len(samples), config.group):
        part, rows = samples[i : i + config.group], read[i : i + config.group]
        weight_G, reference_G = weights(config.reward, rows, baseline)
        found += [
            replace(s, weight_T=s.weight_T + w, weight_A=w_A * config.reference_term)
            for s, w, w_A in zip(part, weight_G, reference_G, strict=True)
        ]
    return found


# What a process without a batch passes through the policy: its gradient is 0.
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
        out = torch.zeros(len(batch), ids.shape[1] - 1 - first, dtype=logprob.dtype)
        for row, start, value in zip(out, rows, values, strict=True):
            row[start : start + len(value)] = torch.as_tensor(value)
        return out.to(fabric.device)

    said: Said = learner(ids, first)
    logprob = said.logprob
    if any(s.reference_length and s.weight_A is None for s in batch):
        read = _ends(said, batch, first)
        sums.read |= {s.number: row for s, row in zip(batch, read, strict=True)}
        batch = weighed(batch, read, config)
    mask = spread([np.ones(len(s.sampled_T)) for s in batch])
    sampled, weight = spread([s.sampled_T for s in batch]), spread([s.weight_T for s in batch])
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
    if any(s.weight_A is not None for s in batch):
        weight_BT = spread([_after_chain(s) for s in batch])
        per_token = per_token + policy_loss(logprob, weight_BT, weight_BT != 0, sampled)
    coefficient = torch.tensor([[s.coefficient] for s in batch]).to(logprob)
    _count(sums, said, mask, sampled, target, start, config)
    return (per_token * coefficient).sum()


def _after_chain(sample: Sample) -> NDArray[np.float64]:
    """Weights of the reference's tokens, 0 before them."""
    reference = np.zeros(0) if sample.weight_A is None else sample.weight_A
    return np.concatenate([np.zeros(len(sample.sampled_T)), reference])


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
