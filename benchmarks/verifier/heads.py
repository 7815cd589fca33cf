"""A head and a loss that the study compares with the product's.

Axes: N labelled positions, H heads.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from numpy import ndarray
from torch import Tensor, nn
from transformers import PreTrainedModel

from pav.train.batches import PositionRows, Traces
from pav.train.config import TrainConfig
from pav.train.fit import VerifierModule
from pav.verifier.trunk import HeadedTrunk

HeadKind = Literal["linear", "mlp"]
Loss = Literal["bce", "hard", "mse", "beta_binomial"]
WIDTH = 256
# At the rate of a linear head it overshoots.
MLP_RATE = 1e-3
# A concentration above this is a binomial for any n we meet, and lgamma loses digits beyond it.
MAX_LOG_SPREAD = 9.0


class MlpTrunk(HeadedTrunk):
    """A trunk under heads with one hidden layer, which vLLM cannot serve."""

    def __init__(self, trunk: PreTrainedModel, heads: int) -> None:
        drawn = torch.get_rng_state()
        super().__init__(trunk, heads)
        # Its weights are the first that a seed draws, as those of linear heads are.
        torch.set_rng_state(drawn)
        last = nn.Linear(WIDTH, heads)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = nn.Linear(trunk.config.hidden_size, WIDTH)
        self.add_module("head", nn.Sequential(first, nn.SiLU(), last))

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Head logits (..., H) of hidden states (..., D)."""
        logits: Tensor = self.get_submodule("head")(hidden.float())
        return logits


def widen(model: HeadedTrunk, width: int) -> None:
    """Let heads read ``width`` numbers."""
    first = model.get_submodule("head.0" if isinstance(model, MlpTrunk) else "head")
    assert isinstance(first, nn.Linear)
    if first.in_features == width:
        return
    wider = nn.Linear(width, first.out_features)
    if isinstance(model, MlpTrunk):
        model.get_submodule("head").add_module("0", wider)
        return
    nn.init.zeros_(wider.weight)
    nn.init.zeros_(wider.bias)
    model.head = wider


class BetaBinomialModule(VerifierModule):
    """Heads fitted by the likelihood of k of n.

    Rollouts of a prefix scatter more than a binomial around what a head can tell of that prefix: a
    log concentration of every head is fitted beside it. Hidden states have one number more, the
    share of its prefix that a position stands for.
    """

    def __init__(
        self, model: HeadedTrunk, weight_2H: ndarray, config: TrainConfig, steps: int = 1
    ) -> None:
        super().__init__(model, weight_2H, config, steps)
        self.log_spread = nn.Parameter(torch.full((model.heads,), 2.0))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        found = super().configure_optimizers()
        found["optimizer"].param_groups[0]["params"].append(self.log_spread)
        return found

    def logits(self, batch: PositionRows | Traces) -> Tensor:
        """Head logits (N, H)."""
        assert isinstance(batch, PositionRows)
        return self.model.head_logits(batch.hidden_ND[:, :-1])

    def summed(self, logits_NH: Tensor, batch: PositionRows | Traces, weight_NH: Tensor) -> Tensor:
        """The loss summed over the labels of a batch."""
        assert isinstance(batch, PositionRows)
        return beta_binomial(
            logits_NH, batch.k_NH, batch.n_NH, batch.hidden_ND[:, -1:], weight_NH, self.log_spread
        )


def beta_binomial(
    logits: Tensor, k: Tensor, n: Tensor, share: Tensor, weight: Tensor, log_spread: Tensor
) -> Tensor:
    """Negative log-likelihood summed over all labels (a scalar).

    Args:
        logits: (N, H) of heads.
        k: (N, H) right rollouts, times the share.
        n: (N, H) rollouts, times the share; 0 where a head has no label.
        share: (N, 1) share of its prefix that a position stands for.
        weight: (N, H) n times the weight of the label's class.
        log_spread: (H,) log concentrations.
    """
    # lgamma differences of large numbers: single precision is not enough.
    right, count = (k / share).double(), (n / share).double()
    spread = log_spread.clamp(max=MAX_LOG_SPREAD).exp().double()
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
