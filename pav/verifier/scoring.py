"""Scoring steps with a verifier: fused with the policy's sampling, or in an engine of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pav.core.errors import UserError
from pav.core.steps import scoring_position
from pav.policy.cost import Cost, Shape, shape_of
from pav.policy.inference import Engine
from pav.policy.policy import Policy
from pav.tasks.base import Problem
from pav.verifier.calibrate import SURPRISE, Calibrator, surprise
from pav.verifier.checkpoint import Verifier
from pav.verifier.score import Values

NO_LOGPROBS = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class PrefixScore:
    """What a verifier's own engine says of a prefix.

    Attributes:
        values: Q of every head after the last step.
        logprobs: (tokens,) log-probability of each token of the prefix; 0 for the last one of each
            step, which comes after the position at which the step is scored; empty where none is
            read.
    """

    values: Values
    logprobs: np.ndarray = field(default_factory=lambda: NO_LOGPROBS)


class StepScorer(Protocol):
    """What a search asks of a verifier."""

    @property
    def fused(self) -> bool:
        """Whether scores come back with the sampled tokens."""

    @property
    def described(self) -> dict[str, Any]:
        """Settings that belong in a record."""

    @property
    def base_head(self) -> str:
        """Head of Q_base."""

    def values(
        self, logits_H: np.ndarray, logprobs: np.ndarray, ids: Sequence[int], ends: Sequence[int]
    ) -> Values:
        """Values after the last step, from fused scores."""

    async def read(
        self,
        problem: Problem,
        ids: Sequence[int],
        ends: Sequence[int],
        cost: Cost,
        known: np.ndarray = NO_LOGPROBS,
    ) -> PrefixScore:
        """What an engine of the scorer's own says after the last step.

        ``known``: ``logprobs`` of the reading after an earlier step; they are not read again.
        """


@dataclass(frozen=True)
class Scorer:
    """A verifier in service.

    Attributes:
        verifier: heads and calibrators.
        engine: its own engine, or the policy's where it is fused.
        fused: whether scores come back with the sampled tokens.
        reads_surprise: whether calibrators with surprise are used.
        trunk: the trunk as a policy, for its prompt and step rule.
    """

    verifier: Verifier
    engine: Engine
    fused: bool
    reads_surprise: bool
    trunk: Policy
    calibrators: dict[str, Calibrator] = field(init=False)

    def __post_init__(self) -> None:
        card = self.verifier.card
        made = {h: card.calibrator(h, self.reads_surprise) for h in card.heads}
        object.__setattr__(self, "calibrators", made)

    @property
    def base_head(self) -> str:
        """Head of Q_base, empty for an ORM."""
        return self.verifier.card.base_head

    @property
    def shape(self) -> Shape:
        """What its forward FLOPs depend on, beside its rows."""
        return shape_of(self.trunk.path)

    @property
    def described(self) -> dict[str, Any]:
        """Settings that belong in a record."""
        return {
            "scoring": "fused" if self.fused else "separate",
            "surprise": self.reads_surprise,
            "trunk": self.verifier.card.trunk,
        }

    def values(
        self, logits_H: np.ndarray, logprobs: np.ndarray, ids: Sequence[int], ends: Sequence[int]
    ) -> Values:
        """Q of every head after the last step.

        Args:
            logits_H: head logits at the scoring position.
            logprobs: log-probability of each solution token up to there.
            ids: solution ids.
            ends: step ends; empty for step 0.

        Raises:
            UserError: if a score is not finite.
        """
        features = np.zeros(len(SURPRISE), dtype=np.float32)
        if self.reads_surprise and ends:
            features = surprise(logprobs, ids, ends, self.trunk.stepper)[-1]
        raw = logits_H + self.verifier.bias.numpy()
        values, card = {}, self.verifier.card
        for h, head in enumerate(card.heads):
            values[head] = float(self.calibrators[head](raw[h], features))
            if not (math.isfinite(raw[h]) and math.isfinite(values[head])):
                raise UserError(
                    f"head {head} gives {raw[h]} and Q {values[head]} after {len(ids)} tokens: the "
                    f"trunk {card.trunk!r} is damaged, or {card.dtype} is too narrow for it; "
                    "restore it, or train the verifier with another --dtype"
                )
        return values

    async def read(
        self,
        problem: Problem,
        ids: Sequence[int],
        ends: Sequence[int],
        cost: Cost,
        known: np.ndarray = NO_LOGPROBS,
    ) -> PrefixScore:
        """Q of every head after the last step, read by the verifier's own engine."""
        prompt = self.trunk.encode(problem)
        end = ends[-1] if ends else 0
        stop = scoring_position(len(prompt), end) + 1
        sequence = [*prompt, *ids][:stop]
        if not (self.reads_surprise and ends):
            out = await self.engine.read(sequence)
            cost.read(out)
            return PrefixScore(self.values(out.heads, NO_LOGPROBS, ids, ends))
        out = await self.engine.read(sequence, logprobs_from=len(prompt) + len(known))
        cost.read(out)
        logprobs = np.concatenate([known, np.asarray(out.logprobs), np.zeros(1, np.float32)])
        return PrefixScore(self.values(out.heads, logprobs, ids, ends), logprobs)
