"""Runs that can be stopped: checkpoints between steps, and what may go on from them.

A run lives in ``<output>.training/``: ``train.json`` says what is trained, ``last.ckpt`` is where
the same command goes on, ``best.ckpt`` holds the weights of the best epoch on validation.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from pav.data import Example
from pav.errors import UserError
from pav.prompts import PROMPTS, check_prompts
from pav.train_config import TrainConfig
from pav.verifier import Card

# Settings that a resumed run may change: they do not change what is trained.
_FREE = {"checkpoint_minutes", "logger", "memory_gib", "verbose", "dry_run"}


class Stopped(Exception):
    """A signal ended the run after a checkpoint."""


class LastCheckpoint(L.Callback):
    """Writes ``last.ckpt`` between two optimiser steps of an epoch: now and then, and on a signal.

    Never after an epoch's last step: validation, early stopping and the best epoch belong to that
    one, and are done again from the checkpoint before.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.seconds = path, 60 * minutes
        self.saved = time.monotonic()
        self.signalled = False
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._signal)

    def _signal(self, number: int, frame: Any) -> None:
        self.signalled = True
        self._restore()  # a second one ends the run at once

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        # Infinite where an epoch has no length.
        total, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
        between = (index + 1) % accumulate == 0 and index + 1 < total
        any_of = trainer.strategy.reduce_boolean_decision
        due = between and time.monotonic() - self.saved >= self.seconds
        signalled = any_of(self.signalled, all=False)
        if between and (signalled or any_of(due, all=False)):
            trainer.save_checkpoint(self.path)
            self.saved = time.monotonic()
        if signalled and (between or total <= accumulate):
            raise Stopped

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore()


def resume_or_refuse(
    config: TrainConfig, card: Card, working: Path, examples: Sequence[Example]
) -> None:
    """Write down what is trained; an unfinished run of something else is not resumed.

    Raises:
        UserError: naming the settings that differ.
    """
    digest = hashlib.sha256()
    for e in examples:
        for array in (np.asarray(e.ids, "<i4"), e.k_PH, e.n_PH):
            digest.update(array.tobytes())
    plain = asdict(config) | {
        "task": card.task,
        "trunk_digest": card.trunk_digest,
        "label_contents": digest.hexdigest()[:16],
        PROMPTS: {f"trunk {card.trunk!r}": card.trunk_prompt},
    }
    plain = json.loads(json.dumps({k: v for k, v in plain.items() if k not in _FREE}))
    path = working / "train.json"
    if not path.exists() or not (working / "last.ckpt").exists():
        if not getattr(rank_zero_only, "rank", 0):
            working.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(plain, indent=1))
        return
    found = json.loads(path.read_text())
    # Before the contents of the labels, which hold the prompts.
    check_prompts(found, plain, f"the unfinished run in {str(working)!r}")
    if changed := sorted(k for k in {*plain} - {PROMPTS} if plain[k] != found.get(k)):
        raise UserError(
            f"{str(working)!r} holds an unfinished run with another {', '.join(changed)} "
            f"({changed[0]}: {found.get(changed[0])!r} there, {plain[changed[0]]!r} now); restore "
            "it, choose another output, or remove that directory"
        )
    print(f"resuming from {working / 'last.ckpt'}")
