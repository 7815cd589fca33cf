"""What the search commands share: opening a session with its scorer, and the printed result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pav.core.errors import UserError
from pav.core.manifest import PROMPTS
from pav.core.statistics import bootstrap
from pav.core.tables import print_table, result_row
from pav.policy.opening import print_opening, settle_cap, task_for
from pav.policy.policy import PolicyConfig, Sampler
from pav.tasks.base import Problem
from pav.verifier.checkpoint import Verifier, load_verifier
from pav.verifier.pick import Pick, StepScore, check_pick
from pav.verifier.score import ScorerMeta
from pav.verifier.scoring import StepScorer
from search.report.command import write_report
from search.run.config import SearchConfig, manifest, run_directory
from search.run.opening import load_checked, open_session, plain_session, warn_few
from search.run.records import MANIFEST, Record, open_run
from search.run.session import Session
from search.run.solve import beam_settings


@dataclass(frozen=True)
class OpenedSearch:
    """A command's session and verifier, before anything is written or served.

    Attributes:
        session: policy, task and engines.
        verifier: the checkpoint; None where there is only a third-party reward model, or nothing.
        card: what scores; None for nothing.
        rule: the final pick.
    """

    session: Session
    verifier: Verifier | None
    card: ScorerMeta | None
    rule: Pick

    @property
    def score(self) -> StepScore | None:
        """The step score under the verifier's own prover and alpha."""
        if self.card is None or not self.card.base_head:
            return None
        return beam_settings(self.card, 1, 1, None, None).score


@dataclass(frozen=True)
class Row:
    """A line of the printed table."""

    method: str
    n: int
    records: list[Record]
    seconds: float


def open_search(config: SearchConfig, recipe: str | None) -> OpenedSearch:
    """Session and verifier; ``recipe`` is what a checkpoint must be of.

    Raises:
        UserError: if nothing scores, or the pick reads what is not there.
    """
    verifier = None
    if config.verifier is not None:
        # With a reward model the checkpoint is only asked for task, policy and sampler.
        checked = recipe if config.reward_model is None else None
        verifier = load_checked(config.verifier, checked) if checked else load_verifier(
            config.verifier
        )  # fmt: skip
        session = open_session(
            verifier,
            config.task,
            config.policy,
            config.sampler,
            config.engine,
            config.workers,
            config.grade_timeout,
            config.ray,
        )
    elif config.reward_model is not None or (recipe is None and config.pick == "majority"):
        policy = config.policy or PolicyConfig()
        session = plain_session(
            task_for(config.task, [policy.model]),
            policy,
            config.sampler or Sampler(),
            config.engine,
            config.workers,
            config.grade_timeout,
            config.ray,
        )
    else:
        raise UserError(
            "no verifier is named; give --verifier with a checkpoint of pav.train (or "
            "pav:reference), or --reward_model"
        )
    problems = session.problems(config.split, config.problems)
    warn_few(len(problems), config.split, config.problems)
    say_opening(session, problems, config.split)
    card: ScorerMeta | None = verifier.card if verifier else None
    if config.reward_model is not None:
        card = session.reward_model(config.reward_model)
    if verifier is not None and config.reward_model is None:
        session.expect_scorer(verifier, config.scoring, config.trunk)
    else:
        session.expect()
    rule: Pick = config.pick or ("majority" if card is None else card.pick)
    if card is not None:
        named = config.verifier if config.reward_model is None else config.reward_model.model
        check_pick(rule, card.heads, card.base_head, str(named))
    return OpenedSearch(session, verifier, card, rule)


def say_opening(session: Session, problems: list[Problem], split: str) -> None:
    """Say what is searched, and settle the length cap where neither user nor verifier gave one."""
    policy = session.policy
    session.sampler, cap = settle_cap(session.sampler, session.task, [policy], problems)
    said = f"{len(problems)} {split} problems"
    print_opening(session.task, said, [("policy", policy)], problems[0], session.sampler, cap)


def scorer_of(opened: OpenedSearch) -> ScorerMeta:
    """What scores a step search; :func:`open_search` has seen to it that there is one."""
    if opened.card is None:
        raise RuntimeError("a step search was opened without a scorer")
    return opened.card


@contextmanager
def create_run_dir(config: SearchConfig, opened: OpenedSearch, name: str) -> Iterator[Path]:
    """The run directory, created or found to be this run's (see ``open_run``)."""
    path = None if opened.verifier is None else opened.verifier.path
    directory = run_directory(config, name, path)
    if not (directory / MANIFEST).exists():
        opened.session.check_models()
    prompts = {PROMPTS: opened.session.prompts()}
    with open_run(directory, manifest(config, opened.verifier) | prompts), opened.session:
        yield directory


def load_scorer(config: SearchConfig, opened: OpenedSearch) -> StepScorer:
    """The scorer and the engine that samples; they are loaded when something is searched."""
    scorer: StepScorer
    if config.reward_model is not None:
        scorer = opened.session.reward_model(config.reward_model)
    elif opened.verifier is not None:
        scorer = opened.session.scorer(
            opened.verifier, config.scoring, config.surprise, config.trunk
        )
    else:
        raise RuntimeError("nothing to score with")
    opened.session.sampling_engine(scorer)
    return scorer


def print_rows(rows: list[Row], directory: Path, split: str) -> None:
    """The table of a command, and where its records are."""
    table = []
    for row in rows:
        right = bootstrap(np.array([[r.correct] for r in row.records], dtype=float))
        table.append(
            result_row(
                row.method,
                str(row.n),
                right,
                float(np.mean([any(c.correct for c in r.candidates) for r in row.records])),
                float(np.mean([r.policy_tokens for r in row.records])),
                float(np.mean([r.verifier_tokens for r in row.records])),
                row.seconds,
            )
        )
    print_table(f"{len(rows[0].records)} {split} problems", table)
    print(f"records: {directory}\nreport: {write_report(directory)}\nnext: search.compare --help")
