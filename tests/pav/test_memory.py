"""The memory plan: real shapes on real devices, and activations against what torch keeps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from pav.train.config import TrainConfig
from pav.train.memory import Work, plan_memory, ways_out
from pav.verifier.lora import Lora, add_adapters
from pav.verifier.shape import GIB, Shape, shape_of

CONFIGS: dict[str, Any] = {
    "1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "9B": Gemma2Config(
        vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, tie_word_embeddings=True,
    ),
}  # fmt: skip
FULL = Work("full", "bf16-mixed", tokens=8192, length=1024)
LORA = Work("lora", "bf16-mixed", tokens=8192, length=1024)


@cache
def shape(name: str) -> Shape:
    return shape_of(CONFIGS[name])


@pytest.mark.parametrize(("name", "billions"), [("1.5B", 1.544), ("7B", 7.616), ("9B", 9.242)])
def test_parameters_are_those_of_the_published_models(name: str, billions: float) -> None:
    assert shape(name).parameters / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "work", "fits_24", "fits_80"),
    [
        ("1.5B", FULL, False, True),
        ("1.5B", replace(FULL, checkpointing=True), False, True),
        ("1.5B", replace(FULL, precision="bf16-true", checkpointing=True), True, True),
        ("1.5B", replace(LORA, checkpointing=True), True, True),
        ("7B", replace(FULL, checkpointing=True), False, False),
        ("7B", replace(FULL, precision="bf16-true", checkpointing=True), False, True),
        ("7B", replace(FULL, checkpointing=True, shards=8), False, True),
        ("7B", LORA, False, True),
        ("7B", replace(LORA, checkpointing=True, tokens=4096), True, True),
        ("7B", Work("frozen", dtype="bfloat16"), True, True),
        ("7B", Work("frozen"), False, True),
        ("9B", replace(FULL, checkpointing=True), False, False),
        ("9B", replace(FULL, checkpointing=True, shards=8), False, True),
        ("9B", replace(LORA, checkpointing=True), False, True),
        ("9B", replace(LORA, checkpointing=True, tokens=2048), True, True),
        ("9B", replace(LORA, precision="32-true", checkpointing=True), False, True),
    ],
)
def test_what_fits_on_24_and_80_gb(name: str, work: Work, fits_24: bool, fits_80: bool) -> None:
    adapters = shape(name).adapter_parameters(Lora()) if work.mode == "lora" else 0
    total = plan_memory(shape(name), replace(work, adapters=adapters)).total
    assert (total <= 24e9, total <= 80e9) == (fits_24, fits_80), f"{total / 1e9:.1f} GB"


def test_full_fine_tuning_in_single_precision_takes_16_bytes_a_parameter() -> None:
    plan = plan_memory(shape("1.5B"), Work("full", "32-true"))
    count = shape("1.5B").parameters
    assert (plan.weights, plan.gradients, plan.optimizer) == (4 * count, 4 * count, 8 * count)


def test_sharding_over_eight_devices_cuts_the_optimiser_to_an_eighth() -> None:
    alone, shared = (plan_memory(shape("9B"), replace(FULL, shards=n)) for n in (1, 8))
    assert shared.optimizer == pytest.approx(alone.optimizer / 8, rel=1e-6)
    assert alone.weights / 8 < shared.weights < alone.weights / 2
    assert shared.activations == alone.activations


@pytest.mark.parametrize("name", list(CONFIGS))
def test_ways_out_fit_and_go_from_little_to_much_change(name: str) -> None:
    work = replace(FULL, precision="32-true", tokens=16384)
    for gigabytes in (24, 80):
        budget = int(gigabytes * 1e9)
        assert plan_memory(shape(name), work).total > budget
        ways = ways_out(shape(name), work, Lora(), budget)
        assert ways
        assert all(float(way.split("(")[1].split()[0]) <= budget / GIB + 0.05 for way in ways)
        # Freezing the trunk is the last resort, and always one.
        assert "--trunk_mode frozen --dtype bfloat16" in ways[-1]
    assert ways_out(shape(name), work, Lora(), GIB) == []


def test_ways_out_are_settings_that_exist() -> None:
    fields = TrainConfig.__dataclass_fields__
    ways = ways_out(shape("9B"), replace(FULL, tokens=16384), Lora(), int(80e9))
    words = [w for way in ways for w in way.split() if w.startswith("--")]
    assert len(words) > 5
    assert {w.removeprefix("--") for w in words} <= fields.keys()


def test_adapters_are_counted_as_peft_makes_them() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    for lora in (Lora(rank=4), Lora(rank=8, targets=["q_proj", "down_proj"])):
        trunk = AutoModelForCausalLM.from_config(config)
        add_adapters(trunk, lora)
        count = sum(p.numel() for p in trunk.parameters() if p.requires_grad)
        assert shape_of(config).adapter_parameters(lora) == count


def kept_bytes(config: Any, precision: str, batch: int, length: int, checkpointing: bool) -> int:
    """Bytes that torch keeps for the backward pass of a decoder, weights left out."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if config.model_type == "gemma2":
        model.set_attn_implementation("eager")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.ones(batch, length, dtype=torch.long)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), mixed:
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("config_type", [LlamaConfig, Qwen2Config, Gemma2Config])
def test_activations_are_what_torch_keeps(config_type: Any, precision: str) -> None:
    config = config_type(
        vocab_size=16, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    batch, length = 8, 64
    work = Work("full", precision, tokens=batch * length, length=length)
    plan = plan_memory(shape_of(config), work)
    # Autocast's copies of the weights are counted with the weights.
    copies = plan.weights - 4 * shape_of(config).parameters if precision == "bf16-mixed" else 0
    kept = kept_bytes(config, precision, batch, length, False)
    assert plan.activations + copies == pytest.approx(kept, rel=0.1)


def test_checkpointing_keeps_one_tensor_a_layer_beside_the_layer_that_is_recomputed() -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=128, intermediate_size=256, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    works = [Work("full", tokens=512, length=64, checkpointing=c) for c in (False, True)]
    whole, saved = (plan_memory(shape_of(config), work).activations for work in works)
    layer = whole / 8
    kept = kept_bytes(config, "32-true", 8, 64, True)
    assert saved == pytest.approx(kept + layer, rel=0.1)
    assert saved < 0.3 * whole
