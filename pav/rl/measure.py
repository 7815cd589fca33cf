"""What is measured: of the traces that are trained on, and of held-out problems.

Axes: N traces, P problems, G traces of each.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray

from pav.core.advantage import best_of_k_from_counts
from pav.core.statistics import bootstrap
from pav.rl.advantage import dead
from pav.rl.config import RlConfig
from pav.rl.credit import is_idle
from pav.rl.learner import Learner
from pav.rl.likelihood import log_mean
from pav.rl.processes import gathered
from pav.rl.read import read_after
from pav.rl.references import answers
from pav.rl.reward import Reward
from pav.rl.rollout import Actor, rollout
from pav.rl.trace import Trace
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
    nothing = np.zeros(0)
    numbered = enumerate(zip(traces, rewards, strict=True))
    rows = gathered(fabric, [_row(t, r, sums.read.get(i, nothing)) for i, (t, r) in numbered])
    table = np.stack(rows)
    gain_N = np.concatenate(gathered(fabric, [r.gain_S for r in rewards]))
    outcome_PG = table[:, 1].reshape(-1, config.group)
    parts = gathered(fabric, [np.array(list(sums.numbers.values()))])
    total = dict(zip(sums.numbers, np.sum(parts, axis=0), strict=True))
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
        "update/used": sum(1 for s in samples if not is_idle(s)) / max(1, len(samples)),
        "mismatch/mean": total["mismatch"] / tokens,
        "mismatch/largest_ratio": max(p[2] for p in parts),
        "mismatch/beyond_2": total["beyond"] / tokens,
    }
    if config.by_likelihood:  # chains are not graded
        del found["train/accuracy"]
        found |= {
            "likelihood/answer": table[:, 9].mean(),
            "likelihood/token": table[:, 9].sum() / max(1.0, table[:, 10].sum()),
            "likelihood/untagged": 1 - table[:, 11].mean(),
        }
    if config.dense not in ("none", "likelihood") and config.reward_model is None:
        beyond_N = np.concatenate(gathered(fabric, [r.beyond_P for r in rewards]))
        found["verifier/out_of_range"] = beyond_N.mean()
    if config.estimator == "value":
        found["update/value_explained"] = 1 - total["residual"] / max(total["spread"], 1e-12)
    return {name: float(value) for name, value in found.items()}


def _row(trace: Trace, reward: Reward, read_A: NDArray[np.float64]) -> NDArray[np.float64]:
    steps = [tuple(trace.ids[a:b]) for a, b in zip([0, *trace.ends], trace.ends, strict=False)]
    repeated = len(steps) - len(set(steps))
    shortest = sum(1 for s in steps if len(s) <= 2)
    return np.array([
        trace.correct, reward.outcome, reward.gain_S.sum(), len(trace.ids), len(steps),
        trace.truncated, shortest / max(1, len(steps)), repeated / max(1, len(steps)),
        zlib.crc32(np.array(trace.ids).tobytes()), read_A.sum(), len(read_A), trace.is_tagged,
    ], dtype=float)  # fmt: skip


def evaluate(
    fabric: Fabric,
    actor: Actor,
    learner: Learner,
    problems: Sequence[Problem],
    version: int,
    config: RlConfig,
) -> Metrics:
    """Held-out accuracy at the training temperature, greedy, and of K traces (pass@K), where the
    task grades; and where the reward is one of the reference answer, how likely that is.

    The same problems and seeds every time, so that versions are compared pairwise.
    """
    mine = list(problems)[fabric.global_rank :: fabric.world_size]
    width = -(-len(problems) // fabric.world_size)
    count = config.eval_samples
    traces = rollout(actor, mine, count, ("evaluate",), version)
    greedy = rollout(actor, mine, 1, ("greedy",), version, greedy=True)
    right_PG = np.array([t.correct for t in traces], dtype=float).reshape(-1, count)
    lengths = np.array([len(t.ids) for t in traces], dtype=float).reshape(-1, count)
    read_PF = np.zeros((len(mine), len(_READ)))
    graded = actor.references.task.is_graded
    reads = config.reads_references(graded)
    if reads:
        read_PF = _references(actor, learner, traces, config)
    cut_PG = np.array([t.truncated for t in traces], dtype=float).reshape(-1, count)
    others_P3 = np.stack([[g.correct for g in greedy], lengths.mean(1), cut_PG.mean(1)], axis=1)
    rows = list(np.concatenate([right_PG, others_P3, read_PF], axis=1))
    rows += [np.full(count + 3 + len(_READ), np.nan)] * (width - len(mine))
    table = np.stack(gathered(fabric, rows))
    table = table[~np.isnan(table[:, 0])]
    found: Metrics = {
        "held_out/tokens": float(table[:, count + 1].mean()),
        "held_out/truncated": float(table[:, count + 2].mean()),
    }
    if graded:
        found |= _success(table[:, :count], table[:, count])
    if reads:
        found |= _likelihood(dict(zip(_READ, table[:, count + 3 :].T, strict=True)), count)
    return found


def _success(right_PG: NDArray[np.float64], greedy_P: NDArray[np.float64]) -> Metrics:
    interval = bootstrap(right_PG)
    found: Metrics = {
        "accuracy": interval.mean,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "greedy": float(greedy_P.mean()),
    }
    count, k = right_PG.shape[1], 2
    while k <= count:
        found[f"pass@{k}"] = float(best_of_k_from_counts(right_PG.sum(1), count, k).mean())
        k *= 2
    return found


# Of a problem: log-probability of its reference after one chain (mean over chains) and after all of
# them (MC), tokens of the reference and of a chain, and the share of chains that opened no answer.
_READ = ("one", "all", "tokens", "chain", "untagged")


def _references(
    actor: Actor, learner: Learner, traces: Sequence[Trace], config: RlConfig
) -> NDArray[np.float64]:
    """Figures (P, F) of :data:`_READ`; the first reference is read."""
    count = config.eval_samples
    chains = [actor.references.after(t, answers(t.problem)[0]) for t in traces]
    read = read_after(learner, chains, config.tokens_per_batch)
    log_PG = np.array([row.sum() for row in read]).reshape(-1, count)

    def mean_P(values: Sequence[float]) -> NDArray[np.float64]:
        return np.asarray(np.reshape(values, (-1, count)).mean(1))

    return np.stack([
        log_PG.mean(1), [log_mean(row) for row in log_PG], mean_P([len(r) for r in read]),
        mean_P([len(t.ids) for t in chains]), mean_P([not t.is_tagged for t in chains]),
    ], axis=1)  # fmt: skip


def _likelihood(read: dict[str, NDArray[np.float64]], count: int) -> Metrics:
    """Means over problems; perplexities are per token of the reference."""
    tokens = read["tokens"].sum()
    return {
        "reference/answer": float(read["one"].mean()),
        "reference/token": float(read["one"].sum() / tokens),
        "reference/perplexity": float(np.exp(-read["one"].sum() / tokens)),
        f"reference/perplexity_mc{count}": float(np.exp(-read["all"].sum() / tokens)),
        "reference/answer_perplexity": float(np.exp(-read["one"].mean())),
        "held_out/chain": float(read["chain"].mean()),
        "held_out/untagged": float(read["untagged"].mean()),
    }


def merit(found: Metrics) -> float:
    """What the best policy is best in: accuracy, or else the mean probability of a token of the
    reference (one over its perplexity).
    """
    return found["accuracy"] if "accuracy" in found else 1 / found["reference/perplexity"]
