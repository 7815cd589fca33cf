"""Third-party reward models as transformers loads them, and what their logits mean.

Code that comes with a model is never run, and weights are read from safetensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen2Model,
    Qwen2PreTrainedModel,
)
from transformers.modeling_outputs import TokenClassifierOutput

from pav.core.errors import UserError
from pav.reward_models.progress import Progress
from pav.reward_models.text import Layout, RewardModelConfig


class QwenPrm(Qwen2PreTrainedModel):
    """Qwen2.5-Math-PRM: a Qwen 2 with a head of two layers, whose own code is not run."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.ReLU(),
            nn.Linear(config.hidden_size, 2),
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TokenClassifierOutput:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return TokenClassifierOutput(logits=self.score(states))


KINDS: dict[str, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "qwen": QwenPrm,
    "shepherd": AutoModelForCausalLM,
    "progress": AutoModelForCausalLM,
}


def chance(logits: Tensor) -> Tensor:
    """Chance of the good label from logits (..., 1) or (..., 2); float64 saturates late."""
    wide = logits.double()
    return torch.sigmoid(wide[..., 0] if wide.shape[-1] == 1 else wide[..., 1] - wide[..., 0])


def layout_of(config: RewardModelConfig) -> Layout:
    """The layout, from the architecture where it is not given.

    Raises:
        UserError: if the architecture is of none.
    """
    if config.layout != "auto":
        return config.layout
    try:
        found = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read a reward model's config at {config.model!r}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    name = (found.architectures or ["none"])[0]
    if name.endswith("ForSequenceClassification"):
        return "sequence"
    if name.endswith("ForTokenClassification"):
        return "token"
    if name == "Qwen2ForProcessRewardModel":
        return "qwen"
    if name.endswith("ForCausalLM"):
        raise UserError(
            f"{config.model!r} is a language model ({name}), not a classifier; if it is a PRM in "
            "Math-Shepherd's manner, add --reward_model.layout shepherd; if pav.rl trained it, "
            "--reward_model.layout progress"
        )
    raise UserError(
        f"{config.model!r} has the architecture {name}, which is not known here (code that comes "
        "with a model is never run); give a sequence or token classifier, a Qwen2.5-Math-PRM, or "
        "a PRM in Math-Shepherd's manner"
    )


def load(config: RewardModelConfig, layout: Layout) -> Any:
    """The model, on the CPU.

    Raises:
        UserError: if its weights cannot be loaded, or some are missing.
    """
    if layout == "progress":
        return Progress(config.model, getattr(torch, config.dtype))
    trust = {} if layout == "qwen" else {"trust_remote_code": False}
    try:
        model, told = KINDS[layout].from_pretrained(
            config.model,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **trust,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot load the reward model {config.model!r} in layout {layout}: "
            f"{(str(error).strip().splitlines() or ['?'])[0]}"
        ) from error
    # transformers makes up what a checkpoint lacks: a reward model with a random head.
    if told["missing_keys"]:
        raise UserError(
            f"{config.model!r} lacks the weights {', '.join(sorted(told['missing_keys'])[:3])} of "
            f"layout {layout}; choose another reward_model.layout or another model"
        )
    return model
