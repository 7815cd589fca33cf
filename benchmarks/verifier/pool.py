"""Subsets of one pool of labels, and hidden states that are computed once for all of them.

Rollouts are keyed by their index, so one rollout a prefix is a subset of four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.verifier.heads import HeadKind, MlpTrunk
from pav.labels.examples import Example
from pav.labels.tables import LabelSet, prefix_key
from pav.policy.policy import Policy, model_path
from pav.verifier.forward import score
from pav.verifier.trunk import HeadedTrunk, load_trunk


@dataclass(frozen=True)
class Part:
    """A subset of the pool: seeds a problem by writer, and rollouts a prefix and policy."""

    base: int = 4
    prover: int = 4
    searched: int = 0
    n_mc: int = 1


def subset(pool: LabelSet, part: Part) -> tuple[LabelSet, int]:
    """The labels of ``part``, and the tokens that they cost (solutions and rollouts)."""
    most = {"base": part.base, "prover": part.prover}
    train = [t for t in pool.traces if t.split == "train"]
    traces = [t for t in train if t.seed_index < most.get(t.policy, part.searched)]
    keys = {prefix_key(t.problem_id, t.ids[:end]) for t in traces for end in (0, *t.step_ends)}
    rollouts = [c for c in pool.completions if c.index < part.n_mc and c.prefix_key in keys]
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for c in rollouts:
        k, n = counts.get((c.prefix_key, c.policy), (0, 0))
        counts[c.prefix_key, c.policy] = (k + c.correct, n + 1)
    tokens = sum(len(t.ids) for t in traces) + sum(len(c.ids) for c in rollouts)
    return LabelSet(pool.manifest, traces, counts, rollouts), tokens


def shifted(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The same labels so many tokens later; 1 is the token that ends the step (step 0 stays)."""
    return [
        replace(e, positions_P=e.positions_P + tokens * (np.arange(len(e.positions_P)) > 0))
        for e in examples
    ]


def truncated(trunk: str, layers: int | None, heads: int, kind: HeadKind = "linear") -> HeadedTrunk:
    """A trunk that ends after its first ``layers`` layers (its last norm stays), with new heads."""
    make = MlpTrunk if kind == "mlp" else HeadedTrunk
    model = make(load_trunk(model_path(trunk)), heads)
    decoder = model.trunk.get_decoder()
    if layers is not None:
        decoder.layers = decoder.layers[:layers]
    return model


@dataclass(frozen=True)
class Encoded:
    """What a trunk says of solutions. Axes: N scored positions of all of them, D, F.

    Attributes:
        first: solution -> its first row; its positions follow each other.
        hidden_ND: hidden states.
        surprise_NF: surprise features.
    """

    first: dict[tuple[str, tuple[int, ...]], int]
    hidden_ND: Tensor
    surprise_NF: np.ndarray

    def rows(self, examples: Sequence[Example]) -> np.ndarray:
        """Rows of all positions of ``examples``, in their order."""
        starts = [self.first[e.problem_id, tuple(e.ids)] for e in examples]
        return np.concatenate(
            [s + np.arange(len(e.positions_P)) for s, e in zip(starts, examples, strict=True)]
        )


def encode(
    trunk: str, layers: int | None, offset: int, examples: list[Example], policy: Policy
) -> Encoded:
    """Hidden states ``offset`` tokens after all scored positions (see :func:`truncated`).

    Surprise is there for whole trunks at offset 0.
    """
    examples = list({(e.problem_id, tuple(e.ids)): e for e in examples}.values())
    whole = layers is None and offset == 0
    model = truncated(trunk, layers, 1)
    scored = score(model, shifted(examples, offset), policy, "encoding", with_surprise=whole)
    order = np.lexsort((scored.step_N, scored.example_N))
    first, row = {}, 0
    for e in examples:
        first[e.problem_id, tuple(e.ids)] = row
        row += len(e.positions_P)
    hidden = scored.hidden_ND[torch.as_tensor(order)].clone()
    return Encoded(first, hidden, scored.surprise_NF[order])
