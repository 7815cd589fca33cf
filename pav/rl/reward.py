"""Rewards: the outcome of a trace, and what a frozen verifier says of every step of it.

Axes: S steps of a trace, P = S + 1 states (state 0 is the problem), T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pav.core.errors import UserError
from pav.labels.examples import unlabelled
from pav.reward_models.reward_model import PRM, RewardModel
from pav.rl.config import Dense, RewardKind
from pav.rl.references import References
from pav.rl.trace import Trace
from pav.verifier.library import LoadedVerifier
from pav.verifier.score import prover_q

Q = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Reward:
    """What a trace earns.

    Attributes:
        outcome: of the whole trace: 1 for a right answer, else 0; or an ORM's Q; or the likelihood
            reward of its chain, 0 before the update has read it.
        gain_S: of every complete step.
        q: head -> (P,) Q of every state; empty where no verifier is asked.
        beyond_P: whether a state is unlike those of the verifier's labels; empty where that is not
            known.
    """

    outcome: float
    gain_S: NDArray[np.float64]
    q: Q
    beyond_P: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))


@dataclass(frozen=True)
class Rewarder:
    """What is rewarded: outcome, and a dense reward of steps.

    Attributes:
        verifier: the frozen verifier; None where no reward is made of one.
        dense: which dense reward (:class:`~pav.rl.config.RlConfig`).
        prover: whose Q it is made of.
        orm: takes the grader's place; None for the grader.
        kind: reward of a whole trace.
        references: what ``base`` compares answers with.
        reward_model: a third-party PRM, which takes the verifier's place in the dense reward.
        discount: of every step that is left, for dense ``discounted``.
    """

    verifier: LoadedVerifier | None
    dense: Dense
    prover: str
    orm: LoadedVerifier | None = None
    kind: RewardKind = "outcome"
    references: References | None = None
    reward_model: RewardModel | None = None
    discount: float = 1.0

    @property
    def reading(self) -> LoadedVerifier | None:
        """The verifier, if it is asked of steps."""
        unasked = self.dense in ("none", "likelihood") or self.reward_model is not None
        return None if unasked else self.verifier

    def __call__(self, traces: Sequence[Trace]) -> list[Reward]:
        """Rewards of ``traces``, in their order.

        The same traces in the same order give the same bits: batches are made by length.
        """
        outcomes = [self._outcome(t) for t in traces]
        if self.orm is not None:
            ends = judged(self.orm, traces)
            head = self.orm.heads[-1]
            outcomes = [0.0 if t.truncated else float(q[head][-1])
                        for t, (q, _) in zip(traces, ends, strict=True)]  # fmt: skip
        found: list[tuple[Q, NDArray[np.bool_]]]
        if self.reward_model is not None:
            states = self.reward_model.states([(t.problem, t.ids, t.ends) for t in traces])
            base, found = PRM, [({PRM: q_P}, np.zeros(0, dtype=bool)) for q_P in states]
        elif (verifier := self.reading) is not None:
            base, found = verifier.checkpoint.card.base_head, judged(verifier, traces)
        else:
            return [Reward(o, np.zeros(len(t.ends)), {})
                    for o, t in zip(outcomes, traces, strict=True)]  # fmt: skip
        return [Reward(o, gains(q, self.dense, base, self.prover, self.discount), q, beyond_P)
                for o, (q, beyond_P) in zip(outcomes, found, strict=True)]  # fmt: skip

    def _outcome(self, trace: Trace) -> float:
        if self.kind == "outcome" or self.references is None:
            return float(trace.correct)
        answer, is_right = self.references.exact(trace)
        if self.kind == "base":
            return float(is_right)
        if self.kind == "base_100":
            return 100.0 if is_right else 10.0 if answer is not None else 0.0
        return 0.0


def judged(verifier: LoadedVerifier, traces: Sequence[Trace]) -> list[tuple[Q, NDArray[np.bool_]]]:
    """Q of every head at every state of every trace, and whether it is unlike the labels' states.

    One forward pass for all states of a trace.
    """
    trunk = verifier.trunk
    return verifier.judged([unlabelled(trunk, t.problem, t.ids, t.ends) for t in traces])


def gains(
    q: Q, dense: Dense, base_head: str, prover: str, discount: float = 1.0
) -> NDArray[np.float64]:
    """(S,) dense reward of every step.

    Args:
        q: head -> (P,) Q of every state.
        dense: ``pav``: A of the prover (paper, Eq. 2), the change of its Q over the step.
            ``record``: by how much the step raises the highest Q so far. It adds up to
            ``max Q - Q_0`` at most, a step that says nothing new earns 0, and the mean step of any
            policy earns at least that: such filler cannot beat it, whatever the prover.
            ``discounted``: A of a discounted return (Section 5, Fig. 16),
            ``E[d^(|y| - |s| - 1) R | s, a] - E[d^(|y| - |s|) R | s]``, |.| in steps: a prover that
            is right whatever the step still likes one that brings the end nearer. The paper labels
            with discounted returns of the prover; here a head's Q is R, and the trace's own steps
            those that are left: ``d^(S - h - 1) Q_(h+1) - d^(S - h) Q_h``.
            ``q_mu`` and ``q_base``: Q after the step (Section 5's ablations).
        base_head: head of the base policy's Q.
        prover: see :func:`pav.verifier.score.prover_q`.
        discount: d of ``discounted``; 1 makes it ``pav``.

    Raises:
        UserError: if there is no such dense reward.
    """
    mu_P = prover_q(prover, base_head, q)
    if dense == "pav":
        return np.diff(mu_P)
    if dense == "record":
        return np.maximum(mu_P[1:] - np.maximum.accumulate(mu_P)[:-1], 0.0)
    if dense == "discounted":
        return np.diff(discount ** np.arange(len(mu_P))[::-1] * mu_P)
    if dense == "q_mu":
        return mu_P[1:]
    if dense == "q_base":
        return q[base_head][1:]
    raise UserError(f"dense is {dense!r}; give pav, record, discounted, q_mu, q_base or none")
