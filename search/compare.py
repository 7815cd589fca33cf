"""``search.compare``: methods x N x seeds in one engine load; table, CSV and plot.

Best-of-N rows of all N, pick rules and verifiers come from one sample set per seed, and are shown
at every N and at the tokens that the reference beam really spent (trace count rounded up).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pav.cli import run
from pav.engine import EngineConfig
from pav.errors import UserError
from pav.policy import Policy, PolicyConfig, Sampler, load_policy
from pav.tasks.base import Problem, Split, Task
from pav.verifier import Verifier, load_verifier
from search.pick import Pick
from search.plot import plot_accuracy
from search.points import Point, oracle_line, paired, print_points, write_csv
from search.records import Candidate, Record, open_run
from search.scoring import Cost, Scorer
from search.session import Scoring, Session, open_session
from search.solve import beam_record, beam_settings, repick, traces_record


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Args:
        name: what table and plot call it.
        kind: ``beam``, or ``best_of_n`` (independent solutions and a pick).
        verifier: checkpoint; not needed where the pick is ``majority``.
        pick: final pick; by default the verifier's.
        alpha: weight of the advantage (beam); by default the verifier's.
        prover: head or bo<K> (beam); by default the verifier's.
        samples: children per place and step (beam).
        n: widths to run (beam); by default the comparison's.
        surprise: use the calibrators with surprise.
        scoring: fused, separate or auto.
        policy: sample from another policy (best_of_n by majority), e.g. the prover.
    """

    name: str
    kind: Literal["beam", "best_of_n"] = "beam"
    verifier: str | None = None
    pick: Pick | None = None
    alpha: float | None = None
    prover: str | None = None
    samples: int = 3
    n: list[int] | None = None
    surprise: bool = True
    scoring: Scoring = "auto"
    policy: PolicyConfig | None = None

    def __post_init__(self) -> None:
        if self.verifier is None and (self.kind == "beam" or self.pick != "majority"):
            raise UserError(
                f"method {self.name!r} has no verifier; give one, or kind best_of_n "
                "with pick majority"
            )


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods over N on the same problems.

    Args:
        methods: what to compare; the first beam sets the token budgets of best-of-N.
        output: run directory; the same command resumes it.
        n: widths and sample counts.
        seeds: run seeds.
        problems: how many problems of ``split``.
        skip: leave out the first so many problems of ``split``, e.g. those already looked at.
        split: never choose settings on ``test``.
        task: needed only where the verifiers' task is not built in.
        sampler: another sampler than the verifiers were made for (warns).
        concurrency: problems in flight.
        max_traces: upper limit on the solutions of a best-of-N sample set.
        title: of the plot.
        engine: device settings.
    """

    methods: list[Method]
    output: str
    n: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    seeds: list[int] = field(default_factory=lambda: [0])
    problems: int = 64
    skip: int = 0
    split: Split = "test"
    task: Task | None = None
    sampler: Sampler | None = None
    concurrency: int = 32
    max_traces: int = 128
    title: str = ""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        names = [m.name for m in self.methods]
        if len(set(names)) != len(names) or not names:
            raise UserError(f"methods are called {names}; give at least one, all names different")
        if not any(m.verifier for m in self.methods):
            raise UserError("no method has a verifier; one is needed to know task and policy")


def compare(config: CompareConfig) -> None:
    """Run the comparison (see :class:`CompareConfig`)."""
    verifiers = {m.verifier: load_verifier(m.verifier) for m in config.methods if m.verifier}
    first = next(iter(verifiers.values()))
    session = open_session(first, config.task, None, config.sampler, config.engine)
    for verifier in verifiers.values():
        if verifier.card.policy_fingerprint != first.card.policy_fingerprint:
            raise UserError(
                f"verifiers {str(first.path)!r} and {str(verifier.path)!r} were made "
                "for different policies; compare them in two runs"
            )
    output = Path(config.output)
    open_run(output, manifest(config, verifiers))
    problems = session.problems(config.split, config.problems, config.skip)
    points: list[Point] = []
    for method in config.methods:
        if method.kind == "beam":
            points += _beams(config, method, verifiers, session, problems, output)
    points += _samples(config, verifiers, session, problems, output, points)
    session.shutdown()
    order = {m.name: i for i, m in enumerate(config.methods)}
    points.sort(key=lambda p: (order[p.method], p.n))
    write_csv(points, output / "compare.csv")
    differences = paired(points)
    (output / "compare.json").write_text(json.dumps(differences, indent=1))
    oracle = oracle_line(points)
    counted = f"{len(problems)} problems, {len(config.seeds)} seed(s)"
    title = f"{config.title} ({counted})" if config.title else counted
    plot_accuracy(points, oracle, output / "compare.png", title)
    print_points(points, differences, config.split)
    print(
        f"results: {output}/compare.csv, compare.png, compare.json, one .jsonl per run\n"
        f"next: search.beam --verifier {config.methods[0].verifier or 'pav:reference'} "
        "--baseline orm --n 8"
    )


def manifest(config: CompareConfig, verifiers: dict[str, Verifier]) -> dict[str, Any]:
    """What a run directory is about: everything that changes records, verifiers by digest."""
    return {
        "methods": [asdict(m) for m in config.methods],
        "verifiers": {name: v.digest for name, v in verifiers.items()},
        "n": config.n,
        "seeds": config.seeds,
        "problems": config.problems,
        "skip": config.skip,
        "split": config.split,
        "sampler": None if config.sampler is None else asdict(config.sampler),
        "max_traces": config.max_traces,
    }


def _file(output: Path, *parts: object) -> Path:
    text = "-".join(map(str, parts))
    return output / ("".join(c if c.isalnum() or c in "-." else "_" for c in text) + ".jsonl")


def _point(
    method: str, n: int, matched: int | None, by_seed: Sequence[Sequence[Record]], seconds: float
) -> Point:
    flat = [r for records in by_seed for r in records]
    return Point(
        method,
        n,
        matched,
        np.array([[r.correct for r in records] for records in by_seed], dtype=float).T,
        np.array(
            [[any(c.correct for c in r.candidates) for r in records] for records in by_seed],
            dtype=float,
        ).T,
        float(np.mean([r.policy_tokens for r in flat])),
        float(np.mean([r.verifier_tokens for r in flat])),
        float(np.mean([r.verifier_cached for r in flat])),
        seconds / len(flat),
        flat[0].settings,
    )


def _beams(
    config: CompareConfig,
    method: Method,
    verifiers: dict[str, Verifier],
    session: Session,
    problems: list[Problem],
    output: Path,
) -> list[Point]:
    verifier = verifiers[str(method.verifier)]
    scorer = session.scorer(verifier, method.scoring, method.surprise, None)
    session.sampling_engine(scorer)
    rule: Pick = method.pick or verifier.card.pick  # type: ignore[assignment]
    points = []
    for n in method.n or config.n:
        settings = beam_settings(verifier.card, n, method.samples, method.alpha, method.prover)
        by_seed, seconds = [], 0.0
        for seed in config.seeds:

            async def search(
                problem: Problem, seed: int = seed, settings: Any = settings
            ) -> Record:
                return await beam_record(session, scorer, settings, rule, "beam", seed, problem)

            # Named by what was searched: methods that differ in the pick alone share a search.
            path = _file(
                output,
                "beam",
                verifier.path.stem,
                verifier.digest,
                f"a{settings.alpha:g}",
                settings.prover,
                f"c{settings.samples}",
                "surprise" if method.surprise else "plain",
                "fused" if scorer.fused else "separate",
                f"n{n}",
                f"s{seed}",
            )
            what = f"{method.name} N={n} seed {seed}"
            found, took = session.run(path, problems, search, config.concurrency, what)
            records = [
                replace(
                    repick(r, rule, None, settings.base_head),
                    n=r.n,
                    settings={**r.settings, "pick": rule},
                )
                for r in found
            ]
            by_seed.append(records)
            seconds += took
        points.append(_point(method.name, n, None, by_seed, seconds))
    return points


def _samples(
    config: CompareConfig,
    verifiers: dict[str, Verifier],
    session: Session,
    problems: list[Problem],
    output: Path,
    beams: list[Point],
) -> list[Point]:
    """All best-of-N points: one sample set per policy and seed, one scoring pass per verifier."""
    methods = [m for m in config.methods if m.kind == "best_of_n"]
    reference = [p for p in beams if p.method == beams[0].method]
    points: list[Point] = []
    for policy in {_policy_key(m): m.policy for m in methods}.values():
        own = [m for m in methods if m.policy == policy]
        other = None if policy is None else load_policy(policy, session.task.step_rule)
        label = session.policy.config.label if policy is None else policy.label
        # A small first set tells how long a trace is; its traces are the first of the full set.
        few = min(4, max(config.n))
        pilot, _ = _sample_set(
            config, session, other, label, problems, config.seeds[0], few, output
        )
        per_trace = float(np.mean([c.tokens for r in pilot for c in r.candidates]))
        counts = sorted({*config.n, *(_matched(beam, per_trace) for beam in reference)})
        total = min(counts[-1], config.max_traces)
        sets, seconds = [], 0.0
        for seed in config.seeds:
            records, took = _sample_set(
                config, session, other, label, problems, seed, total, output
            )
            sets.append(records)
            seconds += took
        for method in own:
            scored, extra = sets, 0.0
            if method.verifier:
                scored, extra = _scored_sets(
                    config, method, verifiers, session, problems, label, sets, output
                )
            head = verifiers[method.verifier].card.base_head if method.verifier else ""
            default = verifiers[method.verifier].card.pick if method.verifier else "majority"
            rule: Pick = method.pick or default  # type: ignore[assignment]
            for n in (c for c in counts if c <= total):
                picked = [
                    [_first(repick(r, rule, n, head), r, n, total) for r in records]
                    for records in scored
                ]
                took = (seconds + extra) * n / total
                matched = [b.n for b in reference if _matched(b, per_trace) == n]
                points.append(_point(method.name, n, matched[0] if matched else None, picked, took))
    return points


def _matched(beam: Point, per_trace: float) -> int:
    return max(1, math.ceil(beam.policy_tokens / per_trace))


def _policy_key(method: Method) -> str:
    return json.dumps(None if method.policy is None else asdict(method.policy), sort_keys=True)


def _first(record: Record, whole: Record, n: int, total: int) -> Record:
    """Costs of the first ``n`` of ``total`` traces; scoring reads each trace once."""
    share = n / total
    return replace(
        record,
        n=n,
        settings={**whole.settings, "pick": record.settings.get("pick")},
        verifier_tokens=round(whole.verifier_tokens * share),
        verifier_cached=round(whole.verifier_cached * share),
    )


def _sample_set(
    config: CompareConfig,
    session: Session,
    policy: Policy | None,
    label: str,
    problems: list[Problem],
    seed: int,
    n: int,
    output: Path,
) -> tuple[list[Record], float]:
    async def sample(problem: Problem) -> Record:
        return await traces_record(session, None, n, "majority", "samples", seed, problem, policy)

    session.sampling_engine(None, policy)
    return session.run(
        _file(output, "samples", label, f"n{n}", f"s{seed}"),
        problems,
        sample,
        config.concurrency,
        f"{n} samples of {label}, seed {seed}",
    )


def _scored_sets(
    config: CompareConfig,
    method: Method,
    verifiers: dict[str, Verifier],
    session: Session,
    problems: list[Problem],
    label: str,
    sets: list[list[Record]],
    output: Path,
) -> tuple[list[list[Record]], float]:
    verifier = verifiers[str(method.verifier)]
    # Sampled ids do not depend on the verifier, so scoring is always a pass of its own.
    scorer = session.scorer(verifier, "separate", method.surprise, None)
    every_step = method.pick == "min"
    out, seconds = [], 0.0
    for seed, records in zip(config.seeds, sets, strict=True):
        by_problem = {r.problem_id: r for r in records}

        async def judge(problem: Problem, by_problem: dict[str, Record] = by_problem) -> Record:
            return await score_record(scorer, problem, by_problem[problem.id], every_step)

        path = _file(
            output,
            "scored",
            verifier.path.stem,
            verifier.digest,
            "surprise" if method.surprise else "plain",
            "steps" if every_step else "last",
            label,
            f"n{records[0].n}",
            f"s{seed}",
        )
        scored, took = session.run(
            path,
            problems,
            judge,
            config.concurrency,
            f"scoring by {verifier.path.stem}, seed {seed}",
        )
        out.append(scored)
        seconds += took
    return out, seconds


async def score_record(
    scorer: Scorer, problem: Problem, record: Record, every_step: bool
) -> Record:
    """The record with its finished candidates valued by ``scorer``."""
    cost = Cost()
    candidates: list[Candidate] = []
    for c in record.candidates:
        if not c.finished:
            candidates.append(c)
            continue
        rows = []
        for j in range(0 if every_step else len(c.ends), len(c.ends) + 1):
            ids = c.ids[: c.ends[j - 1]] if j else []
            rows.append(await scorer.read(problem, ids, c.ends[:j], cost))
        candidates.append(replace(c, q={h: [r[h] for r in rows] for h in rows[0]}))
    settings = {
        "scoring": "separate",
        "surprise": scorer.reads_surprise,
        "trunk": scorer.verifier.card.trunk,
    }
    return replace(
        record,
        candidates=candidates,
        settings=settings,
        verifier_tokens=cost.verifier_tokens,
        verifier_cached=cost.verifier_cached,
    )


def main() -> None:
    """Entry point of ``search.compare``."""
    run(compare, CompareConfig, "search.compare")


if __name__ == "__main__":
    main()
