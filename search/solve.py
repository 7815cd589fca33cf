"""From a search to its graded record: what the commands and the comparison share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pav.errors import UserError
from pav.policy import Policy
from pav.tasks.base import Problem
from pav.verifier import ORM, Card
from search.beam import BeamSettings, beam_search
from search.best_of_n import sample_traces
from search.pick import Pick, pick
from search.records import Candidate, Record
from search.scoring import Cost, Scorer
from search.session import Session


def beam_settings(
    card: Card, n: int, samples: int, alpha: float | None, prover: str | None
) -> BeamSettings:
    """Settings with the verifier's own defaults filled in.

    Raises:
        UserError: if the prover is neither a head of the verifier nor ``bo<K>``.
    """
    chosen = prover or card.prover_head
    is_bok = chosen.startswith("bo") and chosen[2:].isdigit() and int(chosen[2:]) >= 1
    if not is_bok and chosen not in card.heads:
        raise UserError(
            f"prover is {chosen!r}; give bo<K> (e.g. bo4) or one of the verifier's heads: "
            f"{', '.join(h for h in card.heads if h != ORM)}"
        )
    if samples < 1:
        raise UserError(f"samples is {samples}; give at least 1")
    weight = card.alpha if alpha is None else alpha
    return BeamSettings(n, samples, weight, chosen, card.base_head)


def graded(session: Session, problem: Problem, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with text, answer and grade; an unfinished one is never right."""
    out = []
    for c in candidates:
        text = session.policy.text(c.ids)
        grade = session.task.grade(text, problem)
        right = grade.correct and c.finished
        out.append(replace(c, text=text, answer=grade.answer, correct=right))
    return out


def make_record(
    problem: Problem,
    method: str,
    n: int,
    seed: int,
    settings: dict[str, Any],
    candidates: list[Candidate],
    rule: Pick,
    head: str,
    cost: Cost,
    **extra: Any,
) -> Record:
    """The record of a finished search."""
    chosen = pick(candidates, rule, head)
    return Record(
        problem_id=problem.id,
        question=problem.question,
        gold=problem.gold,
        method=method,
        n=n,
        seed=seed,
        settings=settings,
        answer=None if chosen is None else candidates[chosen].answer,
        correct=chosen is not None and candidates[chosen].correct,
        picked=chosen,
        candidates=candidates,
        policy_tokens=cost.policy_tokens,
        verifier_tokens=cost.verifier_tokens,
        verifier_cached=cost.verifier_cached,
        **extra,
    )


async def beam_record(
    session: Session,
    scorer: Scorer,
    settings: BeamSettings,
    rule: Pick,
    method: str,
    seed: int,
    problem: Problem,
) -> Record:
    """Beam search of one problem, graded."""
    cost = Cost()
    result = await beam_search(
        problem,
        settings,
        session.sampling_engine(scorer),
        session.policy,
        session.sampler,
        scorer,
        seed,
        cost,
    )
    described = {
        "samples": settings.samples,
        "alpha": settings.alpha,
        "prover": settings.prover,
        "pick": rule,
        "scoring": "fused" if scorer.fused else "separate",
        "surprise": scorer.reads_surprise,
        "trunk": scorer.verifier.card.trunk,
    }
    return make_record(
        problem,
        method,
        settings.n,
        seed,
        described,
        graded(session, problem, result.candidates),
        rule,
        settings.base_head,
        cost,
        truncated=result.truncated,
        merged=result.merged,
        steps=result.steps,
    )


async def traces_record(
    session: Session,
    scorer: Scorer | None,
    n: int,
    rule: Pick,
    method: str,
    seed: int,
    problem: Problem,
    policy: Policy | None = None,
) -> Record:
    """``n`` independent solutions of one problem, graded, one of them picked."""
    cost = Cost()
    found = await sample_traces(
        problem,
        n,
        session.sampling_engine(scorer, policy),
        policy or session.policy,
        session.sampler,
        scorer,
        seed,
        cost,
        rule == "min",
    )
    head = scorer.verifier.card.base_head if scorer is not None else ""
    described: dict[str, Any] = {"pick": rule}
    if scorer is not None:
        described |= {
            "scoring": "fused" if scorer.fused else "separate",
            "surprise": scorer.reads_surprise,
            "trunk": scorer.verifier.card.trunk,
        }
    candidates = graded(session, problem, found)
    return make_record(
        problem,
        method,
        n,
        seed,
        described,
        candidates,
        rule,
        head,
        cost,
        truncated=sum(c.truncated for c in candidates),
    )


def repick(record: Record, rule: Pick, first: int | None = None, head: str = "") -> Record:
    """The record under another pick rule, on its ``first`` candidates."""
    candidates = record.candidates[:first]
    chosen = pick(candidates, rule, head)
    return replace(
        record,
        n=len(candidates),
        candidates=candidates,
        picked=chosen,
        answer=None if chosen is None else candidates[chosen].answer,
        correct=chosen is not None and candidates[chosen].correct,
        policy_tokens=sum(c.tokens for c in candidates) or record.policy_tokens,
    )
