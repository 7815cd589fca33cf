"""Weights from the trainer into the engine, and the proof that they arrived."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from pav.core.errors import UserError
from pav.rl.update import Sums


class Updatable(Protocol):
    """An engine whose weights can be replaced while it runs."""

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Serve these weights from now on, under this version."""


def check_mismatch(sums: Sums, limit: float, dtype: str) -> None:
    """End a run whose engine samples from another policy than the one that is trained.

    The log-probabilities that came with the samples are compared with the trainer's own, before its
    first update on them: weights that did not arrive, a stale prefix cache and another temperature
    all show here.

    Args:
        sums: of the first update on the samples.
        limit: of the mean difference.
        dtype: of the engine.

    Raises:
        UserError: if the mean difference is above ``limit``.
    """
    mean = sums.mismatch / max(1.0, sums.tokens)
    if mean > limit:
        raise UserError(
            f"engine and trainer differ: the mean difference of a token's log-probability is "
            f"{mean:.3g}, the largest ratio {sums.largest:.3g}, and {sums.beyond:.0f} of "
            f"{sums.tokens:.0f} tokens are beyond 2 (mismatch_limit {limit:g}); the engine "
            f"computes in {dtype}: serve the policy in float32, or raise mismatch_limit if the "
            "narrower type explains it"
        )
