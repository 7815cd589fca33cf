"""Growing solutions step by step: what beam search, its variants and particle filtering share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from pav.verifier.pick import Candidate
from pav.verifier.score import Values
from pav.verifier.scoring import NO_LOGPROBS, StepScorer
from search.methods.context import SearchContext
from search.methods.sample_step import SampledStep, sample_step
from search.run.records import Node

T = TypeVar("T")


@dataclass(frozen=True)
class Prefix:
    """A state of a search: a candidate with what scoring its children needs."""

    candidate: Candidate
    values: Values
    logprobs: np.ndarray


@dataclass(frozen=True)
class SearchResult:
    """What a search ends with.

    Attributes:
        candidates: the final set.
        truncated: children cut by the length cap.
        merged: duplicates that were merged.
        steps: per round (parent, kept, score, text) of every scored child.
        nodes: beside ``steps``, the places and values of every child.
    """

    candidates: list[Candidate]
    truncated: int
    merged: int
    steps: list[list[tuple[int, bool, float, str]]]
    nodes: list[list[Node]]


@dataclass(frozen=True)
class Expander:
    """Draws and scores the steps of one problem.

    Attributes:
        context: problem, policy and engine; its cost is charged as it goes.
        prompt: the problem's ids under the policy.
        scorer: values prefixes.
        score: score of a step from the values before and after it.
    """

    context: SearchContext
    prompt: list[int]
    scorer: StepScorer
    score: Callable[[Values, Values], float]

    async def root(self) -> Prefix:
        """Step 0. A fused verifier values it with the first step that is drawn."""
        values: Values = {}
        if not self.scorer.fused:
            values = (
                await self.scorer.read(self.context.problem, [], [], self.context.cost)
            ).values
        candidate = Candidate(
            ids=[],
            ends=[],
            q={h: [v] for h, v in values.items()},
            score=0.0,
            finished=False,
            truncated=False,
        )
        return Prefix(candidate, values, NO_LOGPROBS)

    async def draw(self, prefix: Prefix, key: tuple[object, ...]) -> SampledStep | Candidate:
        """One step after ``prefix``, its seed derived from ``key``; a candidate if it was cut."""
        ids = prefix.candidate.ids
        step = await sample_step(self.context, self.prompt + ids, key, self.scorer.fused)
        # An empty solution has no step to score.
        if step.truncated or (step.finished and not ids and len(step.ids) == 1):
            return replace(
                prefix.candidate, ids=ids + step.ids, truncated=True, score=float("-inf")
            )
        return step

    async def expanded(self, prefix: Prefix, step: SampledStep) -> Prefix:
        """The prefix with ``step``, scored."""
        ids = prefix.candidate.ids + step.ids
        ends = [*prefix.candidate.ends, len(ids)]
        before, logprobs = prefix.values, prefix.logprobs
        if self.scorer.fused:
            if step.logprobs is None or step.first_heads is None or step.last_heads is None:
                raise RuntimeError("a fused engine returned a step without scores")
            logprobs = np.concatenate([logprobs, step.logprobs])
            if not before:
                before = self.scorer.values(step.first_heads, logprobs[:0], [], [])
            after = self.scorer.values(step.last_heads, logprobs, ids, ends)
        else:
            reading = await self.scorer.read(
                self.context.problem, ids, ends, self.context.cost, logprobs
            )
            after, logprobs = reading.values, reading.logprobs
        candidate = Candidate(
            ids=ids,
            ends=ends,
            q={h: [*(prefix.candidate.q.get(h) or [before[h]]), v] for h, v in after.items()},
            score=self.score(before, after),
            finished=step.finished,
            truncated=False,
        )
        return Prefix(candidate, after, logprobs)

    def node(self, prefix: Prefix, places: list[int]) -> Node:
        """What a viewer of the tree needs beside the entry in ``steps``."""
        q = {h: round(v, 6) for h, v in prefix.values.items()}
        return Node(places, prefix.candidate.finished, q)

    def last_step(self, candidate: Candidate) -> str:
        """Text of a candidate's last step, without its line end."""
        start = candidate.ends[-2] if len(candidate.ends) > 1 else 0
        return self.context.policy.text(candidate.ids[start:]).rstrip("\n")


async def gather_or_cancel(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of ``jobs`` in their order; where one raises, the others are cancelled first."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
