"""What a verifier trained on labels is worth: its Brier score on prefixes with 64 rollouts each.

The parts are the product's own: examples (:mod:`pav.train.data`), heads
(:func:`pav.train.fit.fit`), calibrators (:func:`pav.verifier.calibrate.fit_calibrator`). The trunk
is frozen, so it reads every solution once (:class:`Remembered`), however many verifiers are
trained on it.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from pav.core.heads import ORM, q_head
from pav.evaluate.scored_labels import MODES
from pav.labels.examples import Example, pav_examples
from pav.labels.tables import LabelSet
from pav.policy.policy import Policy, PolicyConfig, load_policy, model_path
from pav.tasks.base import Task
from pav.train.config import TrainConfig
from pav.train.fit import fit, label_data
from pav.verifier.calibrate import fit_calibrator
from pav.verifier.forward import score
from pav.verifier.trunk import HeadedTrunk, load_trunk

# Schedule in optimiser steps: a few solutions make a batch an epoch, many make eight. pav.train's
# own limits of 40 epochs and 3 without improvement would train the former less.
STEPS, PATIENCE = 150, 15


class Remembered(nn.Module):
    """A frozen causal LM that reads every sequence once; in the place of a HeadedTrunk's trunk."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.config = trunk.config
        self.known: dict[tuple[int, ...], Tensor] = {}

    def get_decoder(self) -> Remembered:
        return self

    def get_output_embeddings(self) -> nn.Module:
        found: nn.Module = self.trunk.get_output_embeddings()
        return found

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        # No sequence ends in the padding token (0).
        rows = [tuple(np.trim_zeros(row, "b")) for row in input_ids.tolist()]
        new = [i for i, row in enumerate(rows) if row not in self.known]
        if new:
            output = self.trunk.get_decoder()(input_ids=input_ids[new], use_cache=False)
            for i, state in zip(new, output.last_hidden_state, strict=True):
                self.known[rows[i]] = state[: len(rows[i])].clone()
        states = nn.utils.rnn.pad_sequence([self.known[row] for row in rows], batch_first=True)
        missing = input_ids.shape[1] - states.shape[1]
        return SimpleNamespace(last_hidden_state=nn.functional.pad(states, (0, 0, 0, missing)))


@dataclass(frozen=True)
class Judge:
    """What all verifiers of a study share.

    Attributes:
        name: the trunk's.
        trunk: under all heads.
        policy: the trunk as a policy: prompt, tokenizer and step rule.
        rollout_policy: whose Q is predicted.
        held_out: on which Q is judged.
        n: rollouts of a held-out prefix; others are no such prefixes.
    """

    name: str
    trunk: Remembered
    policy: Policy
    rollout_policy: str
    held_out: LabelSet
    n: int

    def examples(self, labels: LabelSet, split: str) -> list[Example]:
        """Solutions with the labels of a verifier's heads, that of the rollout policy first."""
        cap = labels.manifest["sampler"]["max_length"]
        return pav_examples(labels, split, [q_head(self.rollout_policy), ORM], self.policy, cap)


@dataclass(frozen=True)
class Quality:
    """How good a verifier's Q is on held-out prefixes, N of them.

    Attributes:
        problem_N: number of the problem.
        brier_N: by calibrator (``plain``, ``surprise``): mean of (q - y)^2 over the rollouts y.
        prefixes: labelled prefixes of its solutions.
    """

    problem_N: NDArray[np.intp]
    brier_N: dict[str, NDArray[np.float64]]
    prefixes: int


def load_judge(trunk: str, rollout_policy: str, task: Task, held_out: LabelSet, n: int) -> Judge:
    """Load a trunk (``pav:strong``, ...) for verifiers of ``rollout_policy``."""
    policy = load_policy(PolicyConfig(trunk), task.step_rule)
    remembered = Remembered(load_trunk(model_path(trunk)))
    return Judge(trunk, remembered, policy, rollout_policy, held_out, n)


def quality(judge: Judge, labels: LabelSet, seed: int) -> Quality:
    """Train heads and fit calibrators on ``labels``, judge their Q on held-out prefixes."""
    train_set, watched = (judge.examples(labels, split) for split in ("train", "validation"))
    config = TrainConfig(
        labels=[],
        trunk=judge.name,
        max_epochs=STEPS,
        max_steps=STEPS,
        patience=PATIENCE,
        seed=seed,
    )
    L.seed_everything(seed, verbose=False)
    model = HeadedTrunk(judge.trunk, 2)
    with TemporaryDirectory() as working, redirect_stdout(StringIO()):
        data = label_data(config, model, train_set, watched, judge.policy)
        state = fit(config, model, data, Path(working))
        assert state is not None  # no dry run, one process
        model.load_state_dict(state, strict=False)
        fitted, held = (
            score(model, part, judge.policy, "scoring", labelled_only=True)
            for part in (watched, judge.examples(judge.held_out, "validation"))
        )
    k, n = fitted.k_NH[:, 0], fitted.n_NH[:, 0]
    judged = held.n_NH[:, 0] == judge.n
    share_N = held.k_NH[judged, 0] / judge.n
    brier_N = {}
    for mode in MODES:
        surprised = mode == "surprise"
        calibrator = fit_calibrator(
            fitted.logits_NH[n > 0, 0],
            fitted.surprise_NF[n > 0] if surprised else None,
            k[n > 0],
            n[n > 0],
        )
        q_N = calibrator(held.logits_NH[judged, 0], held.surprise_NF[judged] if surprised else None)
        brier_N[mode] = share_N * (q_N - 1) ** 2 + (1 - share_N) * q_N**2
    labelled = sum(int((e.n_PH[:, 0] > 0).sum()) for e in [*train_set, *watched])
    return Quality(held.example_N[judged], brier_N, labelled)
