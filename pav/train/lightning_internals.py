"""What is used of Lightning beyond its documented API, all of it; ``CHECKED`` says of which."""

from __future__ import annotations

import logging

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

CHECKED = ">=2.6,<2.7"


def be_quiet() -> None:
    """Leave the word to our own lines: Lightning turns its logger up where it is imported."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def rank() -> int:
    """Number of this process among those that train together, also before they are connected."""
    # Lightning reads it from the launcher's environment when it is imported.
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def be_first() -> None:
    """Be the first process: a task of a bigger job (SLURM_PROCID) is first among one."""
    setattr(rank_zero_only, "rank", 0)  # noqa: B010


def batches_done(trainer: L.Trainer) -> int:
    """Batches trained on since the run began, those before it was resumed included."""
    return trainer.fit_loop.epoch_loop.total_batch_idx
