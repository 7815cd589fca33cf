"""The training loop of ``pav.sft --from_traces``: batches, loss, held-out stop.

Axes: B traces, T tokens.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from pav.core.errors import UserError
from pav.core.seeds import seed_of
from pav.train.checkpoints import BEST, LAST, LastCheckpoint, Stopped, WholeCheckpoints
from pav.train.lightning_internals import be_quiet
from pav.train.progress import LightningProgress
from pav.train.sft import CHECKPOINT_MINUTES, IGNORE
from pav.train.sft_config import SftConfig
from pav.verifier.forward import batches, pad
from pav.verifier.lora import add_adapters
from pav.verifier.trunk import load_trunk

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Solution:
    """A correct trace: the first ``prompt`` of its ``ids`` ask, the others answer."""

    ids: list[int]
    prompt: int


class Steps:
    """Optimiser steps, each a list of padded batches (ids, labels); a new order every epoch.

    A pure function of (seed, epoch, place), so a resumed run sees what an unbroken one would have.
    """

    def __init__(self, solutions: Sequence[Solution], batch: int, tokens: int, seed: int) -> None:
        self.solutions, self.batch, self.tokens, self.seed = solutions, batch, tokens, seed
        self.epoch = self.done = 0

    def __len__(self) -> int:
        return math.ceil(len(self.solutions) / self.batch)

    def __iter__(self) -> Iterator[list[Batch]]:
        if self.done >= len(self):
            self.epoch, self.done = self.epoch + 1, 0
        order = list(self.solutions)
        random.Random(seed_of(self.seed, self.epoch)).shuffle(order)
        for i in range(self.done, len(self)):
            self.done = i + 1
            window = order[i * self.batch : (i + 1) * self.batch]
            yield [collate(part) for part in batches(window, None, self.tokens)]

    def state_dict(self) -> dict[str, int]:
        """Epoch and steps done; Lightning keeps it in a checkpoint."""
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the steps that are done."""
        self.epoch, self.done = state["epoch"], state["done"]


def collate(solutions: Sequence[Solution]) -> Batch:
    """Ids and labels (B, T), right-padded; prompt and padding carry no loss."""
    ids = pad(solutions)
    labels = torch.full_like(ids, IGNORE)
    for i, solution in enumerate(solutions):
        kept = slice(solution.prompt, len(solution.ids))
        labels[i, kept] = ids[i, kept]
    return ids, labels


class RftModule(L.LightningModule):
    """Next-token loss by AdamW; a step of several batches, hence stepped by hand."""

    def __init__(self, config: SftConfig, model: PreTrainedModel, steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.rft, self.model, self.steps = config, config.rft, model, steps
        # A checkpoint of adapters alone is whole.
        self.strict_loading = self.rft.mode == "full"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.rft.rate, weight_decay=0.0)

    def summed(self, batch: Batch) -> Tensor:
        """Loss summed over the solution tokens of a batch."""
        ids, labels = batch
        # Right padding under a causal mask needs no attention mask: no real token sees a pad.
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        return cross_entropy(
            logits.float().reshape(-1, logits.shape[-1]),
            labels[:, 1:].reshape(-1),
            ignore_index=IGNORE,
            reduction="sum",
        )

    def training_step(self, step: list[Batch], index: int) -> None:
        optimizer: Any = self.optimizers()
        done = self.global_step
        # Dropout must not depend on where a run was resumed.
        torch.manual_seed(seed_of(self.config.seed, done))
        for group in optimizer.param_groups:
            group["lr"] = self.rft.rate * schedule(done, self.rft.warmup, self.steps)
        optimizer.zero_grad()
        tokens = sum(_tokens(batch) for batch in step)
        losses = []
        for batch in step:
            part = self.summed(batch) / tokens
            self.manual_backward(part)
            losses.append(part.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        self.log("loss", torch.stack(losses).sum(), batch_size=1)

    def validation_step(self, batch: Batch, index: int) -> None:
        tokens = _tokens(batch)
        self.log("val_loss", self.summed(batch) / tokens, batch_size=tokens)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.rft.mode == "lora":
            state = checkpoint["state_dict"]
            for key in [k for k in state if ".lora_" not in k]:
                del state[key]


def _tokens(batch: Batch) -> int:
    return int((batch[1] != IGNORE).sum())


def schedule(step: int, warmup: int, steps: int) -> float:
    """Share of the peak rate at ``step``: linear warm-up, then a cosine to zero at ``steps``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))) / 2


def fit(
    config: SftConfig,
    path: str,
    train: Sequence[Solution],
    held_out: Sequence[Solution],
    output: Path,
    last: Path | None,
) -> PreTrainedModel:
    """The model of the best epoch on ``held_out``, its adapters on it where they are trained.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM; the same command resumes.
        UserError: if training diverged, or a checkpoint cannot be written.
    """
    settings = config.rft
    half = settings.mode == "lora" and config.precision.startswith("bf16")
    model = load_trunk(path, torch.bfloat16 if half else torch.float32)
    if settings.mode == "lora":
        model.requires_grad_(False)
        add_adapters(model, settings.lora)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    data = Steps(train, config.batch, settings.tokens_per_batch, config.seed)
    module = RftModule(config, model.train(), settings.max_epochs * len(data))
    checkpoints = WholeCheckpoints()
    best = ModelCheckpoint(
        output, filename=BEST.removesuffix(".ckpt"), monitor="val_loss", save_top_k=1,
        save_weights_only=True, enable_version_counter=False,
    )  # fmt: skip
    be_quiet()
    trainer = L.Trainer(
        max_epochs=settings.max_epochs,
        precision=config.precision,
        accelerator="auto",
        devices=1,
        logger=False,
        plugins=[checkpoints],
        callbacks=[
            best,
            EarlyStopping("val_loss", patience=settings.patience),
            LastCheckpoint(output / LAST, CHECKPOINT_MINUTES, checkpoints),
            LightningProgress(module.steps),
        ],
        default_root_dir=output,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    parts = [collate(part) for part in batches(held_out, None, settings.tokens_per_batch)]
    validation: Any = DataLoader(parts, batch_size=None)  # type: ignore[arg-type]
    (before,) = trainer.validate(module, validation, verbose=False)
    model.train()
    if last is not None:
        print(f"resuming from {last}")
    try:
        trainer.fit(
            module, data, validation, ckpt_path=None if last is None else str(last),
            weights_only=True,
        )  # fmt: skip
    except (Stopped, SystemExit):
        # The second is Lightning's answer to a signal while it starts.
        raise KeyboardInterrupt from None
    found = torch.load(output / BEST, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = found["state_dict"]
    after = math.nan if best.best_model_score is None else float(best.best_model_score)
    if not math.isfinite(after) or not all(t.isfinite().all() for t in state.values()):
        raise UserError(
            f"training diverged: the held-out loss is {after}; lower rft.lr (now "
            f"{settings.rate:g}), and remove {str(output)!r} or choose another output"
        )
    print(
        f"held-out loss {before['val_loss']:.4f} -> {after:.4f} nats per token, after epoch "
        f"{found['epoch'] + 1} of {trainer.current_epoch}"
    )
    if after >= before["val_loss"]:
        print(
            "WARNING: no epoch is better on held-out traces than the start; lower rft.lr (now "
            f"{settings.rate:g}), or label more",
            file=sys.stderr,
        )
    module.load_state_dict(state, strict=module.strict_loading)
    return model.cpu()
