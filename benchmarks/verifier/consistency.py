"""Consistency: Q of a prefix is the mean of Q over the steps that its policy goes on with.

Axes: N scored positions, H heads, D hidden size, G prefixes with their head, E sampled steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pav.labels.examples import Example
from pav.labels.tables import LabelSet, prefix_key
from pav.train.batches import PositionRows, Traces
from pav.train.fit import VerifierModule


@dataclass(frozen=True)
class Steps:
    """Steps of solutions, each under the head of the policy that sampled it.

    Attributes:
        parent_G: row of the prefix that steps leave.
        head_G: the head.
        group_E: of every step, which prefix and head.
        child_E: row of the prefix with that step.
    """

    parent_G: Tensor
    head_G: Tensor
    group_E: Tensor
    child_E: Tensor


def sampled_steps(labels: LabelSet, examples: Sequence[Example], heads: Sequence[str]) -> Steps:
    """Steps of all solutions of ``labels`` between rows of ``examples``.

    A solution that was sampled twice counts twice, or the mean of children were not the policy's.
    """
    row_of: dict[str, int] = {}
    row = 0
    for e in examples:
        solution = e.ids[e.prompt_length :]
        for end in (0, *e.ends):
            row_of.setdefault(prefix_key(e.problem_id, solution[:end]), row)
            row += 1
    steps: Counter[tuple[int, int, int]] = Counter()
    for trace in labels.traces:
        head = f"q/{trace.policy}"
        if head not in heads:
            continue
        keys = [prefix_key(trace.problem_id, trace.ids[:end]) for end in (0, *trace.step_ends)]
        for before, after in pairwise(keys):
            if before in row_of and after in row_of:
                steps[row_of[before], heads.index(head), row_of[after]] += 1
    groups = {group: g for g, group in enumerate(dict.fromkeys((p, h) for p, h, _ in steps))}
    return Steps(
        torch.tensor([p for p, _ in groups], dtype=torch.long),
        torch.tensor([h for _, h in groups], dtype=torch.long),
        torch.tensor([groups[p, h] for p, h, _ in steps.elements()], dtype=torch.long),
        torch.tensor([c for _, _, c in steps.elements()], dtype=torch.long),
    )


def consistency(logits_NH: Tensor, steps: Steps) -> Tensor:
    """Mean divergence (a scalar) of a prefix's Q from the mean Q of its sampled children.

    That mean is a fixed target: it is of one child mostly, and a gradient through it would also
    pull children towards each other, which is no consistency (the mean of squares holds their
    variance). Through the parent alone the gradient is right in expectation, and has the form of
    BCE's on a soft label: every sampled step counts as a rollout does.
    """
    count_G = torch.bincount(steps.group_E, minlength=len(steps.parent_G))
    q_E = logits_NH[steps.child_E, steps.head_G[steps.group_E]].detach().sigmoid()
    mean_G = q_E.new_zeros(len(count_G)).index_add(0, steps.group_E, q_E) / count_G
    logit_G = logits_NH[steps.parent_G, steps.head_G]
    cross_G = binary_cross_entropy_with_logits(logit_G, mean_G, reduction="none")
    entropy_G = torch.special.entr(mean_G) + torch.special.entr(1 - mean_G)
    return (count_G * (cross_G - entropy_G)).sum() / max(1, len(steps.group_E))


class ConsistentModule(VerifierModule):
    """Heads that are also told to be consistent over all ``steps``, with ``weight``."""

    def __init__(
        self, *args: Any, hidden_ND: Tensor, steps: Steps, weight: float, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.hidden_ND, self.sampled, self.weight = hidden_ND, steps, weight

    def training_step(self, batch: PositionRows | Traces, index: int) -> Tensor:
        # Weighted classes shift logits by a constant (exactly so with one rollout a prefix), and a
        # mean of shifted values is no shifted mean.
        weight_2H = self.get_buffer("weight_2H")
        shift_H = weight_2H[1].log() - weight_2H[0].log()
        logits_NH = self.model.head_logits(self.hidden_ND) - shift_H
        return super().training_step(batch, index) + self.weight * consistency(
            logits_NH, self.sampled
        )
