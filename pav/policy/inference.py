"""What a model in service is asked and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pav.core.steps import Ending
from pav.policy.policy import Sampler

# Head rows are served divided by this (a power of two, hence exact) so that they weigh next to
# nothing in the softmax's normaliser and log-probabilities stay those of the model itself.
SCORE_SCALE = 8.0


@dataclass(frozen=True)
class Sampled:
    """A sampled continuation.

    Attributes:
        ids: the tokens, the stop token included.
        stopped: whether a stop token ended it (else the length cap did).
        logprobs: (tokens,) log-probability of each token in the served softmax (score rows
            included); only where they or scores were asked for.
        heads: (tokens, heads) logit of every head at the position that predicts each token.
        prefilled: tokens of the given prefix that were computed.
        cached: tokens of it taken from the prefix cache.
        version: of the weights that sampled it; 0 for those of the model's directory.
    """

    ids: list[int]
    stopped: bool
    logprobs: np.ndarray | None = None
    heads: np.ndarray | None = None
    prefilled: int = 0
    cached: int = 0
    version: int = 0


@dataclass(frozen=True)
class Read:
    """What a model says of a given sequence.

    Attributes:
        heads: (heads,) logits at the last position.
        logprobs: log-probability of every token that was asked for; None if none was.
        computed: tokens computed.
        cached: tokens taken from the prefix cache.
        gaps: further readings, of what the prefix cache does not remember.
    """

    heads: np.ndarray
    logprobs: np.ndarray | None
    computed: int
    cached: int
    gaps: tuple[Read, ...] = ()


@dataclass
class Usage:
    """Tokens an engine has worked through."""

    generated: int = 0
    prefilled: int = 0
    cached: int = 0


class Engine(Protocol):
    """A model in service, wherever it runs: in this process, in another, on another machine."""

    usage: Usage

    @property
    def busy(self) -> int:
        """Requests that wait for a step."""

    def step(self) -> None:
        """Work on what waits; resolve what is finished."""

    async def sample(
        self,
        ids: Sequence[int],
        sampler: Sampler,
        *,
        stop_ids: Sequence[int],
        max_tokens: int,
        seed: int,
        scores: bool = False,
        logprobs: bool = False,
        until: Ending | None = None,
    ) -> Sampled:
        """Sample up to ``max_tokens`` after ``ids``."""

    async def read(self, ids: Sequence[int], *, logprobs_from: int | None = None) -> Read:
        """Heads after ``ids``, and log-probabilities of the tokens from an index on."""
