"""Low-rank adapters on a trunk: added by peft for training, merged for serving.

Source: LoRA (arXiv 2106.09685). Shapes: A (rank, in), B (out, rank).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pav.core.errors import UserError

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """Adapters of ``trunk_mode: lora``.

    Args:
        rank: rank of every adapter.
        alpha: an adapter is scaled by alpha / rank.
        dropout: of an adapter's input.
        targets: names of the linear layers that get one, e.g. ``[q_proj, v_proj]``; empty for all
            but the output embedding.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; give 1 or more")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha is {self.alpha}; give a number above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; give a share from 0 to below 1")


def linear_layers(trunk: PreTrainedModel) -> dict[str, nn.Linear]:
    """Linear layers by full name, the output embedding left out."""
    from torch import nn

    output = trunk.get_output_embeddings()
    return {
        name: module
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }


def check_targets(lora: Lora, known: Collection[str]) -> None:
    """Refuse targets that are not among the names of a trunk's linear layers."""
    if unknown := sorted(set(lora.targets) - set(known)):
        raise UserError(
            f"lora.targets names {unknown[0]!r}, which is no linear layer of the trunk; choose "
            f"from {', '.join(sorted(known))}"
        )


def add_adapters(trunk: PreTrainedModel, lora: Lora) -> None:
    """Put adapters on ``trunk`` in place; they alone require gradients and are float32.

    Raises:
        UserError: if a target is no linear layer of the trunk.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = linear_layers(trunk)
    check_targets(lora, {name.rsplit(".", 1)[-1] for name in layers})
    chosen = [n for n in layers if not lora.targets or n.rsplit(".", 1)[-1] in lora.targets]
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=chosen
    )
    inject_adapter_in_model(config, trunk)
    for name, parameter in trunk.named_parameters():
        if parameter.requires_grad:
            assert ".lora_" in name
            parameter.data = parameter.data.float()


def save_adapter(directory: Path, model: PreTrainedModel, lora: Lora) -> None:
    """Write the adapters of an adapted model as ``PeftModel.from_pretrained`` reads them.

    Args:
        directory: where to.
        model: adapted by :func:`add_adapters`; its ``name_or_path`` is what they are for.
        lora: how it was adapted.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    adapters = adapters_of(model.state_dict())
    directory.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        base_model_name_or_path=model.name_or_path,
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=adapted(adapters),
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    named = {f"base_model.model.{k}": v.detach().cpu().contiguous() for k, v in adapters.items()}
    save_file(named, directory / "adapter_model.safetensors", {"format": "pt"})


def adapters_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters in a state dict of an adapted trunk, without peft's own names."""
    return {k.replace(".default.", "."): v for k, v in state.items() if ".lora_" in k}


def merged(
    weight: Tensor, adapters: Mapping[str, Tensor], name: str, lora: dict[str, Any]
) -> Tensor:
    """``weight + alpha / rank * B A`` in float32, of the layer ``name``."""
    a, b = adapters[name + A].float(), adapters[name + B].float()
    return weight.float() + lora["alpha"] / lora["rank"] * (b @ a)


def adapted(adapters: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers that have an adapter."""
    return sorted(k.removesuffix(A) for k in adapters if k.endswith(A))


def merge_into(
    trunk: PreTrainedModel, adapters: Mapping[str, Tensor], lora: dict[str, Any]
) -> None:
    """Merge adapters into a plain trunk in place."""
    import torch

    layers = linear_layers(trunk)
    with torch.no_grad():
        for name in adapted(adapters):
            weight = layers[name].weight
            weight.copy_(merged(weight, adapters, name, lora))
