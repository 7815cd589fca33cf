"""Tiny random reward models of every layout, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen2Config,
)

from pav.reward_models.loading import QwenPrm
from pav.reward_models.text import MARK, Layout


def built(path: Path, kind: Layout, tokenizer: Any, labels: int = 2) -> str:
    """A random reward model of a layout, saved as its makers would."""
    text = type(tokenizer)(
        # A copy: tokens are added to it.
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        chat_template=tokenizer.chat_template if kind in ("qwen", "sequence") else None,
    )  # fmt: skip
    if kind == "qwen":
        text.add_tokens([MARK], special_tokens=True)
    if kind == "shepherd":
        text.add_tokens(["ки", "+ ", "-"])
    config = Qwen2Config(
        vocab_size=len(text), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        initializer_range=0.3, pad_token_id=text.pad_token_id, num_labels=labels,
    )  # fmt: skip
    torch.manual_seed(0)
    made: Any
    if kind == "qwen":
        made = QwenPrm(config)
        made.config.architectures = ["Qwen2ForProcessRewardModel"]
    else:
        made = {
            "sequence": AutoModelForSequenceClassification,
            "token": AutoModelForTokenClassification,
            "shepherd": AutoModelForCausalLM,
        }[kind].from_config(config, dtype=torch.float32)
    made.save_pretrained(path)
    text.save_pretrained(path)
    if kind == "qwen":
        # As published: code beside the weights, which must not be run.
        plain = json.loads((path / "config.json").read_text())
        plain["architectures"] = ["Qwen2ForProcessRewardModel"]
        plain["auto_map"] = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
        (path / "config.json").write_text(json.dumps(plain))
        (path / "modeling_evil.py").write_text("raise SystemExit('remote code was run')\n")
    return str(path)
