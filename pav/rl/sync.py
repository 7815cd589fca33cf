"""The proof that the engine samples from the policy that is trained."""

from __future__ import annotations

import numpy as np
from lightning.fabric import Fabric

from pav.core.errors import UserError
from pav.rl.processes import gathered
from pav.rl.update import Sums


def check_mismatch(fabric: Fabric, sums: Sums, limit: float, dtype: str) -> None:
    """End a run whose engine samples from another policy than the one that is trained.

    The log-probabilities that came with the samples are compared with the trainer's own, before its
    first update on them: weights that did not arrive, a stale prefix cache and another temperature
    all show here.

    Args:
        fabric: of the processes that train together; all of them end, or none.
        sums: of the first update on the samples of this process.
        limit: of the mean difference.
        dtype: of the engine.

    Raises:
        UserError: if the mean difference is above ``limit``.
    """
    mine = np.array([sums.mismatch, sums.tokens, sums.beyond, sums.largest])
    rows = np.stack(gathered(fabric, [mine]))
    mismatch, tokens, beyond, _ = rows.sum(0)
    mean, largest = mismatch / max(1.0, tokens), rows[:, 3].max()
    if mean > limit:
        raise UserError(
            f"engine and trainer differ: the mean difference of a token's log-probability is "
            f"{mean:.3g}, the largest ratio {largest:.3g}, and {beyond:.0f} of {tokens:.0f} tokens "
            f"are beyond 2 (mismatch_limit {limit:g}); the engine computes in {dtype}: serve the "
            "policy in float32, or raise mismatch_limit if the narrower type explains it"
        )
