"""Batches for training: resumable in the middle of an epoch, and split over processes.

Axes: N labelled positions of a batch, H heads, D hidden size, B traces, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pav.labels.examples import Example
from pav.policy.policy import Policy
from pav.verifier.forward import batches, pad, score
from pav.verifier.trunk import HeadedTrunk

ROWS_PER_BATCH = 2048
# Padding above this share of a batch closes it.
MAX_WASTE = 0.1


class PositionRows(NamedTuple):
    """Labelled positions under a frozen trunk."""

    hidden_ND: Tensor
    k_NH: Tensor
    n_NH: Tensor


class Traces(NamedTuple):
    """Whole traces and their labelled positions.

    Attributes:
        ids_BT: right-padded ids.
        row_N, column_N: where the labelled positions lie in ``ids_BT``.
        k_NH, n_NH: labels.
        total: weight of all labels of the optimiser step that this batch is a part of, over all its
            batches and processes; a loss divided by it needs no word between processes.
    """

    ids_BT: Tensor
    row_N: Tensor
    column_N: Tensor
    k_NH: Tensor
    n_NH: Tensor
    total: Tensor


def class_weights(k: Any, n: Any, weight_2H: Any, where: Any) -> Any:
    """Weight of every label: n times that of its class (Q below 0.5, or not); numpy or torch."""
    return n * where(k >= 0.5 * n, weight_2H[1], weight_2H[0])


def collate(batch: Sequence[Example], heads: int = 1, total: float = 1.0) -> Traces:
    """A batch of traces; without any, a padding token without a label of ``heads``."""
    if not batch:
        none = torch.zeros(0, dtype=torch.long)
        labels = torch.zeros(0, heads)
        ids = torch.zeros(1, 1, dtype=torch.long)
        return Traces(ids, none, none, labels, labels, torch.tensor(total))
    rows = np.concatenate([np.full(len(e.positions_P), i) for i, e in enumerate(batch)])
    columns = np.concatenate([e.positions_P for e in batch])
    k = np.concatenate([e.k_PH for e in batch])
    n = np.concatenate([e.n_PH for e in batch])
    keep = n.sum(-1) > 0
    return Traces(
        pad(batch),
        torch.tensor(rows[keep]),
        torch.tensor(columns[keep]),
        torch.tensor(k[keep]),
        torch.tensor(n[keep]),
        torch.tensor(total, dtype=torch.float32),
    )


class TraceLoader:
    """Batches of whole traces, a new order every epoch; a pure function of (seed, epoch, place).

    An optimiser step is ``world * accumulate`` batches that lie side by side in the order of the
    epoch; process ``rank`` gets every ``world``-th. The last ones may be empty, so that all
    processes take as many.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        weight_2H: np.ndarray,
        seed: int | None,
        tokens: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.examples, self.weight_2H, self.seed, self.tokens = examples, weight_2H, seed, tokens
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.epoch = self.done = 0
        # Batches are cut by lengths alone, which no seed changes.
        self.count = sum(1 for _ in batches(examples, None, tokens, MAX_WASTE))

    def __len__(self) -> int:
        return math.ceil(self.count / self.world)

    def __iter__(self) -> Iterator[Traces]:
        if self.done >= len(self):
            self.epoch, self.done = self.epoch + 1, 0
        start = self.done
        for i, (part, total) in enumerate(self._parts()):
            if i >= start:
                self.done = i + 1
                yield collate(part, self.weight_2H.shape[1], total)

    def _parts(self) -> Iterator[tuple[list[Example], float]]:
        seed = None if self.seed is None else self.seed + self.epoch
        order = list(batches(self.examples, seed, self.tokens, MAX_WASTE))
        order += [[] for _ in range(-len(order) % self.world)]
        step = self.world * self.accumulate
        for i in range(0, len(order), step):
            window = order[i : i + step]
            total = sum(self._weight(e) for part in window for e in part)
            for part in window[self.rank :: self.world]:
                yield part, total

    def _weight(self, example: Example) -> float:
        weight = class_weights(example.k_PH, example.n_PH, self.weight_2H, np.where)
        return float(weight.sum(dtype=np.float64))

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches done; Lightning keeps it in a checkpoint."""
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batches that are done."""
        self.epoch, self.done = state["epoch"], state["done"]


class RowLoader:
    """Shuffled rows under a frozen trunk, in the order that torch's own generator gives."""

    def __init__(self, rows: TensorDataset) -> None:
        self.loader = DataLoader(rows, batch_size=ROWS_PER_BATCH, shuffle=True)
        self.done = 0
        self.generator: Tensor | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[PositionRows]:
        start = self.done if self.done < len(self) else 0
        if start and self.generator is not None:
            torch.set_rng_state(self.generator)
        self.generator = torch.get_rng_state()
        for i, batch in enumerate(self.loader):
            if i >= start:
                self.done = i + 1
                yield PositionRows(*batch)

    def state_dict(self) -> dict[str, Any]:
        """Batches done and the generator at the start of the epoch."""
        return {"done": self.done, "generator": self.generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batches that are done, in the same order."""
        self.done, self.generator = state["done"], state["generator"]


class LabelData(L.LightningDataModule):
    """Training and validation batches.

    With a frozen trunk the hidden states at labelled positions are computed once and the epochs run
    over them; otherwise batches are whole traces. Every process validates on everything: a few
    traces more are cheaper than metrics that have to agree.
    """

    def __init__(
        self,
        model: HeadedTrunk,
        train: list[Example],
        validation: list[Example],
        policy: Policy,
        frozen: bool,
        seed: int,
        weight_2H: np.ndarray,
        tokens: int,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.model, self.policy, self.frozen, self.seed = model, policy, frozen, seed
        self.weight_2H, self.tokens, self.accumulate = weight_2H, tokens, accumulate
        self.examples = {"train": train, "validation": validation}
        self.cached: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        """Encode once where the trunk does not change."""
        if not self.frozen or self.cached:
            return
        for split, examples in self.examples.items():
            scored = score(
                self.model,
                examples,
                self.policy,
                f"encoding {split}",
                labelled_only=True,
                with_surprise=False,
            )
            self.cached[split] = TensorDataset(
                scored.hidden_ND.clone(),
                torch.tensor(scored.k_NH),
                torch.tensor(scored.n_NH),
            )

    def train_dataloader(self) -> RowLoader | TraceLoader:
        """Training batches of this process, in a new order every epoch."""
        if self.frozen:
            return RowLoader(self.cached["train"])
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        return TraceLoader(
            self.examples["train"], self.weight_2H, self.seed, self.tokens, self.accumulate, rank,
            world,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader | TraceLoader:
        """Validation batches."""
        if self.frozen:
            return DataLoader(
                self.cached["validation"], batch_size=ROWS_PER_BATCH, collate_fn=_as_rows
            )
        return TraceLoader(self.examples["validation"], self.weight_2H, None, self.tokens)


def _as_rows(items: list[tuple[Tensor, ...]]) -> PositionRows:
    return PositionRows(*(torch.stack(parts) for parts in zip(*items, strict=True)))
