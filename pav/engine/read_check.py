"""The start-up check of an engine that reads: a cached beginning must not change what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

import numpy as np

from pav.core.errors import UserError
from pav.policy.inference import Engine, Read

# Mean difference in nats. Half precision stays a tenth of it; a shift by one token is above 1.
ALLOWED = 0.2
TOKENS = 100


class HeadedEngine(Engine, Protocol):
    """What is checked."""

    max_length: int
    score_ids: list[int]

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes."""


def check_reads(engine: HeadedEngine) -> None:
    """Compare the log-probabilities of one text, read anew and read with its beginning cached.

    Takes about a second; leaves an empty prefix cache and no usage. May be called where an event
    loop runs: an engine that is first asked there loads there.

    Raises:
        UserError: if they differ.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:

        async def alone() -> None:
            _compare(engine)

        asyncio.run(alone())
    else:
        _compare(engine)


def _compare(engine: HeadedEngine) -> None:
    length = min(TOKENS, engine.max_length - 1)
    if length < 2:
        return
    # Any tokens do, as long as what is said of them differs; the heads' ids come after them.
    ids = [int(i) for i in np.random.default_rng(0).integers(0, engine.score_ids[0], length)]
    engine.reset_prefix_cache()
    anew, cached = (_waited_for(engine, engine.read(ids, logprobs_from=1)) for _ in range(2))
    engine.reset_prefix_cache()
    engine.usage = type(engine.usage)()
    assert anew.logprobs is not None and cached.logprobs is not None
    off = float(np.abs(anew.logprobs - cached.logprobs).mean())
    if not off <= ALLOWED:  # NaN, too
        raise UserError(
            f"vLLM says other things of a text whose beginning it has cached than of the same text "
            f"anew (log-probabilities differ by {off:.2g} on average): scores would be wrong. Set "
            "VLLM_USE_V2_MODEL_RUNNER=0 in the environment, or search with --surprise false"
        )


def _waited_for(engine: HeadedEngine, reading: Coroutine[Any, Any, Read]) -> Read:
    """What a reading returns, the engine stepped meanwhile; the event loop makes no turn."""
    try:
        while True:
            reading.send(None)
            while engine.busy:
                engine.step()
    except StopIteration as returned:
        found: Read = returned.value
        return found
