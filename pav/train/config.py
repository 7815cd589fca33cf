"""The settings of ``pav.train``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pav.core.errors import UserError
from pav.policy.policy import Prompt
from pav.tasks.base import Task
from pav.train.losses import Loss
from pav.verifier.lora import Lora

LEARNING_RATES = {"frozen": 0.01, "lora": 2e-4, "full": 2e-5}
# Those of Lightning.
Precision = Literal[
    "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true", "transformer-engine",
    "transformer-engine-float16", "32", "bf16", "16", "64",
]  # fmt: skip
# Heads start at zero on a trunk that hardly moves: at the trunk's rate they would never arrive.
HEAD_RATE = 1e-3


@dataclass(frozen=True)
class TrainConfig:
    """Train a process advantage verifier, or the ORM baseline, on Monte-Carlo labels.

    Args:
        labels: label runs that data_gen.rollouts wrote.
        output: checkpoint to write, ending in .ckpt; the export for vLLM goes beside it. The same
            command resumes from ``<output>.training/`` until it is written.
        recipe: ``pav`` (heads q/<policy> and orm, on traces; lik/<policy> where the labels
            have a table of data_gen.likelihood), ``pqv`` (Q of the base policy and orm, searched
            with alpha 0) or ``orm`` (one head, on every graded completion).
        trunk: model under the heads; by default the labels' policy itself, which serves fused (no
            second model).
        trunk_mode: ``frozen`` trains heads only, ``lora`` low-rank adapters, ``full`` everything.
        lora: adapters of ``trunk_mode: lora``.
        loss: ``bce`` on counts k of n; ``hard``: on 1 where any rollout was right (Math-Shepherd);
            ``mse`` of Q against k/n.
        calibrate_on: labels that calibrators are fitted on: of one half of the ``validation``
            problems (the default of a trained trunk), or ``all``, of up to 1000 training
            solutions as well (that of a frozen one).
        task: needed only where the labels' task is not built in.
        prompt: how the trunk is asked; by default as the labels' policy was.
        dtype: dtype the verifier is served in (bfloat16 is slow on a CPU without avx512_bf16 or
            amx_bf16).
        alpha: default weight of the advantage in search, stored with the verifier (0 for a pqv).
        lr: peak learning rate; by default 0.01 frozen, 2e-4 lora, 2e-5 full.
        head_lr: that of the heads under lora and full; by default 0.001.
        warmup: optimiser steps of linear warm-up; then the rate falls to zero as a cosine.
        max_epochs: upper limit; training stops early on validation.
        max_steps: upper limit in optimiser steps, and where the cosine ends.
        patience: epochs without improvement before it stops.
        tokens_per_batch: padded tokens of one forward pass on a device (lora, full).
        accumulate: forward passes per optimiser step on a device (lora, full).
        gradient_checkpointing: recompute activations: less memory, a third more time.
        compile: compile the trunk (needs a C++ compiler).
        seed: weights and order.
        precision: Lightning precision of lora and full training, e.g. ``bf16-mixed``.
        accelerator: Lightning accelerator of lora and full training.
        devices: devices of a node (lora, full).
        num_nodes: nodes (lora, full).
        strategy: how several devices share the work: ``ddp`` (a copy each) or ``fsdp`` (full only:
            weights, gradients and optimiser sharded over all); auto is ddp.
        logger: where losses and metrics go, in ``<output>.logs/``.
        checkpoint_minutes: time between checkpoints to resume from.
        memory_gib: memory of a device to plan for; by default what the device has.
        verbose: print every metric, not the short table (all are in ``<output>.json``).
        dry_run: plan, load, one training and one validation batch; writes nothing.
    """

    labels: list[str]
    output: str = "runs/pav.ckpt"
    recipe: Literal["pav", "pqv", "orm"] = "pav"
    trunk: str | None = None
    trunk_mode: Literal["frozen", "lora", "full"] = "frozen"
    lora: Lora = field(default_factory=Lora)
    loss: Loss = "bce"
    calibrate_on: Literal["validation", "all"] | None = None
    task: Task | None = None
    prompt: Prompt | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    alpha: float = 0.5
    lr: float | None = None
    head_lr: float | None = None
    warmup: int = 0
    max_epochs: int = 40
    max_steps: int | None = None
    patience: int = 3
    tokens_per_batch: int = 8192
    accumulate: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    precision: Precision = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    logger: Literal["none", "tensorboard", "wandb"] = "none"
    checkpoint_minutes: float = 10.0
    memory_gib: float | None = None
    verbose: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not self.output.endswith(".ckpt"):
            raise UserError(f"output is {self.output!r}; give a file name ending in .ckpt")
        if not 0 <= self.alpha <= 10:
            raise UserError(f"alpha is {self.alpha}; give a weight from 0 to 10")
        for name in ("accumulate", "devices", "num_nodes", "tokens_per_batch", "max_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.warmup < 0:
            raise UserError(f"warmup is {self.warmup}; give 0 or more optimiser steps")
        if self.max_steps is not None and self.max_steps <= self.warmup:
            raise UserError(
                f"max_steps is {self.max_steps}; give more than warmup ({self.warmup}), or leave "
                "it out"
            )
        if self.calibrate_on == "all" and not self.frozen:
            raise UserError(
                f"calibrate_on is all, but trunk_mode is {self.trunk_mode}: a trunk that was "
                "trained knows its training labels; use --calibrate_on validation"
            )
        if self.frozen and self.processes > 1:
            raise UserError(
                f"devices x num_nodes is {self.processes}, but heads on a frozen trunk train on "
                "one device: set both to 1, or --trunk_mode lora or full"
            )
        if self.strategy == "fsdp" and self.trunk_mode != "full":
            raise UserError(
                f"strategy fsdp shards a trunk that is trained in full, but trunk_mode is "
                f"{self.trunk_mode}; use --strategy ddp"
            )

    @property
    def frozen(self) -> bool:
        """Whether the trunk stays as it is."""
        return self.trunk_mode == "frozen"

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return self.devices * self.num_nodes

    @property
    def rate(self) -> float:
        """Peak learning rate: of the trunk, or of the heads where it is frozen."""
        return LEARNING_RATES[self.trunk_mode] if self.lr is None else self.lr
