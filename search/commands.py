"""The search commands; :mod:`search.configs` holds their settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pav.errors import UserError
from pav.tasks.base import Problem
from pav.verifier import Verifier
from search.configs import (
    AlphaLlmConfig,
    BeamConfig,
    BestOfNConfig,
    DvtsConfig,
    SearchConfig,
    SmcConfig,
)
from search.opened import Opened, Row, card_of, claim, open_search, print_rows, serve
from search.oracle import by_oracle, pass_at
from search.records import Record
from search.reward_text import RewardModelConfig
from search.scoring import StepScorer
from search.session import Session, load_checked, sibling_orm
from search.smc import SmcSettings
from search.solve import beam_record, beam_settings, repick, smc_record, traces_record
from search.worker import Search

if TYPE_CHECKING:
    from search.reward_models import RewardModel

__all__ = [
    "AlphaLlmConfig",
    "BeamConfig",
    "BestOfNConfig",
    "DvtsConfig",
    "SearchConfig",
    "SmcConfig",
    "alphallm",
    "beam",
    "best_of_n",
    "dvts",
    "smc",
]


def beam(config: BeamConfig) -> None:
    """Run beam search, and its baselines if asked for (see :class:`BeamConfig`)."""
    opened = open_search(config, "pav")
    settings = beam_settings(
        card_of(opened),
        config.n,
        config.samples,
        config.alpha,
        config.prover,
        config.score,
        config.duplicates,
    )
    baseline = _baseline(config, opened)
    scorer = serve(config, opened)
    orm = _baseline_scorer(config, opened, baseline)
    session, rule = opened.session, opened.rule
    problems = session.problems(config.split, config.problems)
    with claim(config, opened, f"beam-n{config.n}") as directory:
        search = partial(beam_record, session, scorer, settings, rule, "beam", config.seed)
        records, seconds = session.run(
            directory / "beam.jsonl", problems, search, config.concurrency, f"beam N={config.n}"
        )
        rows = [Row(f"PAV beam ({rule})", config.n, records, seconds)]
        if orm is not None:
            rows += _baselines(config, session, orm, problems, records, directory)
        session.shutdown()
        print_rows(rows, directory, config.split)
        session.check()


def _baseline(config: BeamConfig, opened: Opened) -> Verifier | RewardModel | None:
    """The ORM of the baseline, found and checked; its engine is not loaded yet."""
    if not config.baseline:
        return None
    session, name = opened.session, config.baseline_verifier
    if name is None:
        if opened.verifier is None:
            raise UserError("no ORM baseline is known without a verifier; name --baseline_verifier")
        name = sibling_orm(opened.verifier.path)
    if Path(name).is_dir():
        session.expect()
        return session.reward_model(RewardModelConfig(name))
    verifier = load_checked(name, "orm")
    session.expect_scorer(verifier, "separate", None)
    return verifier


def _baseline_scorer(
    config: BeamConfig, opened: Opened, baseline: Verifier | RewardModel | None
) -> StepScorer | None:
    if baseline is None:
        return None
    session = opened.session
    orm: StepScorer
    if isinstance(baseline, Verifier):
        orm = session.scorer(baseline, "separate", config.surprise, None)
    else:
        orm = baseline
    # The ORM is never fused: best-of-N samples from the plain policy, which is loaded with it.
    session.sampling_engine(orm)
    return orm


def _baselines(
    config: BeamConfig,
    session: Session,
    orm: StepScorer,
    problems: list[Problem],
    beam_records: list[Record],
    directory: Path,
) -> list[Row]:
    """Best-of-N at the same N and at beam's tokens (trace count rounded up)."""
    spent = float(np.mean([r.policy_tokens for r in beam_records]))

    def sample(n: int) -> Search:
        return partial(traces_record, session, orm, n, "orm", "best-of-N", config.seed)

    same, seconds = session.run(
        directory / "best_of_n.jsonl",
        problems,
        sample(config.n),
        config.concurrency,
        f"best-of-{config.n}",
    )
    per_trace = float(np.mean([c.tokens for r in same for c in r.candidates]))
    matched = max(config.n, math.ceil(spent / per_trace))
    equal, more = session.run(
        directory / "best_of_n_equal_tokens.jsonl",
        problems,
        sample(matched),
        config.concurrency,
        f"best-of-{matched}",
    )
    rows = []
    for n, records, took in ((config.n, same, seconds), (matched, equal, more)):
        for label, rule in (
            ("best-of-N, ORM", "orm"),
            ("ORM-weighted vote", "orm_vote"),
            ("majority vote", "majority"),
        ):
            rows.append(Row(label, n, [repick(r, rule) for r in records], took))  # type: ignore[arg-type]
        rows.append(Row("oracle (pass@N)", n, [by_oracle(r) for r in records], took))
    return rows


