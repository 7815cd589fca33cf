"""Likelihood progress: how much more probable each step makes the reference answer.

The reference is read at every step boundary of a trace as if it were given at once, all boundaries
in one forward pass (:mod:`pav.verifier.forced_answer`). The policy that is trained reads it itself:
no verifier, no rollouts, no labels.

Axes: P states of a trace (state 0 is the problem), A tokens of a reference, N packed sequences, T
tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pav.core.errors import UserError
from pav.rl.learner import LOGIT_BYTES, Learner
from pav.rl.trace import Trace
from pav.verifier.forced_answer import TOLERANCE, Packed, masks, pack
from pav.verifier.forward import batches


@dataclass(frozen=True)
class _Item:
    number: int
    packed: Packed

    @property
    def ids(self) -> list[int]:
        """Packed tokens."""
        return list(range(len(self.packed.ids_T)))


@torch.no_grad()
def log_likelihoods(
    learner: Learner, traces: Sequence[Trace], references: Sequence[list[int]], tokens: int
) -> list[NDArray[np.float64]]:
    """Log-probability (P,) of the reference at every state of every trace.

    Args:
        learner: the policy that reads, at its temperature.
        traces: whole steps of them count.
        references: ids of each trace's, as they follow the end of a step.
        tokens: upper limit of a padded batch.

    Raises:
        UserError: if the policy's attention cannot be given a mask.
    """
    items = [
        _Item(i, pack([*t.prompt, *t.ids], [len(t.prompt) + e for e in (0, *t.ends)], reference))
        for i, (t, reference) in enumerate(zip(traces, references, strict=True))
    ]
    found: dict[int, NDArray[np.float64]] = {}
    for batch in batches(items, None, tokens):
        for item, row_P in zip(batch, _read(learner, [i.packed for i in batch]), strict=True):
            found[item.number] = row_P
    if traces and traces[0].version == 0:
        _check(learner, traces[0], references[0], float(found[0][-1]))
    return [found[i] for i in range(len(items))]


def _read(learner: Learner, batch: Sequence[Packed]) -> list[NDArray[np.float64]]:
    size = max(len(p.ids_T) for p in batch)
    ids_NT = torch.zeros(len(batch), size, dtype=torch.long)
    position_NT = torch.zeros_like(ids_NT)
    # Padding sees itself alone.
    sees_NTT = torch.eye(size, dtype=torch.bool).repeat(len(batch), 1, 1)
    for n, packed in enumerate(batch):
        length = len(packed.ids_T)
        ids_NT[n, :length], position_NT[n, :length] = packed.ids_T, packed.position_T
        sees_NTT[n, :length, :length] = packed.sees_TT
    policy, device = learner.policy, learner.policy.device
    hidden = policy.get_decoder()(
        input_ids=ids_NT.to(device),
        attention_mask=masks(policy, sees_NTT, position_NT),
        position_ids=position_NT.to(device),
        use_cache=False,
    ).last_hidden_state
    return [_sums(learner, hidden[n], packed) for n, packed in enumerate(batch)]


def _sums(learner: Learner, hidden_TD: Tensor, packed: Packed) -> NDArray[np.float64]:
    at_PAD = hidden_TD[packed.from_BA.to(hidden_TD.device)]
    target_PA = packed.ids_T[-packed.from_BA.numel() :].reshape(packed.from_BA.shape)
    vocabulary = learner.policy.get_output_embeddings().weight.shape[0]
    states = max(1, LOGIT_BYTES // (4 * vocabulary * target_PA.shape[1]))
    parts = zip(at_PAD.split(states), target_PA.to(at_PAD.device).split(states), strict=True)
    said = torch.cat([learner.read(at, target).double().sum(1) for at, target in parts])
    return np.asarray(said.cpu().numpy())


def _check(learner: Learner, trace: Trace, reference: list[int], packed: float) -> None:
    """What a packed sequence says is what a plain one says."""
    start = len(trace.prompt) + ([0, *trace.ends][-1])
    ids = torch.tensor([[*trace.prompt, *trace.ids][:start] + reference])
    said = learner(ids.to(learner.policy.device), start - 1)
    plain = float(said.logprob.double().sum())
    tolerance = TOLERANCE if learner.policy.dtype == torch.float32 else 0.05
    if not np.isclose(packed, plain, rtol=tolerance, atol=tolerance):
        raise UserError(
            f"dense is likelihood, and a reference's log-probability is {packed:.4g} in one pass "
            f"for all steps, {plain:.4g} alone: the policy's attention takes no mask; give another "
            "dense"
        )
