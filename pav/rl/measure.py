"""What is measured: of the traces that are trained on, and of held-out problems.

Axes: N traces, P problems, G traces of each.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from lightning.fabric import Fabric

from pav.core.advantage import best_of_k_from_counts
from pav.core.statistics import bootstrap
from pav.rl.advantage import dead
from pav.rl.config import RlConfig
from pav.rl.processes import gathered
from pav.rl.reward import Reward
from pav.rl.rollout import Actor, Trace, rollout
from pav.rl.update import Sample, Sums
from pav.tasks.base import Problem

Metrics = dict[str, float]


def training_metrics(
    fabric: Fabric,
    traces: Sequence[Trace],
    rewards: Sequence[Reward],
    samples: Sequence[Sample],
    sums: Sums,
    config: RlConfig,
) -> Metrics:
    """Figures of an iteration, over the traces of all processes."""
    rows = gathered(fabric, [_row(t, r) for t, r in zip(traces, rewards, strict=True)])
    table = np.stack(rows)
    gain_N = np.concatenate(gathered(fabric, [r.gain_S for r in rewards]))
    outcome_PG = table[:, 1].reshape(-1, config.group)
    parts = gathered(fabric, [np.array(list(vars(sums).values()))])
    total = dict(zip(vars(sums), np.sum(parts, axis=0), strict=True))
    tokens = max(1.0, total["tokens"])
    iteration = traces[0].version + 1
    found = {
        "iteration": iteration,
        "samples": iteration * config.batch * config.group,
        "train/accuracy": table[:, 0].mean(),
        "train/outcome": table[:, 1].mean(),
        "train/dense": table[:, 2].mean(),
        "train/dense_per_step": gain_N.mean() if len(gain_N) else 0.0,
        "train/dense_spread": gain_N.std() if len(gain_N) else 0.0,
        "train/dead_groups": dead(outcome_PG).mean(),
        "train/tokens": table[:, 3].mean(),
        "train/tokens_max": table[:, 3].max(),
        "train/steps": table[:, 4].mean(),
        "train/truncated": table[:, 5].mean(),
        "train/empty_steps": table[:, 6].mean(),
        "train/repeated_steps": table[:, 7].mean(),
        "train/alike": (np.ptp(table[:, 8].reshape(-1, config.group), axis=1) == 0).mean(),
        "update/loss": total["loss"],
        "update/gradient_norm": np.mean([p[-1] for p in parts]),
        "update/entropy": total["entropy"] / tokens,
        "update/kl_k1": total["k1"] / tokens,
        "update/kl_k3": total["k3"] / tokens,
        "update/clipped": total["clipped"] / tokens,
        "update/used": sum(1 for s in samples if s.weight_T.any()) / max(1, len(samples)),
        "mismatch/mean": total["mismatch"] / tokens,
        "mismatch/largest_ratio": max(p[2] for p in parts),
        "mismatch/beyond_2": total["beyond"] / tokens,
    }
    if config.dense != "none":
        beyond_N = np.concatenate(gathered(fabric, [r.beyond_P for r in rewards]))
        found["verifier/out_of_range"] = beyond_N.mean()
    if config.estimator == "value":
        found["update/value_explained"] = 1 - total["residual"] / max(total["spread"], 1e-12)
    return {name: float(value) for name, value in found.items()}


def _row(trace: Trace, reward: Reward) -> np.ndarray:
    steps = [tuple(trace.ids[a:b]) for a, b in zip([0, *trace.ends], trace.ends, strict=False)]
    repeated = len(steps) - len(set(steps))
    shortest = sum(1 for s in steps if len(s) <= 2)
    return np.array([
        trace.correct, reward.outcome, reward.gain_S.sum(), len(trace.ids), len(steps),
        trace.truncated, shortest / max(1, len(steps)), repeated / max(1, len(steps)),
        zlib.crc32(np.array(trace.ids).tobytes()),
    ], dtype=float)  # fmt: skip


def evaluate(
    fabric: Fabric, actor: Actor, problems: Sequence[Problem], version: int, config: RlConfig
) -> Metrics:
    """Held-out accuracy at the training temperature, greedy, and of K traces (pass@K).

    The same problems and seeds every time, so that versions are compared pairwise.
    """
    mine = list(problems)[fabric.global_rank :: fabric.world_size]
    width = -(-len(problems) // fabric.world_size)
    count = config.eval_samples
    traces = rollout(actor, mine, count, ("evaluate",), version)
    greedy = rollout(actor, mine, 1, ("greedy",), version, greedy=True)
    right_PG = np.array([t.correct for t in traces], dtype=float).reshape(-1, count)
    lengths = np.array([len(t.ids) for t in traces], dtype=float).reshape(-1, count)
    rows = [np.concatenate([r, [g.correct], [length.mean()]])
            for r, g, length in zip(right_PG, greedy, lengths, strict=True)]  # fmt: skip
    rows += [np.full(count + 2, np.nan)] * (width - len(mine))
    table = np.stack(gathered(fabric, rows))
    table = table[~np.isnan(table[:, 0])]
    interval = bootstrap(table[:, :count])
    found: Metrics = {
        "accuracy": interval.mean,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "greedy": float(table[:, count].mean()),
        "held_out/tokens": float(table[:, -1].mean()),
    }
    k = 2
    while k <= count:
        right_P = table[:, :count].sum(1)
        found[f"pass@{k}"] = float(best_of_k_from_counts(right_P, count, k).mean())
        k *= 2
    return found
