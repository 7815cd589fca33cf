"""Sizes of a model, from its config alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pav.verifier.lora import Lora, linear_layers

GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """Sizes of a trunk.

    Attributes:
        parameters: all of them, tied ones once.
        layers: decoder layers.
        hidden: hidden size.
        query, key: widths of all query heads, and of all key heads (those of the values are equal).
        mlp: width of the MLP.
        heads: query heads.
        embedding: parameters of the input embedding.
        linear_widths: name of a linear layer -> sum of in + out over all layers of that name.
        capped: whether attention is soft-capped (Gemma 2).
    """

    parameters: int
    layers: int
    hidden: int
    query: int
    key: int
    mlp: int
    heads: int
    embedding: int
    linear_widths: dict[str, int]
    capped: bool

    def adapter_parameters(self, lora: Lora) -> int:
        """Parameters of the adapters on this trunk."""
        names = lora.targets or list(self.linear_widths)
        return lora.rank * sum(self.linear_widths.get(name, 0) for name in names)


def shape_of(config: Any) -> Shape:
    """The sizes of the model that a transformers config describes; allocates no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    widths: Counter[str] = Counter()
    for name, layer in linear_layers(model).items():
        widths[name.rsplit(".", 1)[-1]] += layer.in_features + layer.out_features
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        query=heads * size,
        key=(getattr(config, "num_key_value_heads", None) or heads) * size,
        mlp=config.intermediate_size,
        heads=heads,
        embedding=model.get_input_embeddings().weight.numel(),
        linear_widths=dict(widths),
        capped=bool(getattr(config, "attn_logit_softcapping", None)),
    )
