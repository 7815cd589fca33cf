"""Best-of-N in a comparison: one sample set per policy and seed, one scoring pass per verifier.

Points of all N and pick rules come from them. They are shown at every N of the comparison, and at
the policy tokens and the total FLOPs that the reference beam (the first search) really spent, trace
count rounded up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from pav.core.errors import UserError
from pav.grading.sandbox import log_error
from pav.policy.cost import Cost
from pav.policy.policy import Policy, asked, like, load_policy
from pav.tasks.base import Problem
from pav.verifier.pick import EVERY_STEP, Candidate, Pick, check_pick
from pav.verifier.score import ScorerMeta
from pav.verifier.scoring import NO_LOGPROBS, Scorer, StepScorer
from search.compare.plan import Method
from search.compare.results import MethodResult, make_result
from search.compare.run_searches import Comparison, rule_of
from search.methods.expand import gather_or_cancel
from search.run.failures import ERRORS
from search.run.records import Record
from search.run.solve import beam_settings, failed, pick_again, traces_record

if TYPE_CHECKING:
    from pav.reward_models.reward_model import RewardModel

# What values a sample set.
Ranker: TypeAlias = "Scorer | RewardModel"


def best_of_n_results(comparison: Comparison, beams: Sequence[MethodResult]) -> list[MethodResult]:
    """All best-of-N points: one sample set per policy and seed, one scoring pass per verifier."""
    config, session = comparison.config, comparison.session
    methods = [m for m in config.methods if m.kind == "best_of_n"]
    reference = [p for p in beams if p.method == beams[0].method]  # empty without beams
    results: list[MethodResult] = []
    for chosen in {_policy_key(m): m.policy for m in methods}.values():
        own = [m for m in methods if m.policy == chosen]
        other = other_policy(comparison, own[0])
        label = session.policy.config.label if chosen is None else chosen.label
        # A small first set tells how long a trace is; its traces are the first of the full set.
        few = min(4, max(config.n))
        pilot, _, _ = _sample_set(comparison, other, label, config.seeds[0], few)
        per_trace = float(np.mean([c.tokens for r in pilot for c in r.candidates]))
        matched = {_rounded_up(b.policy_tokens / per_trace): b.n for b in reversed(reference)}
        counts = {*config.n, *matched}
        total = min(max(counts), config.max_traces)
        sets, files, seconds = [], [], 0.0
        for seed in config.seeds:
            records, took, path = _sample_set(comparison, other, label, seed, total)
            sets.append(records)
            files.append(path)
            seconds += took
        for method in own:
            scored, extra, scorer, read_from = sets, 0.0, None, files
            if method.verifier or method.reward_model:
                scored, extra, scorer, read_from = _scored_sets(comparison, method, label, sets)
            rule = rule_of(comparison, method)

            def at(
                n: int,
                method: Method = method,
                scored: list[list[Record]] = scored,
                scorer: Ranker | None = scorer,
                rule: Pick = rule,
                took: float = seconds + extra,
                policy: Policy = other or session.policy,
                total: int = total,
                read_from: list[Path] = read_from,
            ) -> MethodResult:
                head, score = "", None
                if scorer is not None:
                    head = scorer.base_head
                    if rule == "pav":
                        card = scorer.verifier.card if isinstance(scorer, Scorer) else scorer
                        score = beam_settings(card, 1, 1, method.alpha, method.prover).score
                picked = [
                    [
                        _first(pick_again(r, rule, n, head, score), r, rule, n, total)
                        for r in records
                    ]
                    for records in scored
                ]
                share = took * n / total
                point = make_result(method.name, n, picked, share, policy, scorer, read_from)
                return replace(point, base=method.policy is None)

            each = at(total).flops / total
            flops = {} if math.isnan(each) else {
                _rounded_up(b.flops / each): b.n
                for b in reversed(reference) if not math.isnan(b.flops)
            }  # fmt: skip
            results += [
                replace(
                    at(n),
                    matched=matched.get(n),
                    matched_flops=flops.get(n),
                    matching=n not in config.n,
                )
                for n in sorted({*counts, *flops})
                if n <= total
            ]
    return results


def _rounded_up(traces: float) -> int:
    return max(1, math.ceil(traces))


def _policy_key(method: Method) -> str:
    return json.dumps(None if method.policy is None else asdict(method.policy), sort_keys=True)


def _first(record: Record, whole: Record, rule: Pick, n: int, total: int) -> Record:
    """Costs of the first ``n`` of ``total`` traces; scoring reads each trace once."""
    # Of each trace its own sampled tokens are known.
    shared = [f.name for f in fields(Cost) if f.name != "policy_tokens"]
    return replace(
        record,
        n=n,
        settings={**whole.settings, "pick": rule},
        **{name: round(getattr(whole, name) * n / total) for name in shared},
    )


def _sample_set(
    comparison: Comparison, policy: Policy | None, label: str, seed: int, n: int
) -> tuple[list[Record], float, Path]:
    session = comparison.session
    path = comparison.file("samples", label, f"n{n}", f"s{seed}")
    session.sampling_engine(None, policy)
    records, seconds = session.run(
        path,
        comparison.problems,
        partial(traces_record, session, None, n, "majority", "samples", seed, policy=policy),
        comparison.config.concurrency,
        f"{n} samples of {label}, seed {seed}",
    )
    return records, seconds, path


def other_policy(comparison: Comparison, method: Method) -> Policy | None:
    """The policy that a method samples from, where that is not the session's.

    It is asked as the session's is, unless it has a prompt of its own.
    """
    if method.policy is None:
        return None
    session = comparison.session
    policy = asked(like(method.policy, session.policy.config), session.task)
    return load_policy(policy, session.task.step_rule)


def ranker(comparison: Comparison, method: Method) -> Ranker:
    """What values the sample sets of a method that names a verifier or a reward model.

    Raises:
        UserError: if the method's pick reads what it does not give.
    """
    scorer: Ranker
    card: ScorerMeta
    if method.reward_model is not None:
        scorer = card = comparison.session.reward_model(method.reward_model)
        name = method.reward_model.model
    else:
        verifier = comparison.verifiers[str(method.verifier)]
        # Sampled ids do not depend on what ranks them, so scoring is always a pass of its own.
        scorer = comparison.session.scorer(verifier, "separate", method.surprise, None)
        card, name = verifier.card, str(method.verifier)
    rule = rule_of(comparison, method)
    check_pick(rule, card.heads, card.base_head, name)
    if rule == "pav":
        beam_settings(card, 1, 1, method.alpha, method.prover)
    return scorer


def _scored_sets(
    comparison: Comparison, method: Method, label: str, sets: list[list[Record]]
) -> tuple[list[list[Record]], float, Ranker, list[Path]]:
    scorer = ranker(comparison, method)
    if isinstance(scorer, Scorer):
        name, digest = scorer.verifier.path.stem, scorer.verifier.digest
    else:
        name, digest = Path(scorer.config.model).name, scorer.digest
    every_step = rule_of(comparison, method) in EVERY_STEP
    out, files, seconds = [], [], 0.0
    for seed, records in zip(comparison.config.seeds, sets, strict=True):
        path = comparison.file(
            "scored",
            name,
            digest,
            "surprise" if method.surprise else "plain",
            "steps" if every_step else "last",
            label,
            f"n{records[0].n}",
            f"s{seed}",
        )
        scored, took = comparison.session.run(
            path,
            comparison.problems,
            partial(score_record, scorer, path.parent / ERRORS, every_step=every_step),
            comparison.config.concurrency,
            f"scoring by {name}, seed {seed}",
            {r.problem_id: r for r in records},
        )
        out.append(scored)
        files.append(path)
        seconds += took
    return out, seconds, scorer, files


async def score_record(
    scorer: StepScorer, log: Path, problem: Problem, record: Record, every_step: bool
) -> Record:
    """The record with its finished candidates valued by ``scorer``.

    Failed where that raises; the traceback goes to ``log``.
    """
    cost = Cost()
    try:
        scored = replace(
            record, candidates=await _valued(scorer, problem, record, every_step, cost)
        )
    except UserError:
        raise
    except Exception as error:
        log_error(log, f"scoring the samples of problem {problem.id}", error)
        scored = failed(record, error)
    sampler = {k: v for k, v in record.settings.items() if k == "sampler"}
    reading = {k: v for k, v in asdict(cost).items() if k.startswith("verifier_")}
    return replace(scored, settings=sampler | scorer.described, **reading)


async def _valued(
    scorer: StepScorer, problem: Problem, record: Record, every_step: bool, cost: Cost
) -> list[Candidate]:
    async def valued(c: Candidate) -> Candidate:
        if not c.finished:
            return c
        rows, logprobs = [], NO_LOGPROBS
        for j in range(0 if every_step else len(c.ends), len(c.ends) + 1):
            ids = c.ids[: c.ends[j - 1]] if j else []
            read = await scorer.read(problem, ids, c.ends[:j], cost, logprobs)
            rows.append(read.values)
            logprobs = read.logprobs
        return replace(c, q={h: [r[h] for r in rows] for h in rows[0]})

    return await gather_or_cancel(valued(c) for c in record.candidates)
