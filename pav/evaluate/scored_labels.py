"""Scored solutions with what is known of every prefix: the ground that metrics stand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pav.core.heads import LIK
from pav.evaluate.metrics import Counts
from pav.labels.examples import Example
from pav.labels.tables import LabelSet, prefix_key
from pav.policy.policy import Policy
from pav.tasks.base import Problem, Task
from pav.verifier.forward import Scored

# Calibrator without and with surprise.
MODES = ("plain", "surprise")
Values = Mapping[tuple[str, str], NDArray[np.float64]]
Rows = NDArray[np.bool_]
Held = Mapping[str, Rows]


@dataclass(frozen=True)
class ScoredLabels:
    """Scored validation prefixes with what is known of them. Axes: N rows as in ``scored``.

    Attributes:
        heads: head names.
        examples: the solutions.
        scored: what the trunk said of them.
        labels: where they come from.
        policy: tokenizer and step rule.
        task: knows the truth of every step, or not.
        keys_N: prefix keys.
        counts: head -> counts of every row; n is 0 where there is no label.
        before_N: row of the prefix one step shorter; the row itself for step 0.
    """

    heads: Sequence[str]
    examples: list[Example]
    scored: Scored
    labels: LabelSet
    policy: Policy
    task: Task
    keys_N: NDArray[Any]
    counts: dict[str, Counts]
    before_N: NDArray[np.intp]


def score_labels(
    heads: Sequence[str],
    examples: list[Example],
    scored: Scored,
    labels: LabelSet,
    policy: Policy,
    task: Task,
) -> ScoredLabels:
    """Look up the labels of every scored prefix (see :class:`ScoredLabels`)."""
    keys = []
    last_N = np.zeros(len(scored.step_N), dtype=bool)
    row_of: dict[tuple[int, int], int] = {}
    for row, (e, step) in enumerate(zip(scored.example_N, scored.step_N, strict=True)):
        example = examples[e]
        end = example.ends[step - 1] if step else 0
        solution = example.ids[example.prompt_length : example.prompt_length + end]
        keys.append(prefix_key(example.problem_id, solution))
        last_N[row] = step == len(example.ends)
        row_of[int(e), int(step)] = row
    before_N = np.array(
        [
            row_of[int(e), max(int(step) - 1, 0)]
            for e, step in zip(scored.example_N, scored.step_N, strict=True)
        ],
        dtype=np.intp,
    )
    counts = {}
    for h, head in enumerate(heads):
        name = head.removeprefix("q/")
        found = np.array([labels.counts.get((key, name), (0, 0)) for key in keys], dtype=float)
        k_N, n_N = found.reshape(-1, 2).T
        labelled = scored.n_NH[:, h] > 0
        # The outcome of a complete solution is no estimate, nor is a likelihood.
        exact_N = labelled & ((last_N & (n_N == 0)) | head.startswith(LIK))
        outcome = scored.k_NH[:, h] / np.maximum(scored.n_NH[:, h], 1e-9)
        counts[head] = Counts(
            np.where(exact_N, outcome, k_N * labelled),
            np.where(exact_N, 1.0, n_N * labelled),
            exact_N,
        )
    return ScoredLabels(
        heads, examples, scored, labels, policy, task, np.array(keys), counts, before_N
    )


def slips_of(scores: ScoredLabels) -> list[list[str | None]] | None:
    """Kind of the first slip up to every position of every example, step 0 included."""
    slips = getattr(scores.task, "slips", None)
    if slips is None:
        return None
    problems = {
        t.problem_id: Problem(t.problem_id, t.question, t.gold) for t in scores.labels.traces
    }
    kinds = []
    for example in scores.examples:
        ids, start, texts = example.ids[example.prompt_length :], 0, []
        for end in example.ends:
            texts.append(scores.policy.text(ids[start:end]))
            start = end
        kinds.append([None, *slips(texts, problems[example.problem_id])])
    return kinds