def dvts(config: DvtsConfig) -> None:
    """Run diverse verifier tree search (see :class:`DvtsConfig`)."""
    opened = open_search(config, "pav")
    settings = beam_settings(
        card_of(opened), config.n, config.samples, config.alpha, config.prover, config.score
    )

    def job(scorer: StepScorer) -> Search:
        return partial(
            beam_record, opened.session, scorer, settings, opened.rule, "dvts", config.seed
        )

    _tree(config, opened, "dvts", "DVTS", job)


def alphallm(config: AlphaLlmConfig) -> None:
    """Run beam search by Q and AlphaLLM's bonus (see :class:`AlphaLlmConfig`)."""
    opened = open_search(config, "pav")
    settings = beam_settings(card_of(opened), config.n, config.samples, 0.0, None, "q")

    def job(scorer: StepScorer) -> Search:
        return partial(
            beam_record,
            opened.session,
            scorer,
            settings,
            opened.rule,
            "alphallm",
            config.seed,
            bonus=config.bonus,
        )

    _tree(config, opened, "alphallm", "AlphaLLM bonus", job)


def smc(config: SmcConfig) -> None:
    """Run particle filtering (see :class:`SmcConfig`)."""
    opened = open_search(config, "pav")
    card = card_of(opened)
    head = config.head or card.base_head
    if head not in card.heads:
        raise UserError(f"head is {head!r}; the verifier has {', '.join(card.heads)}")
    settings = SmcSettings(config.n, head, config.weight, config.resampling)

    def job(scorer: StepScorer) -> Search:
        return partial(
            smc_record,
            opened.session,
            scorer,
            settings,
            opened.rule,
            config.seed,
            score=opened.score,
        )

    _tree(config, opened, "smc", "particle filtering", job)


def best_of_n(config: BestOfNConfig) -> None:
    """Run best-of-N (see :class:`BestOfNConfig`)."""
    opened = open_search(config, None)
    session, rule = opened.session, opened.rule
    scorer = None
    if opened.card is None:
        session.sampling_engine(None)
    else:
        scorer = serve(config, opened)
    problems = session.problems(config.split, config.problems)
    with claim(config, opened, f"best-of-{config.n}") as directory:
        search = partial(
            traces_record,
            session,
            scorer,
            config.n,
            rule,
            "best-of-N",
            config.seed,
            score=opened.score,
        )
        records, seconds = session.run(
            directory / "best_of_n.jsonl",
            problems,
            search,
            config.concurrency,
            f"best-of-{config.n}",
        )
        session.shutdown()
        rows = [Row(f"best-of-N ({rule})", config.n, records, seconds)]
        rows.append(
            Row("majority vote", config.n, [repick(r, "majority") for r in records], seconds)
        )
        rows.append(Row("oracle (pass@N)", config.n, [by_oracle(r) for r in records], seconds))
        print_rows(rows, directory, config.split)
        counts = [2**i for i in range(config.n.bit_length())]
        line = ", ".join(f"{k}: {pass_at(records, k).mean():.3f}" for k in counts)
        print(f"oracle pass@k, unbiased from {config.n} samples: {line}")
        session.check()


def _tree(
    config: SearchConfig,
    opened: Opened,
    name: str,
    label: str,
    job: Callable[[StepScorer], Search],
) -> None:
    """Run one search of its own directory and print its row."""
    scorer = serve(config, opened)
    session = opened.session
    problems = session.problems(config.split, config.problems)
    with claim(config, opened, f"{name}-n{config.n}") as directory:
        records, seconds = session.run(
            directory / f"{name}.jsonl",
            problems,
            job(scorer),
            config.concurrency,
            f"{label} N={config.n}",
        )
        session.shutdown()
        rows = [Row(f"{label} ({opened.rule})", config.n, records, seconds)]
        rows.append(Row(f"{label} (majority)", config.n, [repick(r, "majority") for r in records],
                        seconds))  # fmt: skip
        print_rows(rows, directory, config.split)
        session.check()
