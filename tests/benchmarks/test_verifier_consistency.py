"""The consistency term: Q of a prefix against the mean of Q over its sampled children."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.verifier.consistency import Steps, consistency, sampled_steps
from benchmarks.verifier.fitting import values_of
from benchmarks.verifier.pool import Part, subset
from benchmarks.verifier.rows import DEFAULT
from benchmarks.verifier.setting import HEADS, Study
from pav.labels.tables import prefix_key, read_labels
from pav.policy.policy import PolicyConfig, load_policy, model_path
from tests.pav.label_runs import TASK, write_labels


def _tree(rng: np.random.Generator, prefixes: int) -> Steps:
    """A random tree: every prefix but the first leaves an earlier one, some of them twice."""
    edges = [(int(rng.integers(child)), child) for child in range(1, prefixes)]
    edges += [edges[i] for i in rng.integers(len(edges), size=3)]
    parents = sorted({p for p, _ in edges})
    return Steps(
        torch.tensor(parents),
        torch.tensor(rng.integers(2, size=len(parents))),
        torch.tensor([parents.index(p) for p, _ in edges]),
        torch.tensor([c for _, c in edges]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_consistency_is_zero_exactly_where_q_is_the_mean_of_the_children(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = _tree(rng, 12)
    q_NH = torch.tensor(rng.uniform(0.02, 0.98, size=(12, 2)))
    assert consistency(q_NH.logit(), steps) > 0
    # From the leaves up; a child always lies behind its parent.
    for g in reversed(range(len(steps.parent_G))):
        children = steps.child_E[steps.group_E == g]
        head = steps.head_G[g]
        q_NH[steps.parent_G[g], head] = q_NH[children, head].mean()
    assert consistency(q_NH.logit(), steps) == pytest.approx(0, abs=1e-12)
    for g in range(len(steps.parent_G)):
        moved = q_NH.clone()
        moved[steps.parent_G[g], steps.head_G[g]] += 0.01
        assert consistency(moved.logit(), steps) > 0


def test_the_gradient_of_consistency_is_that_of_a_rollout_per_child_and_moves_parents_only() -> (
    None
):
    steps = Steps(*map(torch.tensor, ([0, 0], [0, 1], [0, 0, 0, 1], [1, 2, 2, 1])))
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    consistency(logits, steps).backward()
    q = logits.detach().sigmoid()
    expected = torch.zeros(3, 3)
    expected[0, 0] = (3 * q[0, 0] - q[1, 0] - 2 * q[2, 0]) / 4
    expected[0, 1] = (q[0, 1] - q[1, 1]) / 4
    torch.testing.assert_close(logits.grad, expected)


def test_steps_belong_to_the_policy_that_sampled_them_and_a_row_learns_from_them(
    tmp_path: Path,
) -> None:
    labels = read_labels([write_labels(tmp_path / "labels", Path(model_path("pav:base")))])
    policy = load_policy(PolicyConfig(), TASK.step_rule)
    study = Study(labels, {"validation": labels}, policy, TASK, tmp_path)
    row = replace(DEFAULT, trunk="pav:base", part=Part(4, 4, n_mc=2))
    used, _ = subset(labels, row.part)
    examples = study.training(row)
    steps = sampled_steps(used, examples, HEADS)

    keys = [
        prefix_key(e.problem_id, e.ids[e.prompt_length :][:end])
        for e in examples
        for end in (0, *e.ends)
    ]
    found = Counter(
        (HEADS[steps.head_G[g]], keys[steps.parent_G[g]], keys[c])
        for g, c in zip(steps.group_E.tolist(), steps.child_E.tolist(), strict=True)
    )
    expected: Counter[tuple[str, str, str]] = Counter()
    for t in used.traces:
        ends = (0, *t.step_ends)
        for a, b in pairwise(ends):
            pair = (prefix_key(t.problem_id, t.ids[:end]) for end in (a, b))
            expected[f"q/{t.policy}", *pair] += 1
    assert found == expected
    pairs = list(zip(steps.parent_G.tolist(), steps.head_G.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert HEADS.index("orm") not in steps.head_G

    plain = values_of(study, row, [0])["validation"]
    told = values_of(study, replace(row, consistency=1.0), [0])["validation"]
    assert told.shape == plain.shape and np.abs(told - plain).max() > 1e-4
