"""The start-up check of an engine that reads: a cached beginning must not change what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pav.drive import drive
from pav.errors import UserError

if TYPE_CHECKING:
    from pav.engine import Engine, Read

# Mean difference in nats. Half precision stays a tenth of it; a shift by one token is above 1.
ALLOWED = 0.2
TOKENS = 100


def check_reads(engine: Engine) -> None:
    """Compare the log-probabilities of one text, read anew and read with its beginning cached.

    Takes about a second; leaves an empty prefix cache and no usage.

    Raises:
        UserError: if they differ.
    """
    length = min(TOKENS, engine.max_length - 1)
    # Any tokens do, as long as what is said of them differs; the heads' ids come after them.
    if length < 2:
        return
    ids = [int(i) for i in np.random.default_rng(0).integers(0, engine.score_ids[0], length)]

    async def both() -> tuple[Read, Read]:
        anew = await engine.read(ids, logprobs_from=1)
        return anew, await engine.read(ids, logprobs_from=1)

    found: list[tuple[Read, Read]] = []
    engine.reset_prefix_cache()
    drive([engine], [both], found.append, 1)
    engine.reset_prefix_cache()
    engine.usage = type(engine.usage)()
    anew, cached = found[0]
    assert anew.logprobs is not None and cached.logprobs is not None
    off = float(np.abs(anew.logprobs - cached.logprobs).mean())
    if not off <= ALLOWED:  # NaN, too
        raise UserError(
            f"vLLM says other things of a text whose beginning it has cached than of the same text "
            f"anew (log-probabilities differ by {off:.2g} on average): scores would be wrong. Set "
            "VLLM_USE_V2_MODEL_RUNNER=0 in the environment, or search with --surprise false"
        )
