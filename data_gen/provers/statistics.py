"""Distinguishability and alignment of provers from a label run, without bias.

Theorem 3.1 of the PAV paper bounds what a prover mu adds to a policy pi by
``E_s V_a[A^mu] + E_s E_a[A^mu A^pi]``, states s visited and steps a drawn by pi. Both are
covariances over the steps drawn in a state: ``cov(Q^mu, Q^mu)`` and ``cov(Q^mu, Q^pi)``, of which
the mean of ``(X_i - X_j) (Y_i - Y_j) / 2`` over pairs of draws is an unbiased estimate. Where both
draws took the same step a pair is exactly 0, although the rollouts after it are noisy; elsewhere
the product of two estimates of one step is replaced by an unbiased estimate of the product.

Axes: C distinct steps drawn in a state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_gen.label_run import Run
from data_gen.strategies import next_prefix, plan_of
from pav.core.advantage import best_of_k_from_counts
from pav.core.steps import Stepper
from pav.labels.tables import prefix_key, prefixes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """A state that the base policy visited, with the steps that it drew there.

    Attributes:
        problem_id: its problem.
        visits: solutions of the base that pass through it.
        draws_C: how often each distinct step was drawn.
        right_C: policy -> right rollouts of ``n_mc`` after each step; where a step ends the
            solution, all or none.
    """

    problem_id: str
    visits: int
    draws_C: Array
    right_C: dict[str, Array]


@dataclass(frozen=True)
class States:
    """What a label run tells about the states that its base policy visited.

    Attributes:
        states: those in which two steps or more were drawn and labelled.
        n: rollouts per prefix and policy.
        visits: visits of all states.
    """

    states: list[State]
    n: int
    visits: int

    @property
    def covered(self) -> float:
        """Share of the visits that went to ``states``."""
        return sum(s.visits for s in self.states) / self.visits if self.visits else 0.0


@dataclass
class _Visited:
    problem_id: str
    visits: int = 0
    # Steps that go on, by key of the prefix after them; outcomes of those that end the solution.
    children: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    ends: list[bool] = field(default_factory=list)


def states_of(run: Run, stepper: Stepper) -> States:
    """States of the base's own solutions and the steps drawn there.

    A state's steps are those of all base solutions that pass through it, and the first steps of so
    many of the base's rollouts from it as the run has ``branches``. The problem is a state in
    which every seed draws; later ones mostly have one draw without branches. A state is left out
    where fewer than two steps were drawn, or one of them has not all its rollouts.
    """
    plan = plan_of(run.manifest)
    found: dict[str, _Visited] = {}
    for trace in run.traces.values():
        if trace.policy != run.base:
            continue
        for step, ids in enumerate(prefixes(trace)):
            key = prefix_key(trace.problem_id, ids)
            state = found.setdefault(key, _Visited(trace.problem_id))
            if not state.visits:
                for index in range(plan.branches):
                    rollout = run.completions.get((key, run.base, index))
                    if rollout is not None:
                        _draw(state, next_prefix(rollout, stepper), rollout.correct)
            state.visits += 1
            end = trace.step_ends[step] if step < len(trace.step_ends) else None
            goes_on = end is not None and (end < len(trace.ids) or trace.truncated)
            _draw(state, trace.ids[:end] if goes_on else None, trace.correct)
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for c in run.completions.values():
        if c.index < plan.n_mc:
            cell = counts[c.prefix_key, c.policy]
            cell[0] += c.correct
            cell[1] += 1
    states = []
    for state in found.values():
        is_labelled = all(
            counts[key, name][1] == plan.n_mc for key in state.children for name in run.policies
        )
        if is_labelled and sum(state.children.values()) + len(state.ends) > 1:
            states.append(_state(state, counts, list(run.policies), plan.n_mc))
    return States(states, plan.n_mc, sum(s.visits for s in found.values()))


def _draw(state: _Visited, prefix: list[int] | None, correct: bool) -> None:
    if prefix is None:
        state.ends.append(correct)
    else:
        state.children[prefix_key(state.problem_id, prefix)] += 1


def _state(
    visited: _Visited, counts: dict[tuple[str, str], list[int]], names: Iterable[str], n: int
) -> State:
    ends = [n * correct for correct in visited.ends]
    return State(
        visited.problem_id,
        visited.visits,
        np.array([*visited.children.values(), *(1 for _ in ends)], dtype=np.float64),
        {
            name: np.array([*(counts[key, name][0] for key in visited.children), *ends], float)
            for name in names
        },
    )


def covariance(draws_C: Array, x_C: Array, y_C: Array, xy_C: Array) -> float:
    """Unbiased covariance of two values over the steps that a policy draws in a state.

    Args:
        draws_C: how often each distinct step was drawn, at least two draws in all.
        x_C: unbiased estimates of the one value after each step, independent between steps.
        y_C: of the other value; may share rollouts with ``x_C``.
        xy_C: unbiased estimates of their product.
    """
    total = draws_C.sum()
    same = (draws_C * (total - draws_C) * xy_C).sum()
    crossed = (draws_C * x_C).sum() * (draws_C * y_C).sum() - (draws_C**2 * x_C * y_C).sum()
    return float((same - crossed) / (total * (total - 1)))


def of_policy(state: State, name: str, base: str, n: int) -> tuple[float, float]:
    """(V_a[A^mu], E_a[A^mu A^pi]) of a rollout policy in a state; ``n`` of at least 2."""
    k_C, base_C = state.right_C[name], state.right_C[base]
    square_C = k_C * (k_C - 1) / (n * (n - 1))
    variance = covariance(state.draws_C, k_C / n, k_C / n, square_C)
    if name == base:
        return variance, variance
    product_C = k_C * base_C / n**2
    return variance, covariance(state.draws_C, k_C / n, base_C / n, product_C)


def of_best_of_k(state: State, k: int, base: str, n: int) -> tuple[float, float]:
    """The same of Best-of-K of the base, from the base's rollouts.

    With Q estimated from the same rollouts, ``(1-(1-Q)^K)^2 = 1 - 2 (1-Q)^K + (1-Q)^2K`` and
    ``Q (1-(1-Q)^K)`` have unbiased estimates from draws without replacement.

    Raises:
        UserError: if ``2 k`` exceeds ``n``: no unbiased estimate exists.
    """
    right_C = state.right_C[base]
    best_C = best_of_k_from_counts(right_C, n, k)
    square_C = 2 * best_C - best_of_k_from_counts(right_C, n, 2 * k)
    variance = covariance(state.draws_C, best_C, best_C, square_C)
    # One rollout is right and K of the others are wrong.
    others_C = np.maximum(right_C - 1, 0)
    product_C = right_C / n * best_of_k_from_counts(others_C, max(n - 1, 1), k)
    return variance, covariance(state.draws_C, best_C, right_C / n, product_C)
