"""``pav.train``: train a verifier (or its ORM baseline) on labels.

One forward pass over a trace scores all its prefixes; heads are fitted with BCE on counts (k of n),
both classes of Q weighted equally (PAV paper, Appendix D); calibrators are then fitted on one half
of unbalanced validation and everything is reported on the other half.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryAUROC

from pav.cli import run
from pav.data import Example, LabelData, balance, orm_examples, pav_examples
from pav.errors import UserError
from pav.export import ensure_export
from pav.labels import LabelSet, read_labels
from pav.policy import (
    PolicyConfig,
    Prompt,
    load_policy,
    model_path,
    tokenizer_fingerprint,
    weights_digest,
)
from pav.progress import LightningProgress
from pav.report import fit_and_report, print_report
from pav.tasks.base import Task, task_spec
from pav.verifier import (
    FORMAT,
    ORM,
    Card,
    HeadedTrunk,
    card_json,
    load_trunk,
    load_verifier,
    prompt_from,
    q_head,
    resolve_task,
)


@dataclass(frozen=True)
class TrainConfig:
    """Train a process advantage verifier, or the ORM baseline, on Monte-Carlo labels.

    Args:
        labels: label runs that data_gen.rollouts wrote.
        output: checkpoint to write, ending in .ckpt; the export for vLLM goes beside it.
        recipe: ``pav`` (heads q/<policy> and orm, on seed traces) or ``orm`` (one head, on every
            graded completion).
        trunk: model under the heads; the policy itself serves fused (no second model).
        trunk_mode: ``frozen`` trains heads only, ``full`` everything.
        task: needed only where the labels' task is not built in.
        prompt: how the trunk is asked; by default as the policy was.
        dtype: dtype the verifier is served in.
        alpha: default weight of the advantage in search, stored with the verifier.
        lr: peak learning rate; by default 0.01 frozen, 2e-5 full.
        max_epochs: upper limit; training stops early on validation.
        patience: epochs without improvement before it stops.
        seed: weights and order.
        precision: Lightning precision of full training.
        accelerator: Lightning accelerator.
    """

    labels: list[str]
    output: str = "runs/pav.ckpt"
    recipe: Literal["pav", "orm"] = "pav"
    trunk: str = "pav:strong"
    trunk_mode: Literal["frozen", "full"] = "frozen"
    task: Task | None = None
    prompt: Prompt | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    alpha: float = 0.5
    lr: float | None = None
    max_epochs: int = 40
    patience: int = 3
    seed: int = 0
    precision: str = "32-true"
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        if not self.output.endswith(".ckpt"):
            raise UserError(f"output is {self.output!r}; give a file name ending in .ckpt")
        if not 0 <= self.alpha <= 10:
            raise UserError(f"alpha is {self.alpha}; give a weight from 0 to 10")


class VerifierModule(L.LightningModule):
    """BCE on counts. H heads; a batch is (hidden, k, n) or (ids, rows, columns, k, n)."""

    def __init__(
        self, model: HeadedTrunk, card: Card, class_weight_2H: Tensor, lr: float, max_epochs: int
    ) -> None:
        super().__init__()
        self.model, self.card, self.lr, self.max_epochs = model, card, lr, max_epochs
        self.register_buffer("class_weight_2H", class_weight_2H, persistent=False)
        self.aucs = torch.nn.ModuleList(BinaryAUROC() for _ in card.heads)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, max(1, int(self.trainer.estimated_stepping_batches))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _forward(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if len(batch) == 3:
            hidden, k, n = batch
        else:
            ids, rows, columns, k, n = batch
            hidden = self.model.hidden(ids)[rows, columns]
        return self.model.head_logits(hidden), k, n

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        logits, k, n = self._forward(batch)
        weights: Tensor = self.class_weight_2H  # type: ignore[assignment]
        weight = n * torch.where(k >= 0.5 * n, weights[1], weights[0])
        loss = _bce(logits, k, n, weight)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        logits, k, n = self._forward(batch)
        self.log("val_loss", _bce(logits, k, n, n), batch_size=int(n.count_nonzero()))
        for h, auc in enumerate(self.aucs):
            there = n[:, h] > 0
            # A head may have no label at all: no outcome where the length cap cut every trace.
            if there.any():
                auc.update(logits[there, h], (k[there, h] >= 0.5 * n[there, h]).int())  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        values = [auc.compute() for auc in self.aucs if auc.update_called]  # type: ignore[operator]
        for auc in self.aucs:
            auc.reset()  # type: ignore[operator]
        self.log("val_auc", torch.stack(values).mean())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"verifier": card_json(self.card), "format": FORMAT}
        # A frozen trunk is found again by name and digest: a checkpoint of heads stays small.
        if self.card.frozen:
            state = checkpoint["state_dict"]
            for key in [k for k in state if k.startswith("model.trunk.")]:
                del state[key]


def _bce(logits: Tensor, k: Tensor, n: Tensor, weight: Tensor) -> Tensor:
    target = k / n.clamp_min(1e-9)
    loss = binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="sum")
    return loss / weight.sum().clamp_min(1e-9)


def train(config: TrainConfig) -> Card:
    """Train, calibrate, report, save and export (see :class:`TrainConfig`)."""
    output = Path(config.output)
    if output.exists():
        raise UserError(f"output {config.output!r} exists; choose another name or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(output.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"output {config.output!r} cannot be written there; choose another place")
    labels = read_labels(config.labels)
    task = resolve_task(labels.manifest["task_spec"], config.task, f"labels {config.labels[0]!r}")
    check_task(task, labels, config.labels[0])
    card = new_card(config, labels, task)
    path = model_path(config.trunk)
    policy = load_policy(
        PolicyConfig(config.trunk, prompt=prompt_from(card.prompt), dtype=config.dtype),
        task.step_rule,
    )
    if tokenizer_fingerprint(policy.tokenizer) != card.tokenizer:
        raise UserError(
            f"trunk {config.trunk!r} has another tokenizer than the labels' policy "
            f"{card.policy['model']!r}; use a trunk of the same tokenizer"
        )
    L.seed_everything(config.seed, verbose=False)
    model = HeadedTrunk(load_trunk(path), len(card.heads))
    cap = card.sampler["max_length"]
    train_set, validation = (
        orm_examples(labels, split, policy, cap)
        if config.recipe == "orm"
        else pav_examples(labels, split, card.heads, policy, cap)
        for split in ("train", "validation")
    )
    if not train_set or not validation:
        raise UserError(
            f"labels {config.labels} hold {len(train_set)} training and {len(validation)} "
            "validation traces; both are needed: raise problems or validation_problems"
        )
    print(
        f"{len(train_set)} training and {len(validation)} validation solutions, heads "
        f"{', '.join(card.heads)} on {config.trunk} ({config.trunk_mode})"
    )
    fit(config, card, model, train_set, validation, policy)
    # Calibration and report need whole base traces: an ORM is judged on them too.
    judged = pav_examples(labels, "validation", card.heads, policy, cap)
    base_name = PolicyConfig(**{**card.policy, "prompt": Prompt()}).label
    card = fit_and_report(card, model, judged, labels, policy, task, base_name)
    save(card, model, output)
    print_report(card)
    verifier = load_verifier(str(output))
    directory, _ = ensure_export(verifier, path)
    # Undefined metrics are NaN here and null there: NaN is no JSON.
    plain = json.loads(json.dumps(card.validation), parse_constant=lambda _: None)
    output.with_suffix(".json").write_text(json.dumps(plain, indent=1))
    print(
        f"verifier: {output} ({output.stat().st_size / 1e6:.1f} MB), export for vLLM: {directory}"
    )
    following = (
        "search.compare --help" if config.recipe == "orm" else f"search.beam --verifier {output}"
    )
    print(f"next: {following}")
    return card


def check_task(task: Task, labels: LabelSet, where: str) -> None:
    """The task must be the one that the labels are about."""
    if task.fingerprint != labels.manifest["task"]:
        raise UserError(
            f"labels {where!r} were made for another setting of the task (theirs: "
            f"{labels.manifest['task']}, given: {task.fingerprint}); give the same --task settings"
        )


def new_card(config: TrainConfig, labels: LabelSet, task: Task) -> Card:
    """The card of a verifier about to be trained."""
    manifest = labels.manifest
    policy = manifest["policy"]
    base = PolicyConfig(**{**policy, "prompt": prompt_from(policy["prompt"])})
    provers = [name for name in labels.policies if name != base.label]
    is_pav = config.recipe == "pav"
    if is_pav and base.label not in labels.policies:
        raise UserError(
            f"labels {config.labels} have no rollouts under the base policy {base.label!r}; "
            "Q_base cannot be learned from them"
        )
    prompt = config.prompt or base.prompt
    digest = weights_digest(model_path(config.trunk))
    return Card(
        heads=[*(q_head(p) for p in [base.label, *provers]), ORM] if is_pav else [ORM],
        recipe=config.recipe,
        trunk=config.trunk,
        trunk_digest=digest,
        frozen=config.trunk_mode == "frozen",
        prompt=asdict(prompt),
        dtype=config.dtype,
        task=task_spec(task),
        task_fingerprint=task.fingerprint,
        policy=asdict(base),
        policy_fingerprint=manifest["policy_fingerprint"],
        tokenizer=manifest["tokenizer"],
        sampler=manifest["sampler"],
        base_head=q_head(base.label) if is_pav else "",
        prover_head=q_head((provers or [base.label])[0]) if is_pav else "",
        alpha=config.alpha,
        pick="last" if is_pav else ORM,
    )


def fit(
    config: TrainConfig,
    card: Card,
    model: HeadedTrunk,
    train_set: list[Example],
    validation: list[Example],
    policy: Any,
) -> None:
    """Train heads (and trunk); the best epoch on validation is kept in ``model``."""
    for parameter in model.trunk.parameters():
        parameter.requires_grad_(not card.frozen)
    lr = config.lr or (0.01 if card.frozen else 2e-5)
    module = VerifierModule(model, card, torch.tensor(balance(train_set)), lr, config.max_epochs)
    data = LabelData(model, train_set, validation, policy, card.frozen, config.seed)
    data.setup("fit")
    steps = len(data.train_dataloader()) * config.max_epochs
    # Heads of a PAV are wanted calibrated, an ORM has to rank.
    monitor, mode = ("val_loss", "min") if card.recipe == "pav" else ("val_auc", "max")
    working = Path(config.output).with_suffix(".training")
    best = ModelCheckpoint(
        working,
        filename="best",
        monitor=monitor,
        mode=mode,
        save_top_k=1,
        enable_version_counter=False,
    )
    trainer = L.Trainer(
        max_epochs=config.max_epochs,
        precision=config.precision,  # type: ignore[arg-type]
        accelerator="cpu" if card.frozen else config.accelerator,
        devices=1,
        logger=False,
        callbacks=[
            best,
            EarlyStopping(monitor, mode=mode, patience=config.patience),
            LightningProgress(steps),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        reload_dataloaders_every_n_epochs=0 if card.frozen else 1,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    inner = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    model.load_state_dict(inner, strict=not card.frozen)
    model.cpu().eval()
    Path(best.best_model_path).unlink()
    working.rmdir()


def save(card: Card, model: HeadedTrunk, output: Path) -> None:
    """Write the checkpoint in Lightning's format."""
    output.parent.mkdir(parents=True, exist_ok=True)
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    if card.frozen:
        state = {k: v for k, v in state.items() if not k.startswith("model.trunk.")}
    checkpoint = {
        "state_dict": state,
        "verifier": card_json(card),
        "format": FORMAT,
        "pytorch-lightning_version": L.__version__,
    }
    temporary = output.with_suffix(".tmp")
    torch.save(checkpoint, temporary)
    temporary.replace(output)


def main() -> None:
    """Entry point of ``pav.train``."""
    run(train, TrainConfig, "pav.train")


if __name__ == "__main__":
    main()
