"""Command ``search.beam``; the search itself is in :mod:`search.methods.beam`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from pav.cli.run import run
from pav.core.errors import UserError
from pav.reward_models.text import RewardModelConfig
from pav.tasks.base import Problem
from pav.verifier.checkpoint import Verifier
from pav.verifier.pick import Pick
from pav.verifier.score import Score
from pav.verifier.scoring import StepScorer
from search.methods.beam import Duplicates
from search.run.config import SearchConfig
from search.run.opening import load_checked, sibling_orm
from search.run.oracle import by_oracle
from search.run.records import Record
from search.run.session import Session
from search.run.setup import (
    OpenedSearch,
    Row,
    create_run_dir,
    load_scorer,
    open_search,
    print_rows,
    scorer_of,
)
from search.run.solve import beam_record, beam_settings, pick_again, traces_record
from search.run.workers import Search

# Of the solutions of best-of-N.
BASELINES: tuple[tuple[str, Pick], ...] = (
    ("best-of-N, ORM", "orm"),
    ("ORM-weighted vote", "orm_vote"),
    ("majority vote", "majority"),
)

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pav.reward_models.reward_model import RewardModel


@dataclass(frozen=True)
class BeamConfig(SearchConfig):
    """Beam search by Q_base + alpha * A_prover; with n 1 greedy step search.

    Args:
        samples: children per place and step (C).
        alpha: weight of the advantage; by default the verifier's.
        prover: a head such as q/prover, bo4 for Best-of-4 of the base policy, or a weighted mean
            such as q/a:0.5,q/b:0.5; by default the verifier's.
        score: rank steps by Q + alpha * A (``q+a``, the default), by Q or by A alone.
        duplicates: ``weigh`` (the default): places share the draws of a round in proportion to how
            often their last step was drawn, which is better where right steps hardly differ;
            ``merge``: alike.
        baseline: ``orm`` also runs best-of-N by the ORM, at the same N and at the tokens that beam
            spent, and majority vote.
        baseline_verifier: the ORM, a checkpoint or the directory of a third-party reward model; by
            default orm.ckpt beside the verifier.
    """

    samples: int = 3
    alpha: float | None = None
    prover: str | None = None
    score: Score | None = None
    duplicates: Duplicates = "weigh"
    baseline: Literal["orm"] | None = None
    baseline_verifier: str | None = None


def beam(config: BeamConfig) -> None:
    """Run beam search, and its baselines if asked for (see :class:`BeamConfig`)."""
    opened = open_search(config, "pav")
    settings = beam_settings(
        scorer_of(opened),
        config.n,
        config.samples,
        config.alpha,
        config.prover,
        config.score,
        config.duplicates,
    )
    baseline = _baseline(config, opened)
    scorer = load_scorer(config, opened)
    orm = _baseline_scorer(config, opened, baseline)
    session, rule = opened.session, opened.rule
    problems = session.problems(config.split, config.problems)
    with create_run_dir(config, opened, f"beam-n{config.n}") as directory:
        search = partial(beam_record, session, scorer, settings, rule, "beam", config.seed)
        records, seconds = session.run(
            directory / "beam.jsonl", problems, search, config.concurrency, f"beam N={config.n}"
        )
        rows = [Row(f"PAV beam ({rule})", config.n, records, seconds)]
        if orm is not None:
            rows += _baselines(config, session, orm, problems, records, directory)
        print_rows(rows, directory, config.split)
        session.check()


def _baseline(config: BeamConfig, opened: OpenedSearch) -> Verifier | RewardModel | None:
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
    config: BeamConfig, opened: OpenedSearch, baseline: Verifier | RewardModel | None
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
        for label, rule in BASELINES:
            rows.append(Row(label, n, [pick_again(r, rule) for r in records], took))
        rows.append(Row("oracle (pass@N)", n, [by_oracle(r) for r in records], took))
    return rows


def main() -> None:
    """Entry point of ``search.beam``."""
    run(beam, BeamConfig, "search.beam")


if __name__ == "__main__":
    main()
