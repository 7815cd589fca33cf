"""From a search to its graded record: what the commands and the comparison share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from pav.core.errors import UserError
from pav.grading.sandbox import log_error
from pav.policy.cost import Cost
from pav.policy.policy import Policy
from pav.tasks.base import Grade, Problem
from pav.verifier.pick import EVERY_STEP, Candidate, Pick, StepScore, pick
from pav.verifier.score import Score, ScorerMeta, check_prover
from pav.verifier.scoring import StepScorer
from search.methods.alphallm import alphallm_search
from search.methods.beam import BeamSettings, Duplicates, beam_search
from search.methods.best_of_n import sample_traces
from search.methods.context import SearchContext
from search.methods.dvts import dvts_search
from search.methods.expand import SearchResult
from search.methods.smc import SmcSettings, particle_filter
from search.run.records import Record
from search.run.session import Session


def beam_settings(
    card: ScorerMeta,
    n: int,
    samples: int,
    alpha: float | None,
    prover: str | None,
    score: Score | None = None,
    duplicates: Duplicates | None = None,
) -> BeamSettings:
    """Settings with the verifier's own defaults filled in.

    Raises:
        UserError: if the prover cannot be computed from the verifier's heads.
    """
    chosen = prover or card.prover_head
    check_prover(chosen, card.heads)
    if samples < 1:
        raise UserError(f"samples is {samples}; give at least 1")
    weight = card.alpha if alpha is None else alpha
    return BeamSettings(
        n, samples, weight, chosen, card.base_head, score or "q+a", duplicates or "weigh"
    )


def context_of(
    session: Session,
    scorer: StepScorer | None,
    problem: Problem,
    seed: int,
    cost: Cost,
    policy: Policy | None = None,
) -> SearchContext:
    """What a search of one problem works with; ``policy`` is another than the session's."""
    engine = session.sampling_engine(scorer, policy)
    return SearchContext(problem, engine, policy or session.policy, session.sampler, seed, cost)


async def graded(
    session: Session, problem: Problem, candidates: Sequence[Candidate]
) -> list[Candidate]:
    """Candidates with text, answer and grade; an unfinished one is never right.

    One for which the grader fails counts as wrong.
    """
    texts = [session.policy.text(c.ids) for c in candidates]

    def read() -> list[Grade]:
        return [session.grader.grade(text, problem) for text in texts]

    grades = await asyncio.to_thread(read) if session.grade_in_thread else read()
    return [
        replace(c, text=text, answer=grade.answer, correct=grade.correct and c.finished)
        for c, text, grade in zip(candidates, texts, grades, strict=True)
    ]


async def searched(
    session: Session,
    problem: Problem,
    method: str,
    n: int,
    seed: int,
    settings: dict[str, Any],
    score: StepScore | None,
    head: str,
    search: Callable[[Cost], Awaitable[SearchResult]],
) -> Record:
    """The graded record of one search. Where it raises, it failed: see ``error`` and the log.

    Args:
        session: policy, task and engines.
        problem: what is searched.
        method: of the record.
        n: of the record.
        seed: of the record.
        settings: of the record; ``pick`` is the rule of the final pick.
        score: the step score, for the pick ``pav``.
        head: the Q head of the pick.
        search: charges the cost that it is given.

    Raises:
        UserError: from the search: what the user can mend is wrong for every problem.
    """
    cost = Cost()
    settings = {**settings, "sampler": asdict(session.sampler)}
    record = Record(problem.id, problem.question, problem.gold, method, n, seed, settings)
    try:
        found = await search(cost)
        before = session.grader.errors
        candidates = await graded(session, problem, found.candidates)
        ungraded = session.grader.errors - before
        chosen = pick(candidates, settings["pick"], head, score)
    except UserError:
        raise
    except Exception as error:
        log_error(session.grader.log, f"{method} of problem {problem.id}", error)
        return replace(failed(record, error), **asdict(cost))
    return replace(
        record,
        answer=None if chosen is None else candidates[chosen].answer,
        correct=chosen is not None and candidates[chosen].correct,
        picked=chosen,
        candidates=candidates,
        truncated=found.truncated,
        merged=found.merged,
        steps=found.steps,
        nodes=found.nodes,
        ungraded=ungraded,
        **asdict(cost),
    )


