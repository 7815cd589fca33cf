"""What all rows of the study share: labels, cached states, and the solutions it is judged on.

Axes: N scored positions, D hidden size, F surprise features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.verifier.pool import Encoded, Part, encode, subset
from benchmarks.verifier.rows import DEPTH, STRONG, Row
from pav.evaluate.report import first_half
from pav.evaluate.scored_labels import ScoredLabels, score_labels, slips_of
from pav.labels.examples import Example, hardened, pav_examples
from pav.labels.tables import LabelSet
from pav.policy.policy import Policy
from pav.tasks.base import Task
from pav.verifier.forward import Scored

HEADS = ["q/base", "q/prover", "orm"]


@dataclass
class Study:
    """Everything that rows share.

    Attributes:
        pool: labels of training problems.
        judged_on: name -> labels of validation problems.
        policy: tokenizer, prompt and step rule.
        task: the tape.
        directory: of checkpoints.
        encoded: what trunks said, by (trunk, layers, offset).
        judged: name -> examples and truth.
    """

    pool: LabelSet
    judged_on: dict[str, LabelSet]
    policy: Policy
    task: Task
    directory: Path
    encoded: dict[tuple[str, int | None, int], Encoded] = field(default_factory=dict)
    judged: dict[str, ScoredLabels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, labels in self.judged_on.items():
            self.judged[name] = self._judged(labels)

    @property
    def cap(self) -> int:
        """Length cap of labels."""
        return int(self.pool.manifest["sampler"]["max_length"])

    def examples(self, labels: LabelSet, split: str) -> list[Example]:
        """Solutions with their labels."""
        return pav_examples(labels, split, HEADS, self.policy, self.cap)

    def _judged(self, labels: LabelSet) -> ScoredLabels:
        examples = self.examples(labels, "validation")
        flat = [np.concatenate([getattr(e, name) for e in examples]) for name in ("k_PH", "n_PH")]
        owner = np.concatenate([np.full(len(e.positions_P), i) for i, e in enumerate(examples)])
        step = np.concatenate([np.arange(len(e.positions_P)) for e in examples])
        nothing = np.zeros(flat[0].shape, np.float32)
        scored = Scored(torch.zeros(0), nothing, nothing, flat[0], flat[1], owner, step)
        return score_labels(HEADS, examples, scored, labels, self.policy, self.task)

    def states(self, row: Row, examples: Sequence[Example]) -> Tensor:
        """(N, D) hidden states that the heads of ``row`` read."""
        parts = []
        for layer in row.layers or (DEPTH[row.trunk],):
            depth = None if layer == DEPTH[row.trunk] else layer
            for offset in row.offsets:
                found = self._encoded(row.trunk, depth, offset)
                parts.append(found.hidden_ND[torch.as_tensor(found.rows(examples))])
        return torch.cat(parts, dim=1)

    def surprise(self, row: Row, examples: Sequence[Example]) -> np.ndarray:
        """(N, F) surprise of the trunk of ``row``."""
        found = self._encoded(row.trunk, None, 0)
        return found.surprise_NF[found.rows(examples)]

    def _encoded(self, trunk: str, layers: int | None, offset: int) -> Encoded:
        key = trunk, layers, offset
        if key not in self.encoded:
            # The default's labels for all; the whole pool where it is read.
            whole = layers is None and offset == 0 and trunk == STRONG
            part = Part(16, 16, 16, 4) if whole else Part(4, 4)
            train = self.examples(subset(self.pool, part)[0], "train")
            judged = [e for j in self.judged.values() for e in j.examples]
            self.encoded[key] = encode(trunk, layers, offset, [*train, *judged], self.policy)
        return self.encoded[key]

    def training(self, row: Row) -> list[Example]:
        """Training solutions of a row."""
        labels, _ = subset(self.pool, row.part)
        examples = self.examples(labels, "train")
        if row.truth:
            examples = self.told(examples, labels)
        return hardened(examples) if row.loss == "hard" else examples

    def told(self, examples: list[Example], labels: LabelSet) -> list[Example]:
        """The same solutions labelled with the truth: 1 while there is no slip."""
        out = []
        for e, kinds in zip(examples, _kinds(self, examples, labels), strict=True):
            right = np.array([kind is None for kind in kinds], np.float32)[:, None]
            out.append(
                replace(e, k_PH=right * e.share_P1 + 0 * e.k_PH, n_PH=e.share_P1 + 0 * e.n_PH)
            )
        return out

    def early(self, row: Row) -> list[Example]:
        """Solutions that stop the training: of the half that calibrators are fitted on."""
        judged = self.judged["validation"]
        examples = [e for e in judged.examples if first_half(e.problem_id)]
        if row.truth:
            examples = self.told(examples, judged.labels)
        return hardened(examples) if row.loss == "hard" else examples


def _kinds(study: Study, examples: list[Example], labels: LabelSet) -> list[list[str | None]]:
    nothing = np.zeros((0, 0), np.float32)
    empty = np.zeros(0, dtype=np.intp)
    scored = Scored(torch.zeros(0), nothing, nothing, nothing, nothing, empty, empty)
    judged = ScoredLabels(
        HEADS, examples, scored, labels, study.policy, study.task, empty, {}, empty
    )
    found = slips_of(judged)
    if found is None:
        raise TypeError("the task does not know the truth of steps")
    return found
