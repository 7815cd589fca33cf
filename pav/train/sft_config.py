"""The settings of ``pav.sft``."""

from __future__ import annotations

from dataclasses import dataclass, field

from pav.policy.policy import Prompt
from pav.tasks.base import Task
from pav.tasks.tape import Tape
from pav.train.config import Precision


@dataclass(frozen=True)
class PolicyShape:
    """Size of a Llama trained from scratch."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning of a policy on a task's own solutions.

    Args:
        output: directory to write the policy to (transformers layout, safetensors).
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
