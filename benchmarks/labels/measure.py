"""Train and judge a verifier on what every arm, replicate and share of the budget buys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.labels.quality import Judge, load_judge, quality
from benchmarks.labels.ratio import Curve
from benchmarks.labels.study import SHARES, SWEEP, Arm, Replays, StudyConfig, label_set
from pav.evaluate.ceilings import irreducible_brier
from pav.evaluate.metrics import Counts
from pav.evaluate.scored_labels import MODES
from pav.labels.tables import LabelSet, read_labels

ROLLOUTS = 64  # of a held-out prefix


def judge_of(config: StudyConfig, trunk: str) -> Judge:
    """The trunk with the held-out labels of the study."""
    held_out = read_labels([f"{config.directory}/held_out"])
    return load_judge(trunk, config.policy.label, config.task, held_out, ROLLOUTS)


def replays_on(config: StudyConfig, pool: LabelSet) -> Replays:
    """Replays on the rollouts of the pool."""
    traces = {t.trace_id: t for t in pool.traces}
    completions = {(c.prefix_key, c.policy, c.index): c for c in pool.completions}
    return Replays(config.policy.label, traces, completions)


def measure(config: StudyConfig, arms: Sequence[Arm], trunk: str) -> list[dict[str, Any]]:
    """Rows of all arms, measured where they are not yet in ``quality-<trunk>.jsonl``."""
    path = Path(config.directory) / f"quality-{trunk.replace(':', '_').replace('/', '_')}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    there = {(row["arm"], row["replicate"], row["share"]) for row in rows}
    wanted = {(arm.name, r, s) for arm in arms for r, s, _ in config.groups()}
    if wanted <= there:
        return rows
    pool = read_labels([str(config.pool)])
    replays = replays_on(config, pool)
    judge = judge_of(config, trunk)
    with path.open("a") as stream:
        for replicate, share, problems in config.groups():
            budget = replays.budget(problems)
            for arm in arms:
                if (arm.name, replicate, share) in there:
                    continue
                bought = replays.buy(arm, problems, budget)
                labels = label_set(bought, pool.manifest, arm.traces_count)
                found = quality(judge, labels, config.seed + replicate)
                # The sharpest labels at the price of one rollout each: a limit (see curve).
                one = replays.price(SWEEP[0], bought.traces) if arm == SWEEP[-1] else None
                row = {
                    "arm": arm.name,
                    "replicate": replicate,
                    "share": share,
                    "budget": budget,
                    "tokens": bought.tokens,
                    "tokens_of_one": one,
                    "solutions": len(bought.traces),
                    "prefixes": found.prefixes,
                    "rollouts": len(bought.completions),
                    "held_out": np.bincount(found.problem_N).tolist(),
                    **{m: np.bincount(found.problem_N, found.brier_N[m]).tolist() for m in MODES},
                }
                stream.write(json.dumps(row, allow_nan=False) + "\n")
                stream.flush()
                rows.append(row)
                print(
                    f"{trunk} {arm.name}, replicate {replicate}, share {share}: "
                    + ", ".join(f"{mode} {found.brier_N[mode].mean():.5f}" for mode in MODES)
                )
    return rows


def curve(rows: Sequence[dict[str, Any]], arm: Arm, mode: str, price: str = "tokens") -> Curve:
    """The rows of an arm under one calibrator.

    ``price`` is a column: with ``tokens_of_one`` its labels are had for the tokens of one rollout
    per prefix, which no way of spending rollouts can beat that labels all prefixes.
    """
    own = {(row["replicate"], row["share"]): row for row in rows if row["arm"] == arm.name}
    replicates = sorted({replicate for replicate, _ in own})
    tokens = [[own[r, s][price] for s in SHARES] for r in replicates]
    brier = [[own[r, s][mode] for s in SHARES] for r in replicates]
    held = next(iter(own.values()))["held_out"]
    return Curve(np.array(tokens, float), np.array(brier), np.array(held, float))


def irreducible(config: StudyConfig) -> tuple[float, int]:
    """(Brier score of a predictor that knows the held-out Qs, held-out problems)."""
    labels = read_labels([f"{config.directory}/held_out"])
    held = {t.problem_id for t in labels.traces if t.split == "validation"}
    keys = {c.prefix_key for c in labels.completions if c.problem_id in held}
    kn = np.array([labels.counts[key, config.policy.label] for key in keys], dtype=float)
    exact = np.zeros(len(kn), dtype=bool)
    return irreducible_brier(Counts(kn[:, 0], kn[:, 1], exact)), len(held)
