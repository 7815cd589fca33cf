"""The training loop: losses, optimiser, devices.

All processes run the same code; only the first writes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torchmetrics.classification import BinaryAUROC

from pav.core.errors import UserError
from pav.core.seeds import seed_of
from pav.labels.examples import Example, balance
from pav.policy.policy import Policy
from pav.train.batches import LabelData, PositionRows, Traces, class_weights
from pav.train.checkpoints import BEST, LAST, LastCheckpoint, Stopped, Unwritten, WholeCheckpoints
from pav.train.config import HEAD_RATE, TrainConfig
from pav.train.lightning_internals import batches_done, be_quiet
from pav.train.loggers import logger_of
from pav.train.losses import summed_loss
from pav.train.progress import LightningProgress
from pav.verifier.lora import add_adapters
from pav.verifier.trunk import HeadedTrunk

MAX_NORM = 1.0


class VerifierModule(L.LightningModule):
    """Heads (H) on a trunk, and what they are fitted with (``config.loss``).

    ``steps`` is the number of optimiser steps at which the learning rate reaches zero. (Lightning's
    own estimate starts the loader before a checkpoint's state of it is there.)
    """

    def __init__(
        self, model: HeadedTrunk, weight_2H: np.ndarray, config: TrainConfig, steps: int = 1
    ) -> None:
        super().__init__()
        self.model, self.config, self.steps = model, config, steps
        self.register_buffer("weight_2H", torch.tensor(weight_2H), persistent=False)
        # Every process validates on everything: nothing to synchronise.
        self.aucs = torch.nn.ModuleList(
            BinaryAUROC(sync_on_compute=False) for _ in range(model.heads)
        )
        # A checkpoint without the untouched trunk is whole.
        self.strict_loading = config.trunk_mode == "full"
        self.sharded = False

    def configure_model(self) -> None:
        if self.device_mesh is None or self.sharded:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.trunk.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.sharded = True

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        heads = list(self.model.head.parameters())
        groups: list[dict[str, Any]] = [{"params": heads, "lr": self.config.rate}]
        if not self.config.frozen:
            trunk = [p for p in self.model.trunk.parameters() if p.requires_grad]
            groups[0]["lr"] = self.config.head_lr or HEAD_RATE
            groups.append({"params": trunk, "lr": self.config.rate})
        # Unfused, AdamW keeps temporaries as large as the weights; scaled gradients need it so.
        scaled = self.config.precision.startswith("16")
        fused = True if self.device.type == "cuda" and not scaled else None
        optimizer = torch.optim.AdamW(groups, lr=self.config.rate, weight_decay=0.0, fused=fused)
        warmup = min(self.config.warmup, self.steps - 1)
        schedule: LRScheduler = CosineAnnealingLR(optimizer, self.steps - warmup)
        if warmup:
            start = LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup)
            schedule = SequentialLR(optimizer, [start, schedule], [warmup])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        # Lightning's own refuses every fused optimiser, for the sake of scaled gradients.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)

    def logits(self, batch: PositionRows | Traces) -> Tensor:
        """Head logits (N, H) at the labelled positions of a batch."""
        if isinstance(batch, PositionRows):
            return self.model.head_logits(batch.hidden_ND)
        return self.model(batch.ids_BT, batch.row_N, batch.column_N)

    def summed(self, logits_NH: Tensor, batch: PositionRows | Traces, weight_NH: Tensor) -> Tensor:
        """The loss summed over the labels of a batch."""
        return summed_loss(self.config.loss, logits_NH, batch.k_NH, batch.n_NH, weight_NH)

    def on_train_batch_start(self, batch: PositionRows | Traces, index: int) -> None:
        # Dropout must not depend on where a run was resumed. (Heads alone draw nothing.)
        if isinstance(batch, Traces):
            done = batches_done(self.trainer)
            torch.manual_seed(seed_of(self.config.seed, done, self.global_rank))

    def training_step(self, batch: PositionRows | Traces, index: int) -> Tensor:
        weight_NH = class_weights(batch.k_NH, batch.n_NH, self.weight_2H, torch.where)
        summed = self.summed(self.logits(batch), batch, weight_NH)
        if isinstance(batch, PositionRows):
            loss = summed / weight_NH.sum().clamp_min(1e-9)
        else:
            # Lightning divides by accumulate, and the strategy averages over processes.
            parts = self.config.accumulate * self.trainer.world_size
            loss = summed * parts / batch.total.clamp_min(1e-9)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, batch: PositionRows | Traces, index: int) -> None:
        logits, k, n = self.logits(batch), batch.k_NH, batch.n_NH
        loss = self.summed(logits, batch, n) / n.sum().clamp_min(1e-9)
        self.log("val_loss", loss, batch_size=int(n.count_nonzero()))
        for h, auc in enumerate(self._aucs()):
            there = n[:, h] > 0
            # A head may have no label at all: no outcome where the length cap cut every trace.
            if there.any():
                auc.update(logits[there, h], (k[there, h] >= 0.5 * n[there, h]).int())

    def on_validation_epoch_end(self) -> None:
        values = [auc.compute() for auc in self._aucs() if auc.update_called]
        for auc in self._aucs():
            auc.reset()
        self.log("val_auc", torch.stack(values).mean())

    def _aucs(self) -> list[BinaryAUROC]:
        return [auc for auc in self.aucs if isinstance(auc, BinaryAUROC)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # What is not trained is found again by name and digest.
        if self.config.trunk_mode != "full":
            state = checkpoint["state_dict"]
            for key in [k for k in state if k.startswith("model.trunk.") and ".lora_" not in k]:
                del state[key]


def fit(
    config: TrainConfig,
    model: HeadedTrunk,
    data: LabelData,
    working: Path,
    module: Callable[..., VerifierModule] = VerifierModule,
    resume: Path | None = None,
) -> dict[str, Tensor] | None:
    """Train heads (and trunk); the trained tensors of the best epoch on validation.

    Args:
        config: settings.
        model: trunk and heads.
        data: labels (:func:`label_data`).
        working: directory of checkpoints.
        module: the losses.
        resume: the checkpoint to go on from.

    Returns:
        The state of ``model`` without what was not trained (keys of :class:`HeadedTrunk`), on the
        first process; None on the others and in a dry run.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM; the same command resumes.
        UserError: if Lightning knows no such device or precision, or a checkpoint cannot be
            written.
    """
    logger = logger_of(config)  # what is missing is better missed now
    prepare(config, model)
    if config.frozen and config.accelerator != "cpu" and torch.cuda.is_available():
        model.cuda()
        data.setup("fit")
        model.cpu()
    # Heads that search by Q are wanted calibrated, an ORM has to rank.
    monitor, mode = ("val_auc", "max") if config.recipe == "orm" else ("val_loss", "min")
    best = ModelCheckpoint(
        working,
        filename=BEST.removesuffix(".ckpt"),
        monitor=monitor,
        mode=mode,
        save_top_k=1,
        save_weights_only=True,
        enable_version_counter=False,
    )
    checkpoints = WholeCheckpoints()
    steps = _steps(config, data)
    trainer = trainer_of(
        config,
        [
            best,
            EarlyStopping(monitor, mode=mode, patience=config.patience),
            LastCheckpoint(working / LAST, config.checkpoint_minutes, checkpoints),
            LightningProgress(steps),
        ],
        checkpoints,
        logger,
    )
    try:
        trainer.fit(
            module(model, data.weight_2H, config, steps),
            datamodule=data,
            ckpt_path=None if resume is None else str(resume),
            weights_only=True,
        )
    except (Stopped, SystemExit):
        # The second is Lightning's answer to a signal while it starts.
        raise KeyboardInterrupt from None
    except Unwritten:
        # Where another process fails Lightning kills the first, which is to say why.
        raise SystemExit(0) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if checkpoints.failure is not None:
        raise checkpoints.failure
    if config.dry_run or not trainer.is_global_zero:
        return None
    state = torch.load(working / BEST, map_location="cpu", weights_only=True)["state_dict"]
    return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}


def label_data(
    config: TrainConfig,
    model: HeadedTrunk,
    train_set: list[Example],
    validation: list[Example],
    policy: Policy,
) -> LabelData:
    """Batches for :func:`fit`, both classes of Q weighted equally."""
    return LabelData(
        model, train_set, validation, policy, config.frozen, config.seed, balance(train_set),
        config.tokens_per_batch, config.accumulate,
    )  # fmt: skip


def prepare(config: TrainConfig, model: HeadedTrunk) -> None:
    """Say what is trained, and how the trunk computes."""
    trunk: Any = model.trunk
    trunk.requires_grad_(config.trunk_mode == "full")
    if config.frozen:
        return
    if config.trunk_mode == "lora":
        add_adapters(trunk, config.lora)
    if not trunk.config.tie_word_embeddings:
        # No loss reaches the rows of the trunk's own tokens.
        trunk.get_output_embeddings().requires_grad_(False)
    if config.gradient_checkpointing:
        trunk.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        # pav.engine turns it off for vLLM, which does not run in this process.
        torch._dynamo.config.disable = False
        trunk.get_decoder().compile(dynamic=True)
    model.train()


def trainer_of(
    config: TrainConfig,
    callbacks: list[L.Callback],
    checkpoints: WholeCheckpoints,
    logger: Any = False,
) -> L.Trainer:
    """Lightning's trainer under ``config``.

    Raises:
        UserError: if it knows no such device or precision.
    """
    be_quiet()
    strategy: Strategy | str = "auto"
    plugins: Any = [checkpoints]
    if config.processes == 1:
        # One process is one process, also in a job of many tasks (SLURM_NTASKS).
        plugins.append(LightningEnvironment())
    elif SLURMEnvironment.detect():
        # Its own checkpoint on SIGUSR1 is none that we go on from; ours come every few minutes.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    if config.processes > 1 and config.strategy == "fsdp":
        # Its defaults shard over nodes alone: nothing on one machine.
        strategy = ModelParallelStrategy(
            data_parallel_size=config.processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    elif config.processes > 1:
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    try:
        trainer = L.Trainer(
            max_epochs=config.max_epochs,
            max_steps=config.max_steps or -1,
            precision=config.precision,
            accelerator="cpu" if config.frozen else config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            plugins=plugins,
            # Else a checkpoint that Lightning left in the working directory (SLURM's SIGUSR1), of
            # whatever run, would be gone on from.
            default_root_dir=Path(config.output).with_suffix(".training"),
            logger=logger,
            callbacks=callbacks,
            accumulate_grad_batches=1 if config.frozen else config.accumulate,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            fast_dev_run=config.dry_run,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"Lightning cannot train with these settings: {reason}; change accelerator "
            f"({config.accelerator}), devices ({config.devices}), num_nodes ({config.num_nodes}) "
            f"or precision ({config.precision})"
        ) from error
    if trainer.world_size != config.processes:
        raise UserError(
            f"devices x num_nodes is {config.devices} x {config.num_nodes}, but the launcher "
            f"started {trainer.world_size} processes; start as many as you ask for"
        )
    return trainer


def _steps(config: TrainConfig, data: LabelData) -> int:
    """Optimiser steps of the whole run.

    Raises:
        UserError: if it would end before its first epoch does.
    """
    data.setup("fit")
    batches = len(data.train_dataloader())
    per_step = 1 if config.frozen else config.accumulate * config.processes
    epoch = -(-batches // per_step)
    if config.max_steps and config.max_steps < epoch:
        raise UserError(
            f"max_steps is {config.max_steps}, less than the {epoch} steps of an epoch; a verifier "
            "is validated and kept after an epoch: give more steps, or fewer labels"
        )
    return min(epoch * config.max_epochs, config.max_steps or epoch * config.max_epochs)
