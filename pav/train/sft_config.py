"""The settings of ``pav.sft``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from pav.core.errors import UserError
from pav.policy.policy import Prompt
from pav.tasks.base import Task
from pav.tasks.tape import Tape
from pav.train.config import LEARNING_RATES, Precision
from pav.verifier.lora import Lora

# What else is read with from_traces; the rest is about a task's own solutions.
OF_TRACES = ("output", "from_traces", "rft", "init", "batch", "seed", "precision")


@dataclass(frozen=True)
class PolicyShape:
    """Size of a Llama trained from scratch."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384


@dataclass(frozen=True)
class RftConfig:
    """How a policy is fine-tuned on the correct traces of a label run (AdamW).

    Args:
        mode: ``full`` trains all weights, ``lora`` low-rank adapters.
        lora: adapters of ``mode: lora``.
        lr: peak learning rate; by default 2e-5 full, 2e-4 lora.
        warmup: optimiser steps of linear warm-up; then the rate falls to zero as a cosine.
        max_epochs: upper limit, and where the cosine ends.
        patience: epochs without a lower held-out loss before it stops.
        tokens_per_batch: padded tokens of one forward pass; a step of ``batch`` traces takes as
            many passes as it needs.
        gradient_checkpointing: recompute activations: less memory, a third more time.
    """

    mode: Literal["full", "lora"] = "full"
    lora: Lora = field(default_factory=Lora)
    lr: float | None = None
    warmup: int = 10
    max_epochs: int = 10
    patience: int = 2
    tokens_per_batch: int = 8192
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("max_epochs", "patience", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"rft.{name} is {getattr(self, name)}; give 1 or more")
        if self.warmup < 0:
            raise UserError(f"rft.warmup is {self.warmup}; give 0 or more optimiser steps")
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"rft.lr is {self.lr}; give a number above 0")

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return LEARNING_RATES[self.mode] if self.lr is None else self.lr


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning of a policy on a task's own solutions, or on a label run's.

    Args:
        output: directory to write the policy to (transformers layout, safetensors).
        from_traces: label run whose correct traces are learned from, instead of a task's solutions
            (RFT, the start of RL in the PAV paper, Appendix E): its own policy, asked with its own
            prompt, or another ``init`` of the same tokenizer. Besides ``rft`` it reads batch, seed
            and precision.
        rft: how, with ``from_traces``.
        task: what to learn; needs a ``solutions`` method.
        init: policy to start from; by default a new Llama of ``shape``.
        shape: size of a new model.
        prompt: how the policy will be asked.
        steps: optimiser steps.
        batch: solutions per step.
        lr: peak learning rate of the matrices (Muon).
        lr_rest: peak learning rate of embeddings, norms and output rows (AdamW).
        warmup: steps of linear warm-up.
        decay: last share of the steps over which the rate falls linearly to zero.
        seed: weights and data.
        precision: Lightning precision, e.g. ``bf16-mixed``.
        compile: compile the forward and backward pass (needs a C++ compiler; on a CPU 1.3 times as
            fast for a 1M model, after a minute of compiling).
        eval_problems: validation problems for the accuracy printed at the end; 0 for none.
        max_length: cap on prompt + solution in that evaluation.
    """

    output: str
    from_traces: str | None = None
    rft: RftConfig = field(default_factory=RftConfig)
    task: Task = field(default_factory=Tape)
    init: str | None = None
    shape: PolicyShape = field(default_factory=PolicyShape)
    prompt: Prompt = field(default_factory=Prompt)
    steps: int = 1000
    batch: int = 32
    lr: float = 0.01
    lr_rest: float = 0.002
    warmup: int = 50
    decay: float = 0.4
    seed: int = 0
    precision: Precision = "32-true"
    compile: bool = False
    eval_problems: int = 500
    max_length: int = 160

    def __post_init__(self) -> None:
        usual = {f.name: f.default_factory() for f in fields(self) if callable(f.default_factory)}
        usual |= {f.name: f.default for f in fields(self) if f.name not in usual}
        if self.batch < 1:
            raise UserError(f"batch is {self.batch}; give 1 or more")
        if self.from_traces is None:
            if self.rft != usual["rft"]:
                raise UserError(
                    "rft is set, which is about from_traces, and that is not; give the label run, "
                    "or leave rft out"
                )
            return
        for name in usual.keys() - {*OF_TRACES}:
            if getattr(self, name) != usual[name]:
                also = "; the learning rate is rft.lr" if name == "lr" else ""
                raise UserError(
                    f"{name} means nothing with from_traces, which takes task and prompt from the "
                    f"label run and its settings from rft: leave it out{also}"
                )
        if self.precision.startswith("16"):
            raise UserError(
                f"precision is {self.precision}, whose scaled gradients are not supported with "
                "from_traces; use bf16-mixed or 32-true"
            )
