"""Losses per token, and the one number that they are divided by.

Nothing here reduces over a batch: ``(loss_BT * coefficient_B[:, None]).sum()``, added up over
micro-batches and ranks, is the loss of an optimiser step (:func:`normaliser`).

Axes: B traces, T tokens, V vocabulary. Where one starts with logits of T tokens, its results have
T - 1: those of the next tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pav.core.errors import UserError

# Logits over a real vocabulary are taken this many bytes at a time.
_LOGIT_BYTES = 1 << 29

Estimator = Literal["k1", "k3"]
Normalise = Literal["traces", "sequences", "tokens"]


def token_logprobs(logits_BTV: Tensor, ids_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and exact entropies (nats), both (B, T - 1), of ``ids_BT[:, 1:]``.

    At least float32 whatever the logits are; entropies carry no gradient.

    Args:
        logits_BTV: logits after every token of ``ids_BT``.
        ids_BT: token ids, padded; what is said at padding means nothing.
        temperature: the one that was sampled at; logits are divided by it.
    """
    tokens, vocabulary = logits_BTV.shape[1:]
    rows = max(1, _LOGIT_BYTES // (4 * vocabulary * max(1, tokens)))
    logprobs, entropies = [], []
    for logits, ids in zip(logits_BTV.split(rows), ids_BT.split(rows), strict=True):
        logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        chosen = logits.gather(-1, ids[:, 1:, None])[..., 0]
        logprobs.append(chosen - logits.logsumexp(-1))
        with torch.no_grad():
            entropies.append(torch.special.entr(logits.softmax(-1)).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def policy_loss(
    logprob_BT: Tensor,
    weight_BT: Tensor,
    mask_BT: Tensor,
    sampled_BT: Tensor,
    clip: float | None = None,
    importance_cap: float | None = None,
) -> Tensor:
    """Policy-gradient loss (B, T) of every token, to be minimised; 0 where ``mask_BT`` is.

    On policy, without ``clip`` and ``importance_cap``: ``-weight * logprob``, whose gradient is
    that of Eq. 5.

    Args:
        logprob_BT: log-probabilities under the policy that is trained.
        weight_BT: see ``pav.rl.advantage.token_weights``; no gradient flows into it.
        mask_BT: True at tokens that the policy wrote: not at the prompt, nor at padding.
        sampled_BT: log-probabilities under which the tokens were sampled. Read with ``clip`` or
            ``importance_cap`` only.
        clip: for several updates per batch: PPO's ``-min(ratio * weight, clip(ratio, 1 - clip,
            1 + clip) * weight)``, ratio = exp(logprob - sampled) (arXiv 1707.06347, Eq. 7).
        importance_cap: for a sampler that differs from the trainer: the loss on policy times
            min(ratio, importance_cap), taken as a constant.

    Raises:
        UserError: for both, which would weigh by the same ratio twice.
    """
    if clip is not None and importance_cap is not None:
        raise UserError(
            f"clip is {clip} and importance_cap is {importance_cap}, which both weigh by the same "
            "ratio; give one of them"
        )
    mask = mask_BT.bool()
    weight = torch.where(mask, weight_BT, 0).detach().to(logprob_BT.dtype)
    logprob = torch.where(mask, logprob_BT, 0)
    if clip is None and importance_cap is None:
        return -weight * logprob
    ratio = (logprob - torch.where(mask, sampled_BT, 0).detach()).exp()
    if importance_cap is not None:
        return -weight * ratio.detach().clamp(max=importance_cap) * logprob
    assert clip is not None
    return -torch.minimum(ratio * weight, ratio.clamp(1 - clip, 1 + clip) * weight)


def kl(logprob_BT: Tensor, reference_BT: Tensor, estimator: Estimator) -> Tensor:
    """Estimates (B, T) of KL(policy || reference) at every token that the policy sampled.

    Both estimate the divergence itself without bias on the policy's own samples. Their gradients
    differ (arXiv 2506.09477):

    * ``k1`` = log(p / r). *In a reward* (a constant taken off the weights of the token and of those
      before it) the policy gradient is that of the divergence, unbiased. *As a loss* its expected
      gradient is 0: noise, no pull.
    * ``k3`` = r / p - 1 - log(r / p), never negative and of smaller variance. *As a loss* its
      expected gradient is that of the *other* divergence, KL(reference || policy), at the states
      that the policy visits: biased, but the same to first order where they are close. *In a
      reward* it leaves out its own derivative and is biased, too.

    Args:
        logprob_BT: log p of the sampled tokens under the policy.
        reference_BT: log r of them under the reference.
        estimator: ``k1`` or ``k3``.
    """
    log_ratio = reference_BT - logprob_BT
    return -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio


def normaliser(lengths_B: Sequence[int], how: Normalise) -> NDArray[np.float64]:
    """Coefficient (B,) of the tokens of every trace: the sum over ``loss * coefficient`` is the
    loss of the whole optimiser step, whatever micro-batches and ranks it is split into.

    Args:
        lengths_B: solution tokens of *all* traces of the optimiser step: those of other ranks, and
            those left out of the computation because they weigh nothing.
        how: ``traces``: sum over a trace's tokens, mean over traces, which is the expectation of
            Eq. 5. ``sequences``: mean over a trace's tokens, then over traces; a token of a long
            trace counts less. ``tokens``: mean over all tokens.
    """
    lengths = np.maximum(np.asarray(lengths_B, dtype=np.float64), 1)
    if how == "traces":
        return np.full(len(lengths), 1 / len(lengths))
    if how == "sequences":
        return np.asarray(1 / (len(lengths) * lengths))
    return np.full(len(lengths), 1 / lengths.sum())


def value_loss(value_BT: Tensor, target_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Squared error (B, T) of the values before every token; 0 where ``mask_BT`` is.

    Args:
        value_BT: what the value head says before the token was sampled.
        target_BT: return of the token, its weight without a baseline: Q + alpha * A.
        mask_BT: see :func:`policy_loss`.
    """
    return torch.where(mask_BT.bool(), value_BT - target_BT.detach().to(value_BT.dtype), 0) ** 2
