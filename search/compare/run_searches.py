"""The searches behind a comparison, each in a file that a repeat resumes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pav.tasks.base import Problem
from pav.verifier.checkpoint import Verifier
from pav.verifier.pick import Pick, check_pick
from pav.verifier.scoring import Scorer
from search.compare.plan import CompareConfig, Method
from search.compare.results import MethodResult, make_result
from search.methods.alphallm import WEIGHT
from search.methods.beam import BeamSettings
from search.methods.smc import SmcSettings
from search.run.session import Session
from search.run.solve import beam_record, beam_settings, pick_again, smc_record
from search.run.workers import Search


@dataclass(frozen=True)
class Comparison:
    """What every search of a comparison needs.

    Attributes:
        config: the comparison.
        verifiers: by the name that methods give.
        session: policy, task and engines.
        problems: what is searched.
        output: where records go.
    """

    config: CompareConfig
    verifiers: dict[str, Verifier]
    session: Session
    problems: list[Problem]
    output: Path

    def file(self, *parts: object) -> Path:
        """Where the records of one search go, named by what changes them."""
        text = "-".join(map(str, parts))
        return self.output / (
            "".join(c if c.isalnum() or c in "-." else "_" for c in text) + ".jsonl"
        )


def prepared(comparison: Comparison, method: Method) -> tuple[Scorer, Pick]:
    """(scorer, final pick) of a search; its engines are known then, and not yet loaded.

    Raises:
        UserError: if a setting does not fit the verifier.
    """
    verifier = comparison.verifiers[str(method.verifier)]
    scorer = comparison.session.scorer(verifier, method.scoring, method.surprise, None)
    comparison.session.sampling_engine(scorer)
    rule = rule_of(comparison, method)
    check_pick(rule, verifier.card.heads, verifier.card.base_head, str(method.verifier))
    for n in method.n or comparison.config.n:
        _beam_settings(comparison, method, n)
    return scorer, rule


def search_results(comparison: Comparison, method: Method) -> list[MethodResult]:
    """A search (all but best-of-N) at all its widths."""
    config, session = comparison.config, comparison.session
    verifier = comparison.verifiers[str(method.verifier)]
    scorer, rule = prepared(comparison, method)
    results = []
    for n in method.n or config.n:
        settings = _beam_settings(comparison, method, n)
        # N of a greedy search is its share of children, not its places.
        places = {"places": 1} if method.kind == "greedy" else {}
        by_seed, files, seconds = [], [], 0.0
        for seed in config.seeds:
            search: Search
            if method.kind == "smc":
                particles = _particles(method, settings)
                search = partial(
                    smc_record, session, scorer, particles, rule, seed, score=settings.score
                )
            else:
                bonus = WEIGHT if method.kind == "alphallm" else None
                search = partial(
                    beam_record, session, scorer, settings, rule, method.kind, seed, n=n,
                    bonus=bonus,
                )  # fmt: skip
            # Named by what was searched: methods that differ in the pick alone share a search.
            path = comparison.file(
                method.kind,
                verifier.path.stem,
                verifier.digest,
                *_searched_by(method, settings),
                "surprise" if method.surprise else "plain",
                "fused" if scorer.fused else "separate",
                f"n{n}",
                f"s{seed}",
            )
            what = f"{method.name} N={n} seed {seed}"
            files.append(path)
            found, took = session.run(path, comparison.problems, search, config.concurrency, what)
            by_seed.append(
                [
                    replace(
                        pick_again(r, rule, None, settings.base_head, settings.score),
                        n=r.n,
                        settings={**r.settings, "pick": rule, **places},
                    )
                    for r in found
                ]
            )
            seconds += took
        results.append(make_result(method.name, n, by_seed, seconds, session.policy, scorer, files))
    return results


def _beam_settings(comparison: Comparison, method: Method, n: int) -> BeamSettings:
    card = comparison.verifiers[str(method.verifier)].card
    if method.kind == "alphallm":
        return beam_settings(card, n, method.samples, 0.0, None, "q")
    width, children = (1, n * method.samples) if method.kind == "greedy" else (n, method.samples)
    return beam_settings(
        card, width, children, method.alpha, method.prover, method.score, method.duplicates
    )


def _particles(method: Method, settings: BeamSettings) -> SmcSettings:
    return SmcSettings(
        settings.n,
        settings.base_head,
        method.weight or "change",
        method.resampling or "systematic",
    )


def _searched_by(method: Method, settings: BeamSettings) -> list[str]:
    """What distinguishes the searches of one kind, verifier and width."""
    if method.kind == "smc":
        return [settings.base_head, *filter(None, (method.weight, method.resampling))]
    parts = [f"c{settings.samples}"]
    if method.kind != "alphallm":
        parts = [f"a{settings.alpha:g}", settings.prover, *parts]
        if settings.score_by != "q+a":
            parts.append(settings.score_by)
    # A greedy place is alone. What has no such part was searched before draws could be weighed.
    if method.kind in ("beam", "alphallm") and settings.duplicates != "merge":
        parts.append(settings.duplicates)
    return parts


def rule_of(comparison: Comparison, method: Method) -> Pick:
    """The final pick of a method."""
    if method.pick:
        return method.pick
    if method.reward_model is not None:
        return comparison.session.reward_model(method.reward_model).pick
    return comparison.verifiers[str(method.verifier)].card.pick
