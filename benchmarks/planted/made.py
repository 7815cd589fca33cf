"""Many small autoregressive networks (MADE) as one stack of parameters.

Each run of a stack is a network of its own: 10 one-hot tokens in, three hidden layers of 128 masked
units, next-token logits of all 10 positions out. A hidden unit of degree d sees the first d tokens
and feeds the logits of later positions only (Germain et al. 2015). Units are sorted by degree, so
that sampling computes at each position the units that the latest token completes, and no unit
twice.

Axes: R run, B response, H position, A token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.planted.task import LENGTH, VOCABULARY

HIDDEN = 128
LAYERS = 3
DEGREES = np.sort(np.arange(HIDDEN) % (LENGTH - 1) + 1)
# Units of degree at most d are the first FIRST[d + 1]; those of degree d start at FIRST[d].
FIRST = np.searchsorted(DEGREES, np.arange(LENGTH + 2))


def masks() -> list[Tensor]:
    """(in, out) of each layer: 1 where a weight is allowed."""
    tokens = np.repeat(np.arange(LENGTH), VOCABULARY)
    seen = [tokens[:, None] < DEGREES]
    seen += [DEGREES[:, None] <= DEGREES] * (LAYERS - 1)
    seen.append(DEGREES[:, None] <= tokens)
    return [torch.from_numpy(m.astype(np.float32)) for m in seen]


class Stack:
    """Parameters of R networks: ``weights[i]`` (R, in, out), ``biases[i]`` (R, 1, out)."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor]) -> None:
        self.weights, self.biases = weights, biases
        self.masks = masks()

    @staticmethod
    def random(seed: int) -> Stack:
        """One network, initialised as ``torch.nn.Linear`` is, by the inputs that a unit sees."""
        generator = torch.Generator().manual_seed(seed)
        weights, biases = [], []
        for mask in masks():
            # A one-hot input has one active value per position; a dead column has no input at all.
            bound = 1 / mask.sum(0).clamp(min=1).sqrt()
            noise = torch.rand(mask.shape, generator=generator) * 2 - 1
            weights.append((noise * bound * mask)[None])
            biases.append(
                ((torch.rand(mask.shape[1], generator=generator) * 2 - 1) * bound)[None, None]
            )
        return Stack(weights, biases)

    def repeated(self, runs: int) -> Stack:
        """``runs`` copies of a single network, ready to train."""
        return Stack(
            [w.detach().repeat(runs, 1, 1).requires_grad_() for w in self.weights],
            [b.detach().repeat(runs, 1, 1).requires_grad_() for b in self.biases],
        )

    @property
    def parameters(self) -> list[Tensor]:
        """All tensors, for an optimiser."""
        return [*self.weights, *self.biases]

    def mask_gradients(self) -> None:
        """Keep forbidden weights at zero, where they start: call after ``backward``."""
        for weight, mask in zip(self.weights, self.masks, strict=True):
            if weight.grad is not None:
                weight.grad *= mask

    def log_probs(self, tokens_RBH: Tensor) -> Tensor:
        """Log-probabilities (R, B, H) of the tokens of responses."""
        runs, batch, _ = tokens_RBH.shape
        x = torch.zeros(runs, batch, LENGTH, VOCABULARY)
        x.scatter_(3, tokens_RBH[..., None], 1.0)
        x = x.flatten(2)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if i < LAYERS:
                x = x.relu()
        logits = x.unflatten(2, (LENGTH, VOCABULARY))
        # torch's softmax is several times slower than its parts on rows of 15.
        return logits.gather(3, tokens_RBH[..., None])[..., 0] - logits.logsumexp(-1)

    @torch.no_grad()
    def sample(self, batch: int, generator: torch.Generator) -> Tensor:
        """Responses (R, B, H) at temperature 1."""
        weights, biases = self.weights, self.biases
        runs = weights[0].shape[0]
        uniform = torch.rand(LENGTH, runs, batch, 1, generator=generator)
        tokens = torch.empty(runs, batch, LENGTH, dtype=torch.int64)
        onehot = torch.zeros(runs, batch, LENGTH * VOCABULARY)
        units = [torch.empty(runs, batch, HIDDEN) for _ in range(LAYERS)]
        for h in range(LENGTH):
            new = slice(FIRST[h], FIRST[h + 1])  # completed by the token at h - 1
            inputs, width = onehot, h * VOCABULARY
            for i in range(LAYERS if h else 0):
                units[i][:, :, new] = torch.baddbmm(
                    biases[i][:, :, new], inputs[:, :, :width], weights[i][:, :width, new]
                ).relu()
                inputs, width = units[i], int(FIRST[h + 1])
            out = slice(h * VOCABULARY, (h + 1) * VOCABULARY)
            logits = biases[-1][:, :, out]
            if h:
                logits = torch.baddbmm(logits, inputs[:, :, :width], weights[-1][:, :width, out])
            cumulative = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)
            above = uniform[h] * cumulative[..., -1:] > cumulative
            token = above.sum(-1, keepdim=True).clamp(max=VOCABULARY - 1)
            tokens[:, :, h] = token[:, :, 0]
            onehot.scatter_(2, token + h * VOCABULARY, 1.0)
        return tokens
