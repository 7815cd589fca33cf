"""Progress of a training loop."""

from __future__ import annotations

from typing import Any

import lightning as L

from pav.core.progress import Reporter


class LightningProgress(L.Callback):
    """Feeds a :class:`Reporter` from a training loop; ``total`` counts batches."""

    def __init__(self, total: int) -> None:
        self.total = total

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.reporter = Reporter("training", self.total, "steps").__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        optimizers = max(1, len(trainer.optimizers))
        loss = trainer.callback_metrics.get("loss")
        note = "" if loss is None else f"loss {float(loss):.4f}"
        self.reporter.update(trainer.global_step // optimizers, note)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.reporter.__exit__()
