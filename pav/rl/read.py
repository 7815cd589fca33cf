"""What an iteration does with reference answers: sample chains, choose, read, and log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pav.rl.config import SLOPE_ITERATIONS, RlConfig
from pav.rl.guards import Metrics
from pav.rl.learner import Learner
from pav.rl.likelihood import reward
from pav.rl.progress import log_likelihoods
from pav.rl.references import References, answers
from pav.rl.reward import Reward
from pav.rl.rollout import Actor, rollout
from pav.rl.trace import Trace
from pav.rl.update import Sample, references_read
from pav.tasks.base import Problem


def sampled(
    actor: Actor, problems: Sequence[Problem], config: RlConfig, version: int
) -> list[Trace]:
    """Traces of an iteration: whole solutions, or chains with the reference after each."""
    key = ("train", version)
    if not config.by_likelihood:
        return rollout(actor, problems, config.group, key, version)
    references = actor.references
    if config.reward == "sft" and config.sft_chain == "none":
        return [references.empty(p, actor.policy.encode(p), version) for p in problems]
    traces = rollout(actor, problems, config.group, key, version, chain=True)
    return [references.after(t, references.drawn(t.problem, version)) for t in traces]


def with_best_reference(
    learner: Learner, references: References, traces: Sequence[Trace], config: RlConfig
) -> list[Trace]:
    """Where it is asked for, the reference that the policy finds likeliest after each chain."""
    if config.references != "best" or not config.by_likelihood:
        return list(traces)
    found = []
    for trace in traces:
        options = [references.after(trace, answer) for answer in answers(trace.problem)]
        if len(options) > 1:
            read = read_after(learner, options, config.tokens_per_batch)
            trace = options[int(np.argmax([row.sum() for row in read]))]
        found.append(trace)
    return found


def read_after(learner: Learner, traces: Sequence[Trace], tokens: int) -> list[NDArray[np.float64]]:
    """(A,) log-probability of every token of the reference after each trace."""
    samples = [
        Sample(
            [*t.prompt, *t.ids, *t.reference],
            len(t.prompt) + len(t.ids),
            np.zeros(0, np.float32),
            np.zeros(0),
            0.0,
        )
        for t in traces
    ]
    return references_read(learner, samples, tokens)


def with_progress(
    learner: Learner,
    actor: Actor,
    rewards: Sequence[Reward],
    traces: Sequence[Trace],
    config: RlConfig,
) -> list[Reward]:
    """Where it is asked for, the dense reward of a step: what it adds to the log-probability of the
    forced answer under the policy itself.
    """
    if config.dense != "likelihood":
        return list(rewards)
    references = actor.references
    answer = [references.forced(t.problem, t.version) for t in traces]
    found = log_likelihoods(learner, traces, answer, config.tokens_per_batch)
    return [replace(r, gain_S=np.diff(row_P)) for r, row_P in zip(rewards, found, strict=True)]


def with_likelihood(
    rewards: Sequence[Reward], read: Mapping[int, NDArray[np.float64]], config: RlConfig
) -> list[Reward]:
    """Rewards with the outcome that the update has read."""
    if not config.by_likelihood:
        return list(rewards)
    return [
        replace(r, outcome=reward(config.reward, read[i])) if i in read else r
        for i, r in enumerate(rewards)
    ]


def floor_slope(history: Sequence[Metrics], config: RlConfig) -> float:
    """What a token below the floor of chains costs; never negative.

    The paper's is the slope of the reward over the length of chains while the first shorten them
    (arXiv 2602.03979, Section 5): it is taken by its size.
    """
    if config.chain_floor is None:
        return 0.0
    if config.chain_slope is not None:
        return config.chain_slope
    rows = [r for r in history if "train/tokens" in r][:SLOPE_ITERATIONS]
    length = np.array([r["train/tokens"] for r in rows])
    if len(rows) < SLOPE_ITERATIONS or np.ptp(length) == 0:
        return 0.0
    outcome = np.array([r["train/outcome"] for r in rows])
    return abs(float(np.polyfit(length, outcome, 1)[0]))
