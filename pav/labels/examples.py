"""From labels to training examples: which positions carry which counts.

Axes: P scored positions of a trace (steps + 1), H heads, D hidden size, F surprise features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pav.core.heads import LIK, ORM
from pav.core.steps import scoring_position
from pav.labels.tables import LabelSet, prefix_key
from pav.policy.encoding import Encoded
from pav.policy.policy import Policy
from pav.tasks.base import Problem


@dataclass(frozen=True)
class Example:
    """A trace with its labels.

    Attributes:
        problem_id: the problem.
        ids: prompt and solution.
        prompt_length: tokens of the prompt.
        ends: step ends in the solution.
        positions_P: token positions that are scored.
        k_PH: right rollouts (fractions where a prefix stands in several traces).
        n_PH: rollouts; 0 where a head has no label.
        share_P1: 1 / traces that hold this prefix; k and n are the prefix's own times this.
    """

    problem_id: str
    ids: list[int]
    prompt_length: int
    ends: list[int]
    positions_P: np.ndarray
    k_PH: np.ndarray
    n_PH: np.ndarray
    share_P1: np.ndarray


def pav_examples(
    labels: LabelSet, split: str, heads: Sequence[str], policy: Policy, max_length: int
) -> list[Example]:
    """One example per distinct trace of ``split``; every labelled prefix counts once.

    The last step of a complete trace has a known outcome, which all heads learn. The label of a
    ``lik/`` head is the probability of the forced answer, as one "rollout" of which that share was
    right: BCE on such a soft target makes its logit one of a probability, as every head's is.
    """
    traces = {(t.problem_id, tuple(t.ids)): t for t in labels.traces if t.split == split}
    graded = labels.graded
    keys_of = {}
    seen: Counter[str] = Counter()
    for where, trace in traces.items():
        keys = [prefix_key(trace.problem_id, trace.ids[:end]) for end in (0, *trace.step_ends)]
        keys_of[where] = keys
        seen.update(keys)
    prompts: dict[str, list[int]] = {}
    examples = []
    for where, trace in traces.items():
        prompt = _prompt(prompts, policy, trace.problem_id, trace.question)
        ends = list(trace.step_ends)
        if not ends or len(prompt) + len(trace.ids) > max_length:
            continue
        k_PH = np.zeros((len(ends) + 1, len(heads)), dtype=np.float32)
        n_PH = np.zeros_like(k_PH)
        for p, key in enumerate(keys_of[where]):
            last = graded and p == len(ends) and not trace.truncated
            for h, head in enumerate(heads):
                k, n = 0.0, 0
                if last:
                    k, n = float(trace.correct), 1
                elif head.startswith(LIK):
                    logprob = labels.likelihoods.get((key, head.removeprefix(LIK)))
                    if logprob is not None:
                        k, n = math.exp(logprob), 1
                elif head != ORM:
                    k, n = labels.counts.get((key, head.removeprefix("q/")), (0, 0))
                k_PH[p, h], n_PH[p, h] = k / seen[key], n / seen[key]
        shares = [1 / seen[key] for key in keys_of[where]]
        examples.append(_example(trace.problem_id, prompt, trace.ids, ends, k_PH, n_PH, shares))
    return examples


def orm_examples(labels: LabelSet, split: str, policy: Policy, max_length: int) -> list[Example]:
    """Every graded completion that the label run paid for, labelled at its last position."""
    splits = {t.problem_id: (t.split, t.question) for t in labels.traces}
    solutions: dict[tuple[str, tuple[int, ...]], bool] = {}
    for t in labels.traces:
        if not t.truncated:
            solutions[t.problem_id, tuple(t.ids)] = t.correct
    for c in labels.completions:
        if c.ids and not c.truncated:  # an imported label has no rollout
            solutions[c.problem_id, (*c.prefix_ids, *c.ids)] = c.correct
    prompts: dict[str, list[int]] = {}
    examples = []
    for (problem_id, ids), correct in solutions.items():
        if splits[problem_id][0] != split:
            continue
        prompt = _prompt(prompts, policy, problem_id, splits[problem_id][1])
        if len(prompt) + len(ids) > max_length:
            continue
        ends = policy.stepper.step_ends(ids)
        if not ends:
            continue
        k_PH = np.zeros((len(ends) + 1, 1), dtype=np.float32)
        n_PH = np.zeros_like(k_PH)
        k_PH[-1, 0], n_PH[-1, 0] = float(correct), 1.0
        shares = [1.0] * len(k_PH)
        examples.append(_example(problem_id, prompt, list(ids), ends, k_PH, n_PH, shares))
    return examples


def given_example(policy: Policy, problem: Problem, encoded: Encoded) -> tuple[Example, list[int]]:
    """A solution that was given as text, without labels.

    Steps end where the step rule says, and where those who gave it say.

    Returns:
        (the example, index among its ends of every given step's end).
    """
    ends = sorted({*policy.stepper.step_ends(encoded.ids), *encoded.ends})
    example = unlabelled(policy, problem, encoded.ids, ends)
    return example, [ends.index(end) for end in encoded.ends]


def unlabelled(
    policy: Policy, problem: Problem, ids: Sequence[int], ends: Sequence[int]
) -> Example:
    """A solution without labels, to be scored at step 0 and after every step.

    Args:
        policy: whose prompt stands before it.
        problem: what it solves.
        ids: its tokens.
        ends: exclusive ends of its steps.
    """
    none_P1 = np.zeros((len(ends) + 1, 1), dtype=np.float32)
    shares = [1.0] * len(none_P1)
    prompt = policy.encode(problem)
    return _example(problem.id, prompt, list(ids), list(ends), none_P1, none_P1, shares)


def _prompt(
    cache: dict[str, list[int]], policy: Policy, problem_id: str, question: str
) -> list[int]:
    if problem_id not in cache:
        cache[problem_id] = policy.encode(Problem(problem_id, question))
    return cache[problem_id]


def _example(
    problem_id: str,
    prompt: list[int],
    ids: Sequence[int],
    ends: list[int],
    k_PH: np.ndarray,
    n_PH: np.ndarray,
    shares: Sequence[float],
) -> Example:
    positions = np.array([scoring_position(len(prompt), end) for end in (0, *ends)])
    share_P1 = np.array(shares, dtype=np.float32)[:, None]
    return Example(problem_id, [*prompt, *ids], len(prompt), ends, positions, k_PH, n_PH, share_P1)


def hardened(examples: Sequence[Example]) -> list[Example]:
    """The examples with hard labels: 1 where any rollout was right, else 0; a prefix counts once.

    Source: Math-Shepherd's hard estimation (arXiv 2312.08935, section 3.3).
    """
    return [
        replace(
            e,
            k_PH=np.where(e.k_PH > 0, e.share_P1, np.float32(0)),
            n_PH=np.where(e.n_PH > 0, e.share_P1, np.float32(0)),
        )
        for e in examples
    ]


def balance(examples: Sequence[Example]) -> np.ndarray:
    """Weights (2, H) of labels with Q < 0.5 and Q >= 0.5 that give both classes the same mass.

    The paper samples the two classes equally often; weighting is the same in expectation.
    """
    k = np.concatenate([e.k_PH for e in examples])
    n = np.concatenate([e.n_PH for e in examples])
    high = (k >= 0.5 * n) & (n > 0)
    mass = np.stack([np.where(high, 0, n).sum(0), np.where(high, n, 0).sum(0)])
    return np.where(mass > 0, mass.sum(0) / (2 * np.maximum(mass, 1e-9)), 1.0).astype(np.float32)
