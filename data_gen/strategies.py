"""Which rollouts a solution gets: pure functions of the solution and of what is finished.

The rollouts of a prefix under a policy are numbered 0, 1, ...; a strategy hands out the next
numbers in rounds, and a decision looks only at outcomes of numbers handed out before. So
:func:`next_rollouts` can play all rounds again from the start on whatever is finished: the requests
of a solution are a function of outcomes alone, not of the order of work, of other solutions that
share its prefixes, of the number of workers, or of the moment at which a run was killed.

``all_prefixes``
    ``n_mc`` rollouts per prefix and policy.
``first_pit``
    all prefixes of right solutions; wrong ones from the problem on to the first pit, the first
    prefix from which no policy has a right rollout in ``n_mc``, the pit included (PAV paper,
    Appendix D). What comes after a pit can only be a pit and is not paid for. No right rollout in
    ``n_mc`` must mean that there is hardly a chance: with few rollouts and weak policies the walk
    ends at the problem. Differs from the paper in one thing: its wrong solutions also start from
    states of high value found on the way; all of ours start at the problem.
``adaptive``
    The solution's own ending is the first rollout of each of its prefixes (:func:`own_endings` in
    ``pav/labels/tables.py``), and the policies that did not write it add one each. More only where
    a token teaches more than it does in a new solution (see :func:`adaptive`); ``n_mc`` sampled
    rollouts per prefix on average at most, so that with 0 endings are all there is. What is saved
    buys solutions: raise ``n_traces``. Where the stop depends on outcomes, the mean of k/n over
    prefixes is biased, but the sum of (k - n Q) is not (optional stopping), and that is what
    training on counts fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pav.core.steps import Stepper
from pav.labels.tables import Completion, Key, Trace, prefix_key, prefixes

Strategy = Literal["all_prefixes", "first_pit", "adaptive"]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """How the rollouts of a run are spent.

    Attributes:
        policies: names of the rollout policies, the base first.
        n_mc: rollouts per prefix and policy; for ``adaptive`` the most on average, own endings
            not counted.
        strategy: see the module.
        max_labelled_prefixes: labelled prefixes per solution, spread evenly; None for all.
        branches: of so many rollouts of the base from every prefix of a base solution, the prefix
            at the end of the first step is labelled, too.
    """

    policies: tuple[str, ...]
    n_mc: int
    strategy: Strategy = "all_prefixes"
    max_labelled_prefixes: int | None = None
    branches: int = 0


@dataclass(frozen=True)
class Request:
    """A rollout to make: number ``index`` of ``policy`` from the solution ids ``prefix``."""

    key: str
    prefix: list[int]
    policy: str
    index: int


def spread(count: int, most: int | None) -> list[int]:
    """At most ``most`` (2 or more) of the numbers below ``count``: both ends, evenly between."""
    if most is None or count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def next_rollouts(
    plan: Plan, trace: Trace, done: Mapping[Key, Completion], stepper: Stepper | None = None
) -> list[Request]:
    """The rollouts that a solution needs next, given those that are done; none when it is labelled.

    Args:
        plan: how rollouts are spent.
        trace: the solution.
        done: finished rollouts, of all solutions.
        stepper: cuts rollouts into steps; without it branches are left out of account.
    """
    everything = prefixes(trace)
    chosen = [everything[i] for i in spread(len(everything), plan.max_labelled_prefixes)]
    requests = _play(plan, plan.strategy, trace, chosen, done)
    if requests or stepper is None or not plan.branches or trace.policy != plan.policies[0]:
        return requests
    children: dict[str, list[int]] = {}
    for prefix in chosen:
        key = prefix_key(trace.problem_id, prefix)
        for index in range(plan.branches):
            child = next_prefix(done[key, plan.policies[0], index], stepper)
            if child is not None:
                children[prefix_key(trace.problem_id, child)] = child
    return _play(plan, "all_prefixes", trace, list(children.values()), done)


def next_prefix(rollout: Completion, stepper: Stepper) -> list[int] | None:
    """Where a rollout stands after its first step; None where that is its end."""
    whole = rollout.prefix_ids + rollout.ids
    end = next((e for e in stepper.step_ends(whole) if e > len(rollout.prefix_ids)), None)
    if end is None or (end == len(whole) and not rollout.truncated):
        return None
    return whole[:end]


def _play(
    plan: Plan,
    strategy: Strategy,
    trace: Trace,
    chosen: Sequence[list[int]],
    done: Mapping[Key, Completion],
) -> list[Request]:
    """Play the rounds of a strategy; what is missing of the first round that is not complete."""
    keys = [prefix_key(trace.problem_id, ids) for ids in chosen]
    # Rollouts are about as long as what the solution itself has left; branches may be longer.
    left_P = np.array([max(1, len(trace.ids) - len(ids)) for ids in chosen])
    k_RP = np.zeros((len(plan.policies), len(keys)), dtype=np.int64)
    n_RP = np.zeros_like(k_RP)
    own_R1 = np.array([[strategy == "adaptive" and trace.policy == name] for name in plan.policies])
    while True:
        seen_k_RP, seen_n_RP = k_RP + own_R1 * trace.correct, n_RP + own_R1
        if strategy == "adaptive":
            parts = zip(seen_k_RP, seen_n_RP, n_RP, strict=True)
            more_RP = np.stack([adaptive(k, n, made, plan.n_mc, left_P) for k, n, made in parts])
        else:
            more_RP = allocate(strategy, k_RP, n_RP, plan.n_mc, trace.correct)
        if not more_RP.any():
            return []
        missing = []
        for p, r in zip(*np.nonzero(more_RP.T), strict=True):
            for index in range(n_RP[r, p], n_RP[r, p] + more_RP[r, p]):
                found = done.get((keys[p], plan.policies[r], index))
                if found is None:
                    missing.append(Request(keys[p], chosen[p], plan.policies[r], int(index)))
                else:
                    k_RP[r, p] += found.correct
        if missing:
            return missing
        n_RP += more_RP


def allocate(strategy: Strategy, k_RP: Counts, n_RP: Counts, n_mc: int, correct: bool) -> Counts:
    """Rollouts that the next round adds, (policies, prefixes); all zero when there is none.

    Args:
        strategy: ``all_prefixes`` or ``first_pit``.
        k_RP: right rollouts so far, under each policy from each prefix in order.
        n_RP: rollouts so far.
        n_mc: rollouts per prefix.
        correct: whether the solution is right.
    """
    if strategy == "all_prefixes" or correct:
        return n_mc - n_RP
    more_RP = np.zeros_like(n_RP)
    p = int((n_RP > 0).all(axis=0).sum())
    in_pit = p > 0 and not k_RP[:, p - 1].any()
    if p < n_RP.shape[1] and not in_pit:
        more_RP[:, p] = n_mc
    return more_RP


def adaptive(k_P: Counts, n_P: Counts, made_P: Counts, n_mc: int, left_P: Counts) -> Counts:
    """Rollouts that the next round adds to the prefixes of a solution under one policy.

    Where nothing is known yet, every prefix gets one. Each later round gives one more to the
    prefixes where the variance of Q is expected to fall by more per token than it does in a new
    solution of this policy, whose ending labels all its prefixes: what is not spent here buys such
    a solution. (Largest fall per token first, earlier prefixes first among equals, down to the last
    rollout of ``n_mc`` times the number of prefixes.) So it is the shortest rollouts, at the very
    end, that are repeated, and those whose outcomes differ.

    Args:
        k_P: right outcomes so far, that of the solution itself included where it is the policy's.
        n_P: outcomes so far.
        made_P: those of them that were sampled.
        n_mc: sampled rollouts per prefix on average, at most.
        left_P: tokens of the solution behind each prefix, about those of a rollout; positive.
    """
    if not n_P.any():
        return np.full_like(n_P, min(n_mc, 1))
    per_token_P = gain(k_P, n_P) / left_P
    new = len(n_P) * gain(np.zeros(1), np.zeros(1)) / left_P.max()
    order = np.argsort(-per_token_P, kind="stable")
    worth = order[per_token_P[order] > new]
    more_P = np.zeros_like(n_P)
    more_P[worth[: max(0, n_mc * len(n_P) - int(made_P.sum()))]] = 1
    return more_P


def gain(k: NDArray[Any], n: NDArray[Any]) -> NDArray[np.float64]:
    """How much one more rollout is expected to lower the variance of Q, after k right of n.

    Q follows its Beta posterior under Jeffreys' prior, Beta(a, b): a rollout leaves (a + b) /
    (a + b + 1) of its variance.
    """
    a, b = k + 0.5, n - k + 0.5
    return np.asarray(a * b / ((a + b) ** 2 * (a + b + 1) ** 2), dtype=np.float64)


def plan_of(manifest: Mapping[str, Any]) -> Plan:
    """The plan of a label run; of merged runs the first one's, with the largest ``n_mc``."""
    parts = [manifest, *manifest.get("merged", [])]
    first = next((part for part in parts if part.get("strategy")), manifest)
    return Plan(
        tuple(manifest["rollout_policies"]),
        max(part.get("n_mc", 0) for part in parts),
        first.get("strategy") or "all_prefixes",
        next((m for part in parts if (m := part.get("max_labelled_prefixes"))), None),
        max(part.get("branches") or 0 for part in parts),
    )
