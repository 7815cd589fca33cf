"""What the processes that train together tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor


def gathered(fabric: Fabric, rows: Sequence[NDArray[Any]]) -> list[NDArray[np.float64]]:
    """Rows of all processes, those of the first one first; rows may differ in length.

    Every process has as many rows.
    """
    mine = [np.asarray(row, dtype=np.float64) for row in rows]
    if fabric.world_size == 1 or not mine:
        return mine
    width = largest(fabric, max(len(row) for row in mine))
    table = np.full((len(mine), 1 + width), 0.0)
    for line, row in zip(table, mine, strict=True):
        line[0], line[1 : 1 + len(row)] = len(row), row
    everyone = fabric.all_gather(torch.as_tensor(table, device=fabric.device))
    flat = np.asarray(everyone.reshape(-1, 1 + width).cpu())  # type: ignore[union-attr]
    return [line[1 : 1 + int(line[0])] for line in flat]


def largest(fabric: Fabric, number: int) -> int:
    """The largest of the numbers of all processes."""
    if fabric.world_size == 1:
        return number
    given = torch.tensor(number, device=fabric.device)
    return int(fabric.all_reduce(given, reduce_op="max"))  # type: ignore[arg-type]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that this process may hold a share of; all ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
