"""Credit: from rewards to what the log-probability of every token is multiplied with (Eq. 5).

Axes: P problems, G traces of each, S steps, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray

from pav.rl.advantage import BASELINES, center, step_credit, token_weights
from pav.rl.config import RlConfig
from pav.rl.loss import normaliser
from pav.rl.processes import gathered
from pav.rl.reward import Reward
from pav.rl.trace import Trace
from pav.rl.update import Sample


def samples(
    fabric: Fabric,
    traces: Sequence[Trace],
    rewards: Sequence[Reward],
    config: RlConfig,
    slope: float = 0.0,
) -> list[Sample]:
    """What the loss needs of every trace of this process.

    A token of step h is multiplied with ``(R - b) + alpha * (credit_h - c_h)``: R is the return to
    go, the same at every token; b the baseline of the estimator; the credit of a step is never
    added up over steps unless ``credit_lambda`` says so. Tokens after the last complete step of a
    truncated trace earn no credit. A likelihood reward is not known yet: R is what the chain's
    length costs, and the update adds the rest.

    Args:
        fabric: of the processes that train together: means are over all their traces.
        traces: of this process, those of a problem one after the other.
        rewards: of each.
        config: settings.
        slope: what a token below ``chain_floor`` costs.
    """
    outcome_N = np.array([r.outcome for r in rewards], dtype=np.float64)
    lengths = np.array([len(t.ids) for t in traces])
    outcome_N -= config.length_penalty * lengths
    if config.chain_floor is not None:
        outcome_N += slope * np.minimum(lengths - config.chain_floor, 0)
    if config.estimator != "value" and config.group > 1:
        outcome_N = BASELINES[config.estimator](outcome_N.reshape(-1, config.group)).ravel()
    credits = credit_of(fabric, rewards, config)
    mine = slice(fabric.global_rank * len(traces), (fabric.global_rank + 1) * len(traces))
    computed = [np.array([len(t.ids) + len(t.reference)]) for t in traces]
    everyone = [int(row[0]) for row in gathered(fabric, computed)]
    coefficient_N = normaliser(everyone, config.normalization)[mine]
    return [
        Sample(
            [*t.prompt, *t.ids, *t.reference],
            len(t.prompt),
            t.sampled_T,
            token_weights(len(t.ids), t.ends, float(outcome), config.alpha * credit_S),
            float(coefficient),
            number,
        )
        for number, (t, outcome, credit_S, coefficient) in enumerate(
            zip(traces, outcome_N, credits, coefficient_N, strict=True)
        )
        if t.ids or t.reference
    ]


def credit_of(
    fabric: Fabric, rewards: Sequence[Reward], config: RlConfig
) -> list[NDArray[np.float64]]:
    """(S,) credit of every step of the traces of this process, before alpha."""
    credits = [step_credit(r.gain_S, config.credit_lambda) for r in rewards]
    if config.center == "none":
        return credits
    first = fabric.global_rank * len(credits)
    everyone = center(gathered(fabric, credits), config.center)
    return everyone[first : first + len(credits)]


def is_idle(sample: Sample) -> bool:
    """Whether a trace would move nothing but the KL divergence."""
    return not (sample.weight_T.any() or sample.reference_length)