def failed(record: Record, error: Exception) -> Record:
    """``record`` as that of a search that raised: wrong, without candidates."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return replace(
        record, candidates=[], answer=None, correct=False, picked=None, error=said.rstrip(": ")
    )


async def beam_record(
    session: Session,
    scorer: StepScorer,
    settings: BeamSettings,
    rule: Pick,
    method: str,
    seed: int,
    problem: Problem,
    n: int | None = None,
    bonus: float | None = None,
) -> Record:
    """Beam search of one problem, graded; or another search that steps with beam's settings.

    Args:
        session: policy, task and engines.
        scorer: the verifier.
        settings: of the search.
        rule: the final pick.
        method: ``beam``, ``greedy``, ``dvts`` or ``alphallm``.
        seed: run seed.
        problem: what is searched.
        n: what the record calls N, where that is not the places: those of ``greedy`` are 1, and it
            draws as many children a round as a beam of N.
        bonus: weight of AlphaLLM's bonus.
    """

    def search(cost: Cost) -> Awaitable[SearchResult]:
        context = context_of(session, scorer, problem, seed, cost)
        if method == "dvts":
            return dvts_search(context, settings, scorer)
        if bonus is not None:
            return alphallm_search(context, settings, bonus, scorer)
        return beam_search(context, settings, scorer)

    called = settings.n if n is None else n
    described = {
        # Children a round of a greedy search are N * C at its one place.
        "samples": settings.samples * settings.n // called,
        "alpha": settings.alpha,
        "prover": settings.prover,
        "base_head": settings.base_head,
        "score": settings.score_by if bonus is None else "q+bonus",
        "pick": rule,
        **scorer.described,
    }
    if method in ("beam", "alphallm"):
        described["duplicates"] = settings.duplicates
    if bonus is not None:
        described["bonus"] = bonus
    if called != settings.n:
        described["places"] = settings.n
    return await searched(
        session,
        problem,
        method,
        called,
        seed,
        described,
        settings.score,
        settings.base_head,
        search,
    )


async def smc_record(
    session: Session,
    scorer: StepScorer,
    settings: SmcSettings,
    rule: Pick,
    seed: int,
    problem: Problem,
    score: StepScore | None = None,
) -> Record:
    """Particle filtering of one problem, graded."""

    def search(cost: Cost) -> Awaitable[SearchResult]:
        return particle_filter(context_of(session, scorer, problem, seed, cost), settings, scorer)

    described = {
        "samples": 1,
        "head": settings.head,
        "weight": settings.weight,
        "resampling": settings.resampling,
        "pick": rule,
        **scorer.described,
    }
    return await searched(
        session, problem, "smc", settings.n, seed, described, score, scorer.base_head, search
    )


async def traces_record(
    session: Session,
    scorer: StepScorer | None,
    n: int,
    rule: Pick,
    method: str,
    seed: int,
    problem: Problem,
    policy: Policy | None = None,
    score: StepScore | None = None,
) -> Record:
    """``n`` independent solutions of one problem, graded, one of them picked."""

    async def search(cost: Cost) -> SearchResult:
        context = context_of(session, scorer, problem, seed, cost, policy)
        found = await sample_traces(context, n, scorer, rule in EVERY_STEP)
        return SearchResult(found, sum(c.truncated for c in found), 0, [], [])

    described: dict[str, Any] = {"pick": rule}
    if scorer is not None:
        described |= scorer.described
    head = scorer.base_head if scorer is not None else ""
    return await searched(session, problem, method, n, seed, described, score, head, search)


def pick_again(
    record: Record,
    rule: Pick,
    first: int | None = None,
    head: str = "",
    score: StepScore | None = None,
) -> Record:
    """The record under another pick rule, on its ``first`` candidates."""
    candidates = record.candidates[:first]
    chosen = pick(candidates, rule, head, score)
    return replace(
        record,
        n=len(candidates),
        candidates=candidates,
        picked=chosen,
        answer=None if chosen is None else candidates[chosen].answer,
        correct=chosen is not None and candidates[chosen].correct,
        policy_tokens=sum(c.tokens for c in candidates) or record.policy_tokens,
    )
