"""A forward pass of trunk and heads over whole traces: every prefix is scored at once.

Axes: P scored positions of a trace (steps + 1), H heads, D hidden size, F surprise features.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from pav.core.errors import UserError
from pav.core.progress import Reporter
from pav.labels.examples import Example
from pav.policy.policy import Policy
from pav.verifier.calibrate import SURPRISE, surprises

if TYPE_CHECKING:  # imported where they are used: --help stays fast
    from torch import Tensor

    from pav.verifier.trunk import HeadedTrunk

TOKENS_PER_BATCH = 8192


class HasIds(Protocol):
    """Anything in tokens."""

    @property
    def ids(self) -> list[int]:
        """Prompt and solution."""


Item = TypeVar("Item", bound=HasIds)


def batches(
    examples: Sequence[Item],
    seed: int | None,
    tokens: int = TOKENS_PER_BATCH,
    max_waste: float = 1.0,
) -> Iterator[list[Item]]:
    """Batches of similar length; with a seed, traces of one length are mixed and batches shuffled.

    Args:
        examples: traces.
        seed: of the order; None for batches by length.
        tokens: upper limit of a padded batch (a longer trace is a batch of its own).
        max_waste: upper limit of the share of padding in a batch.
    """
    mixed = list(examples)
    rng = random.Random(seed)
    if seed is not None:
        rng.shuffle(mixed)
    ordered = sorted(mixed, key=lambda e: len(e.ids))
    out: list[list[Item]] = [[]]
    real = 0
    for example in ordered:
        length = len(example.ids)
        padded = (len(out[-1]) + 1) * length
        if out[-1] and (padded > tokens or padded - real - length > max_waste * padded):
            out.append([])
            real = 0
        out[-1].append(example)
        real += length
    if seed is not None:
        rng.shuffle(out)
    return (batch for batch in out if batch)


def padding_waste(parts: Sequence[Sequence[Example]]) -> float:
    """Share of padding among all tokens of ``parts``, from 0 to 1."""
    padded = sum(len(part) * max(len(e.ids) for e in part) for part in parts if part)
    return 1 - sum(len(e.ids) for part in parts for e in part) / max(1, padded)


def pad(batch: Sequence[HasIds]) -> Tensor:
    """Right-padded ids (B, T)."""
    import torch

    ids = torch.zeros(len(batch), max(len(e.ids) for e in batch), dtype=torch.long)
    for row, example in zip(ids, batch, strict=True):
        row[: len(example.ids)] = torch.tensor(example.ids)
    return ids


@dataclass(frozen=True)
class Scored:
    """What a verifier's forward pass says of examples, flattened over positions.

    Attributes:
        hidden_ND: hidden states at the scored positions.
        logits_NH: head logits there.
        surprise_NF: surprise features.
        k_NH, n_NH: counts.
        example_N: which example a row belongs to.
        step_N: which step (0 is the problem).
    """

    hidden_ND: Tensor
    logits_NH: np.ndarray
    surprise_NF: np.ndarray
    k_NH: np.ndarray
    n_NH: np.ndarray
    example_N: np.ndarray
    step_N: np.ndarray


def score(
    model: HeadedTrunk,
    examples: Sequence[Example],
    policy: Policy,
    what: str,
    labelled_only: bool = False,
    with_surprise: bool = True,
    quiet: bool = False,
) -> Scored:
    """One forward pass over each example scores all its prefixes.

    Args:
        model: trunk and heads.
        examples: traces.
        policy: its stepper finds result parts.
        what: named in the progress line.
        labelled_only: keep only positions that carry a label.
        with_surprise: also compute the surprise features (else zeros).
        quiet: show no progress.

    Raises:
        UserError: if a score is not finite.
    """
    import torch

    with torch.inference_mode():
        return _score(model, examples, policy, what, labelled_only, with_surprise, quiet)


def _score(
    model: HeadedTrunk,
    examples: Sequence[Example],
    policy: Policy,
    what: str,
    labelled_only: bool,
    with_surprise: bool,
    quiet: bool,
) -> Scored:
    import torch

    model.eval()
    device = next(model.parameters()).device
    number = {id(e): i for i, e in enumerate(examples)}
    parts: list[tuple[Tensor, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    done = 0
    with Reporter(what, len(examples), "traces", quiet) as reporter:
        for batch in batches(examples, None):
            ids = pad(batch).to(device)
            hidden = model.hidden(ids)
            # A real vocabulary makes the softmax dear: only solutions need it, not prompts.
            skip = min(e.prompt_length for e in batch) - 1
            logprobs = None
            if with_surprise:
                logprobs = model.token_logprobs(hidden[:, skip:], ids[:, skip:]).cpu().numpy()
            rows = np.concatenate([np.full(len(e.positions_P), i) for i, e in enumerate(batch)])
            columns = np.concatenate([e.positions_P for e in batch])
            at = hidden[torch.as_tensor(rows), torch.as_tensor(columns)].float().cpu()
            features = np.zeros((len(rows), len(SURPRISE)), dtype=np.float32)
            if logprobs is not None:
                features = surprises(
                    [
                        lp[e.prompt_length - 1 - skip : len(e.ids) - 1 - skip]
                        for lp, e in zip(logprobs, batch, strict=True)
                    ],
                    [e.ids[e.prompt_length :] for e in batch],
                    [e.ends for e in batch],
                    policy.stepper,
                )
            owner = np.concatenate([np.full(len(e.positions_P), number[id(e)]) for e in batch])
            step = np.concatenate([np.arange(len(e.positions_P)) for e in batch])
            counts = np.concatenate([np.stack([e.k_PH, e.n_PH]) for e in batch], axis=1)
            keep = counts[1].sum(-1) > 0 if labelled_only else np.ones(len(rows), dtype=bool)
            parts.append(
                (
                    at[torch.as_tensor(keep)],
                    features[keep],
                    counts[:, keep],
                    owner[keep],
                    step[keep],
                )
            )
            done += len(batch)
            reporter.update(done)
    hidden_ND = torch.cat([p[0] for p in parts])
    logits = model.head_logits(hidden_ND.to(device)).cpu().numpy()
    if wrong := np.argwhere(~np.isfinite(logits)).tolist():
        raise UserError(
            f"head {wrong[0][1]} gives {logits[tuple(wrong[0])]} ({len(wrong)} of {logits.size} "
            "scores are not finite): the trunk's weights are damaged, training diverged (lower lr) "
            "or the dtype is too narrow"
        )
    counts = np.concatenate([p[2] for p in parts], axis=1)
    return Scored(
        hidden_ND,
        logits,
        np.concatenate([p[1] for p in parts]),
        counts[0],
        counts[1],
        np.concatenate([p[3] for p in parts]),
        np.concatenate([p[4] for p in parts]),
    )
