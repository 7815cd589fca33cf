"""The search commands: ``search.beam`` and ``search.best_of_n``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from pav.engine import EngineConfig
from pav.errors import UserError
from pav.policy import PolicyConfig, Sampler
from pav.tasks.base import Problem, Split, Task
from search.pick import Pick
from search.records import Record, open_run
from search.scoring import Scorer
from search.session import Scoring, Session, load_checked, open_session, sibling_orm
from search.solve import beam_record, beam_settings, repick, traces_record
from search.stats import bootstrap


@dataclass(frozen=True)
class SearchConfig:
    """Fields of every search command.

    Args:
        verifier: checkpoint that pav.train wrote, or ``pav:reference``.
        n: beam width, or number of solutions.
        problems: how many problems of ``split``.
        split: never choose settings on ``test``.
        pick: rule for the final pick; by default the one chosen on validation.
        scoring: ``fused`` where the trunk is the policy, else ``separate``; ``auto`` decides.
        surprise: use the calibrators that read the trunk's log-probabilities.
        seed: run seed.
        output: run directory; by default beside the verifier.
        task: needed only where the verifier's task is not built in.
        policy: another policy than the verifier was made for (warns).
        sampler: another sampler than the verifier was made for (warns).
        trunk: new place of the trunk, if it moved.
        concurrency: problems in flight.
        engine: device settings.
    """

    verifier: str
    n: int = 4
    problems: int = 64
    split: Split = "test"
    pick: Pick | None = None
    scoring: Scoring = "auto"
    surprise: bool = True
    seed: int = 0
    output: str | None = None
    task: Task | None = None
    policy: PolicyConfig | None = None
    sampler: Sampler | None = None
    trunk: str | None = None
    concurrency: int = 32
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.n < 1 or self.problems < 1:
            raise UserError(f"n is {self.n}, problems is {self.problems}; both must be positive")


@dataclass(frozen=True)
class BeamConfig(SearchConfig):
    """Beam search by Q_base + alpha * A_prover.

    Args:
        samples: children per place and step (C).
        alpha: weight of the advantage; by default the verifier's.
        prover: a head such as q/prover, or bo4 for Best-of-4 of the base policy; by default the
            verifier's.
        baseline: ``orm`` also runs best-of-N by the ORM, at the same N and at the tokens that beam
            spent, and majority vote.
        baseline_verifier: the ORM; by default orm.ckpt beside the verifier.
    """

    samples: int = 3
    alpha: float | None = None
    prover: str | None = None
    baseline: Literal["orm"] | None = None
    baseline_verifier: str | None = None


@dataclass(frozen=True)
class BestOfNConfig(SearchConfig):
    """Best-of-N: independent solutions, ranked at their last position."""


@dataclass(frozen=True)
class Row:
    """A line of the printed table."""

    method: str
    n: int
    records: list[Record]
    seconds: float


def beam(config: BeamConfig) -> None:
    """Run beam search, and its baselines if asked for (see :class:`BeamConfig`)."""
    verifier = load_checked(config.verifier, "pav")
    session = open_session(verifier, config.task, config.policy, config.sampler, config.engine)
    settings = beam_settings(verifier.card, config.n, config.samples, config.alpha, config.prover)
    rule: Pick = config.pick or verifier.card.pick  # type: ignore[assignment]
    directory = _run_directory(config, f"beam-n{config.n}", verifier.path)
    open_run(directory, _manifest(config, verifier.digest))
    scorer = session.scorer(verifier, config.scoring, config.surprise, config.trunk)
    orm = None
    if config.baseline:
        name = config.baseline_verifier or sibling_orm(verifier.path)
        orm = session.scorer(load_checked(name, "orm"), "separate", config.surprise, None)
    session.sampling_engine(scorer)
    if orm is not None:
        # The ORM is never fused: best-of-N samples from the plain policy, which must be loaded now.
        session.sampling_engine(orm)
    problems = session.problems(config.split, config.problems)

    async def search(problem: Problem) -> Record:
        return await beam_record(session, scorer, settings, rule, "beam", config.seed, problem)

    records, seconds = session.run(
        directory / "beam.jsonl", problems, search, config.concurrency, f"beam N={config.n}"
    )
    rows = [Row(f"PAV beam ({rule})", config.n, records, seconds)]
    if orm is not None:
        rows += _baselines(config, session, orm, problems, records, directory)
    session.shutdown()
    _print(rows, directory, config.split)


def _baselines(
    config: BeamConfig,
    session: Session,
    orm: Scorer,
    problems: list[Problem],
    beam_records: list[Record],
    directory: Path,
) -> list[Row]:
    """Best-of-N at the same N and at beam's tokens (trace count rounded up)."""
    spent = float(np.mean([r.policy_tokens for r in beam_records]))

    async def sample(n: int, problem: Problem) -> Record:
        return await traces_record(session, orm, n, "orm", "best-of-N", config.seed, problem)

    def first(problem: Problem) -> Any:
        return sample(config.n, problem)

    same, seconds = session.run(
        directory / "best_of_n.jsonl", problems, first, config.concurrency, f"best-of-{config.n}"
    )
    per_trace = float(np.mean([c.tokens for r in same for c in r.candidates]))
    matched = max(config.n, math.ceil(spent / per_trace))

    def second(problem: Problem) -> Any:
        return sample(matched, problem)

    equal, more = session.run(
        directory / "best_of_n_equal_tokens.jsonl",
        problems,
        second,
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
    return rows


def best_of_n(config: BestOfNConfig) -> None:
    """Run best-of-N (see :class:`BestOfNConfig`)."""
    from pav.verifier import load_verifier

    verifier = load_verifier(config.verifier)
    session = open_session(verifier, config.task, config.policy, config.sampler, config.engine)
    rule: Pick = config.pick or verifier.card.pick  # type: ignore[assignment]
    if rule in ("last", "min", "vote") and not verifier.card.base_head:
        raise UserError(
            f"pick {rule} reads a Q head, which {config.verifier!r} does not have; choose orm, "
            "orm_vote or majority"
        )
    directory = _run_directory(config, f"best-of-{config.n}", verifier.path)
    open_run(directory, _manifest(config, verifier.digest))
    scorer = session.scorer(verifier, config.scoring, config.surprise, config.trunk)
    session.sampling_engine(scorer)
    problems = session.problems(config.split, config.problems)

    async def search(problem: Problem) -> Record:
        return await traces_record(
            session, scorer, config.n, rule, "best-of-N", config.seed, problem
        )

    records, seconds = session.run(
        directory / "best_of_n.jsonl", problems, search, config.concurrency, f"best-of-{config.n}"
    )
    session.shutdown()
    rows = [Row(f"best-of-N ({rule})", config.n, records, seconds)]
    rows.append(Row("majority vote", config.n, [repick(r, "majority") for r in records], seconds))
    _print(rows, directory, config.split)


def _run_directory(config: SearchConfig, name: str, verifier: Path) -> Path:
    if config.output:
        return Path(config.output)
    parent = Path("runs") if "assets" in verifier.parts else verifier.parent
    return parent / "search" / f"{verifier.stem}-{name}-s{config.seed}"


def _manifest(config: SearchConfig, digest: str) -> dict[str, Any]:
    from dataclasses import fields, is_dataclass

    from pav.tasks.base import task_spec

    plain: dict[str, Any] = {"verifier_digest": digest}
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in ("output", "concurrency"):
            continue
        if isinstance(value, Task):
            value = task_spec(value)
        elif is_dataclass(value) and not isinstance(value, type):
            value = {k.name: str(getattr(value, k.name)) for k in fields(value)}
        plain[f.name] = value
    return plain


def _print(rows: list[Row], directory: Path, split: str) -> None:
    table = Table(title=f"{len(rows[0].records)} {split} problems")
    for column in (
        "method",
        "N",
        "accuracy [95%]",
        "in final set",
        "policy tokens",
        "verifier tokens",
        "seconds",
    ):
        table.add_column(column)
    for row in rows:
        right = bootstrap(np.array([[r.correct] for r in row.records], dtype=float))
        oracle = np.mean([any(c.correct for c in r.candidates) for r in row.records])
        table.add_row(
            row.method,
            str(row.n),
            str(right),
            f"{oracle:.3f}",
            f"{np.mean([r.policy_tokens for r in row.records]):.0f}",
            f"{np.mean([r.verifier_tokens for r in row.records]):.0f}",
            f"{row.seconds:.1f}",
        )
    Console(width=120).print(table)
    print("tokens are means per problem; seconds are nan for a resumed run")
    print(f"records: {directory}\nnext: search.compare --help")
