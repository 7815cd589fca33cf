"""An engine and verifier that follow a script: what a search does with them is known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pav.policy.cost import Cost
from pav.policy.inference import Sampled
from pav.policy.policy import Policy, Sampler
from pav.tasks.base import Problem
from pav.verifier.scoring import PrefixScore

EOS = 2
PROBLEM = Problem("p", "1+1", "2")


@dataclass
class Scripted:
    """Stands in for engine and verifier: continuations and values by the text of the solution.

    Attributes:
        policy: tokenizer and step rule.
        script: text so far -> continuations; "$" ends a solution, and what ends neither so nor
            with a newline ran into the length cap.
        q: text -> Q of both heads; 0.5 where it is not named.
        by_seed: choose the continuation by the request's seed; else they are drawn in turn.
        drawn: (text so far, continuation) of every draw.
    """

    policy: Policy
    script: dict[str, list[str]]
    q: dict[str, tuple[float, float]] = field(default_factory=dict)
    by_seed: bool = False
    drawn: list[tuple[str, str]] = field(default_factory=list)
    fused: bool = False
    base_head: str = "q/base"
    described: dict[str, Any] = field(default_factory=dict)

    def _ids(self, text: str) -> list[int]:
        return list(self.policy.tokenizer.encode(text, add_special_tokens=False))

    async def sample(
        self, ids: Sequence[int], sampler: Sampler, *, stop_ids: Sequence[int], max_tokens: int,
        seed: int, scores: bool,
    ) -> Sampled:  # fmt: skip
        before = self.policy.text(ids).removeprefix("1+1\n")
        choices = self.script[before]
        turn = sum(b == before for b, _ in self.drawn)
        text = choices[seed % len(choices) if self.by_seed else turn]
        self.drawn.append((before, text))
        whole = self._ids(text.removesuffix("$")) + ([EOS] if text.endswith("$") else [])
        assert len(whole) <= max_tokens
        return Sampled(whole, whole[-1] in stop_ids)

    async def read(
        self,
        problem: Problem,
        ids: Sequence[int],
        ends: Sequence[int],
        cost: Cost,
        known: object = None,
    ) -> PrefixScore:
        text = self.policy.text(ids) + ("$" if ids and ids[-1] == EOS else "")
        base, prover = self.q.get(text, (0.5, 0.5))
        cost.verifier_tokens += 1
        return PrefixScore({"q/base": base, "q/prover": prover})
