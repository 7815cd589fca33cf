"""Runs that can be stopped: checkpoints between steps, and what may go on from them.

A run lives in ``<output>.training/``: ``train.json`` says what is trained, ``last.ckpt`` is where
the same command goes on (``last-1.ckpt``, the one before it, where that is damaged), ``best.ckpt``
holds the weights of the best epoch on validation.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.plugins.io import CheckpointIO

from pav.core.errors import UserError
from pav.core.files import damage, json_text, read_object, replace_file, write_whole
from pav.core.manifest import PROMPTS, refuse_other
from pav.labels.examples import Example
from pav.train.config import TrainConfig
from pav.train.lightning_internals import rank
from pav.verifier.checkpoint import VerifierMeta

# Settings that a resumed run may change: they do not change what is trained.
_FREE = {"checkpoint_minutes", "logger", "memory_gib", "verbose", "dry_run"}
LAST, BEFORE, BEST = "last.ckpt", "last-1.ckpt", "best.ckpt"


class Stopped(Exception):
    """A signal ended the run after a checkpoint."""


class Unwritten(Exception):
    """Another process could not write a checkpoint."""


def save_whole(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint at once (see :func:`pav.core.files.write_whole`).

    Raises:
        UserError: if it cannot be written; what was there before still is.
    """

    def write(stream: IO[bytes]) -> None:
        try:
            torch.save(checkpoint, stream)
        except RuntimeError as error:
            # torch's writer only knows that its stream is not where it should be.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    except OSError as error:
        raise UserError(
            f"checkpoint {str(path)!r} cannot be written ({error.strerror}); earlier ones are "
            "safe: free disk space or raise the quota there, then give the same command again"
        ) from error


class WholeCheckpoints(CheckpointIO):
    """Lightning's way to disk: checkpoints that are whole or not there, the last one kept twice.

    Lightning's own writes to ``TMPDIR`` and moves, which across file systems is a copy over the
    checkpoint before.

    Attributes:
        failure: why a checkpoint could not be written, where other processes wait for this one at
            a barrier and have to be told (:class:`LastCheckpoint`); else it is raised.
    """

    def __init__(self) -> None:
        self.failure: UserError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        try:
            if path.name == LAST and path.exists():
                path.replace(path.with_name(BEFORE))
            save_whole(checkpoint, path)
        except UserError as error:
            if not torch.distributed.is_initialized():
                raise
            self.failure = error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(path, map_location, weights_only=True)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def whole_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint to go on from; a damaged one is said, removed and passed over."""
    for path in (directory / LAST, directory / BEFORE):
        if not path.exists():
            continue
        wrong = damage(path)
        if not wrong:
            return path
        if rank() == 0:
            said = f"WARNING: {str(path)!r} is damaged ({wrong}); it is passed over"
            print(said, file=sys.stderr)
            # The next checkpoint must not keep this one for the one before.
            path.unlink(missing_ok=True)
    return None


class LastCheckpoint(L.Callback):
    """Writes ``last.ckpt`` between two optimiser steps of an epoch: now and then, and on a signal.

    Never after an epoch's last step: validation, early stopping and the best epoch belong to that
    one, and are done again from the checkpoint before.
    """

    def __init__(self, path: Path, minutes: float, io: WholeCheckpoints) -> None:
        self.path, self.seconds, self.io = path, 60 * minutes, io
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
            self._refuse_unwritten(trainer)
            self.saved = time.monotonic()
        if signalled and (between or total <= accumulate):
            raise Stopped

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The best checkpoint is written at the end of an epoch, after all other callbacks.
        self._refuse_unwritten(trainer)

    def _refuse_unwritten(self, trainer: L.Trainer) -> None:
        """End all processes where the first could not write."""
        failed = self.io.failure
        if trainer.strategy.reduce_boolean_decision(failed is not None, all=False):
            raise failed or Unwritten

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore()


def resume_or_refuse(
    config: TrainConfig, card: VerifierMeta, working: Path, examples: Sequence[Example]
) -> Path | None:
    """Write down what is trained; an unfinished run of something else is not resumed.

    Returns:
        The checkpoint to go on from; None where there is none.

    Raises:
        UserError: naming the settings that differ, or what is damaged.
    """
    digest = hashlib.sha256()
    for e in examples:
        for array in (np.asarray(e.ids, "<i4"), e.k_PH, e.n_PH):
            digest.update(array.tobytes())
    plain = asdict(config) | {
        "task": card.task,
        "head": card.head,
        "trunk_digest": card.trunk_digest,
        "label_contents": digest.hexdigest()[:16],
        PROMPTS: {f"trunk {card.trunk!r}": card.trunk_prompt},
    }
    plain = json.loads(json_text({k: v for k, v in plain.items() if k not in _FREE}))
    path = working / "train.json"
    again = f"remove {str(working)!r} to train from the beginning"
    if path.exists() and any((working / name).exists() for name in (LAST, BEFORE)):
        found = read_object(path, f"restore it, or {again}")
        what = f"the unfinished run in {str(working)!r}"
        # Prompts before the contents of the labels, which hold them.
        for keys in ({*plain} - {"label_contents"}, {*plain}):
            there, now = ({k: d[k] for k in keys if k in d} for d in (found, plain))
            refuse_other(what, there, now, ", or remove that directory")
        if point := whole_checkpoint(working):
            best = working / BEST
            if _has_best(point) and (wrong := damage(best)):
                raise UserError(
                    f"the best epoch so far, {str(best)!r}, is damaged ({wrong}); restore it, or "
                    f"{again}"
                )
            print(f"resuming from {point}")
            return point
        print(f"WARNING: {str(working)!r} holds no whole checkpoint: from the beginning, then")
    if rank() == 0:
        working.mkdir(parents=True, exist_ok=True)
        replace_file(path, json_text(plain))
    return None


def _has_best(checkpoint: Path) -> bool:
    """Whether an epoch had ended before ``checkpoint``: its best weights lie beside it alone."""
    plain = torch.load(str(checkpoint), "cpu", weights_only=True, mmap=True)
    states = plain.get("callbacks", {}).values()
    return any(isinstance(s, dict) and s.get("best_model_path") for s in states)
