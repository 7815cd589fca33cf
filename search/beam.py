"""``search.beam``: beam search by Q_base + alpha * A_prover (PAV paper, Section 4).

The first step draws N*C children; later the kept beams share N*C draws. Finished and unfinished
candidates compete by the same score for the N places; a finished one draws no more. Duplicates are
merged, so the draws of the next round go to fewer, distinct beams and no width is wasted. The pick
is among finished candidates only.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import numpy as np

from pav.advantage import best_of_k, effective_score
from pav.engine import Engine
from pav.policy import Policy, Sampler
from pav.tasks.base import Problem
from search.records import Candidate
from search.scoring import Cost, Scorer, Values
from search.steps import Step, sample_step


@dataclass(frozen=True)
class BeamSettings:
    """Settings of one beam search.

    Attributes:
        n: places.
        samples: children per place (C; the paper takes 3).
        alpha: weight of the advantage; 0 ranks by Q_base alone.
        prover: a head (``q/<policy>``), or ``bo<K>`` for Best-of-K of the base policy.
        base_head: head of Q_base.
    """

    n: int
    samples: int
    alpha: float
    prover: str
    base_head: str

    def prover_q(self, values: Values) -> float:
        """Q of the prover from the heads' values."""
        if self.prover.startswith("bo"):
            return best_of_k(values[self.base_head], int(self.prover[2:]))
        return values[self.prover]

    def score(self, before: Values, after: Values) -> float:
        """Score of the step between two states."""
        return effective_score(
            after[self.base_head], self.prover_q(before), self.prover_q(after), self.alpha
        )


@dataclass(frozen=True)
class Beam:
    """A state of the search: a candidate with what scoring its children needs."""

    candidate: Candidate
    values: Values
    logprobs: np.ndarray


@dataclass(frozen=True)
class BeamResult:
    """Final set, what was cut or merged, and every scored child by round."""

    candidates: list[Candidate]
    truncated: int
    merged: int
    steps: list[list[tuple[int, bool, float, str]]]


async def beam_search(
    problem: Problem,
    settings: BeamSettings,
    engine: Engine,
    policy: Policy,
    sampler: Sampler,
    scorer: Scorer,
    seed: int,
    cost: Cost,
) -> BeamResult:
    """Search one problem; ``cost`` is charged as it goes."""
    prompt = policy.encode(problem)
    if len(prompt) >= sampler.max_length:
        # Every draw is cut before its first token.
        return BeamResult([], settings.n * settings.samples, 0, [])
    root_values: Values = {}
    if not scorer.fused:
        root_values = await scorer.read(problem, [], [], cost)
    root = Candidate(
        ids=[],
        ends=[],
        q={h: [v] for h, v in root_values.items()},
        score=0.0,
        finished=False,
        truncated=False,
    )
    places = [Beam(root, root_values, np.zeros(0, dtype=np.float32))]
    truncated: list[Candidate] = []
    merged = 0
    steps: list[list[tuple[int, bool, float, str]]] = []
    round_number = 0

    async def grow(parent: int, index: int) -> tuple[int, Beam | Candidate | None]:
        """One child of a place, scored; a bare candidate if truncated, None if a duplicate."""
        beam = places[parent]
        ids = beam.candidate.ids
        step = await sample_step(
            engine,
            policy,
            sampler,
            prompt + ids,
            (seed, problem.id, "beam", round_number, *ids, index),
            cost,
            scorer.fused,
        )
        # An empty solution has no step to score.
        if step.truncated or (step.finished and not ids and len(step.ids) == 1):
            cut = replace(beam.candidate, ids=ids + step.ids, truncated=True, score=float("-inf"))
            return parent, cut
        if (key := tuple(ids + step.ids)) in claimed:
            return parent, None
        # Claimed before it is scored: a duplicate costs the verifier nothing.
        claimed.add(key)
        return parent, await _score(problem, beam, step, settings, scorer, cost)

    while any(not b.candidate.finished for b in places):
        active = [i for i, b in enumerate(places) if not b.candidate.finished]
        draws = settings.samples * (settings.n - (len(places) - len(active)))
        shares = [draws // len(active) + (j < draws % len(active)) for j in range(len(active))]
        claimed: set[tuple[int, ...]] = set()
        grown = await asyncio.gather(
            *(grow(i, c) for i, share in zip(active, shares, strict=True) for c in range(share))
        )
        truncated += [c for _, c in grown if isinstance(c, Candidate)]
        merged += sum(c is None for _, c in grown)
        children = [(parent, c) for parent, c in grown if isinstance(c, Beam)]
        contenders = [(-1, b) for b in places if b.candidate.finished] + children
        # Sorting is stable: ties go to the earlier contender.
        contenders.sort(key=lambda c: -c[1].candidate.score)
        steps.append(
            [
                (parent, rank < settings.n, b.candidate.score, _last_step(policy, b.candidate))
                for rank, (parent, b) in enumerate(contenders)
                if parent >= 0
            ]
        )
        places = [b for _, b in contenders[: settings.n]]
        round_number += 1
    return BeamResult([b.candidate for b in places], len(truncated), merged, steps)


async def _score(
    problem: Problem, beam: Beam, step: Step, settings: BeamSettings, scorer: Scorer, cost: Cost
) -> Beam:
    ids = beam.candidate.ids + step.ids
    ends = [*beam.candidate.ends, len(ids)]
    before, logprobs = beam.values, beam.logprobs
    if scorer.fused:
        if step.logprobs is None or step.first_heads is None or step.last_heads is None:
            raise RuntimeError("a fused engine returned a step without scores")
        logprobs = np.concatenate([logprobs, step.logprobs])
        if not before:
            before = scorer.values(step.first_heads, logprobs[:0], [], [])
        after = scorer.values(step.last_heads, logprobs, ids, ends)
    else:
        after = await scorer.read(problem, ids, ends, cost)
    candidate = Candidate(
        ids=ids,
        ends=ends,
        q={h: [*(beam.candidate.q.get(h) or [before[h]]), v] for h, v in after.items()},
        score=settings.score(before, after),
        finished=step.finished,
        truncated=False,
    )
    return Beam(candidate, after, logprobs)


def _last_step(policy: Policy, candidate: Candidate) -> str:
    start = candidate.ends[-2] if len(candidate.ends) > 1 else 0
    return policy.text(candidate.ids[start:]).rstrip("\n")


def main() -> None:
    """Entry point of ``search.beam``."""
    from pav.cli import run
    from search.commands import BeamConfig, beam

    run(beam, BeamConfig, "search.beam")


if __name__ == "__main__":
    main()
