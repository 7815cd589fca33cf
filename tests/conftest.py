"""Shared fixtures: tiny random models of real architectures, with real tokenizers, on disk.

All are session-scoped: build once, never write into what they return (copy the directory first).
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pav.engine import loading, vllm, vllm_internals
from pav.policy.policy import (
    PolicyConfig,
    Prompt,
    Sampler,
    load_policy,
    tokenizer_fingerprint,
    weights_digest,
)
from pav.tasks.base import Task, task_spec
from pav.tasks.tape import Tape, tape_tokenizer
from pav.verifier.calibrate import SURPRISE, Calibrator
from pav.verifier.checkpoint import VerifierMeta
from pav.verifier.trunk import HeadedTrunk, load_trunk

# (architecture, its differences) by the name that ``tiny_model`` takes. Heads of 32, because vLLM's
# attention on CPUs knows no smaller ones.
ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": False, "head_dim": 32}),
    "qwen3-tied": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 32}),
    "gemma2": (
        Gemma2Config,
        # Caps and a window small enough to change what these models say.
        {"tie_word_embeddings": True, "head_dim": 32, "query_pre_attn_scalar": 32,
         "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "sliding_window": 24},
    ),
    "gemma2-untied": (
        Gemma2Config,
        {"tie_word_embeddings": False, "head_dim": 32, "query_pre_attn_scalar": 32},
    ),
    "gemma3": (
        Gemma3TextConfig,
        {"tie_word_embeddings": True, "head_dim": 32, "query_pre_attn_scalar": 32,
         "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Timing never fails a test.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores it, and so would all that tests send it to.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that start engines, train or run whole commands, longest first; `make quick` leaves them
# out.
SLOW = [
    "test_library",
    "test_strategies",
    "test_rollouts",
    "test_weights",
    "test_rl",
    "test_workers",
    "test_search_workers",
    "test_crash",
    "test_resume",
    "test_compare",
    "test_select",
    "test_serve",
    "test_beam",
    "test_tools",
    "test_rl_learner",
    "test_rl_likelihood",
    "test_reference_sets",
    "test_rl_reward_model",
    "test_rl_shares",
    "test_next_commands",
    "test_methods",
    "test_user_task",
    "test_errors",
    "test_training_modes",
    "test_train",
    "test_planted",
    "test_reward_models",
    "test_provers",
    "test_likelihood",
    "test_verifier",
    "test_rft",
    "test_sft",
    "test_launch",
    "test_parity",
    "test_gpu_check",
    "test_labels",
    "test_ledger",
    "test_likelihood_head",
    "test_verifier_consistency",
    "test_verifier_gsm8k",
    "test_verifier_lora",
    "test_verifier_study",
    "test_final_step",
    "test_grading_kinds",
    "test_guarded",
    "test_internals",
    "test_loading",
    "test_model_card",
    "test_positions",
    "test_rl_memory",
    "test_tensor_parallel",
    "test_cost",
    "test_stops",
    "test_first_run",
    "test_packaging",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files, and begin with the longest: processes then end together."""
    order = {name: i for i, name in enumerate(["test_docs", *SLOW])}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def engines_that_start_fast() -> Iterator[None]:
    """Spare every engine but the first what the first has done for the whole process.

    vLLM collects garbage seven times where an engine starts and ends, each time among a million
    objects, and looks through all modules for kernels to replace. That is most of what a tiny
    engine costs. Here modules are left out of collections, of which one at the end frees as much.
    """
    kernels = pytest.MonkeyPatch()

    def load(*arguments: Any) -> Any:
        from vllm import LLMEngine  # noqa: F401 (a part of the heap that stays)
        from vllm.triton_utils import dispatcher

        if not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gc, "collect", lambda *_: 0)
            patch.setattr(gc, "freeze", lambda: None)
            engine = loading.load(*arguments)
        kernels.setattr(dispatcher, "register_kernels", lambda _: None)
        return engine

    def shutdown(engine: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gc, "collect", lambda *_: 0)
            patch.setattr(gc, "unfreeze", lambda: None)
            vllm_internals.shutdown(engine)
        gc.collect()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "load", load)
        patch.setattr(vllm, "shutdown", shutdown)
        yield
    kernels.undo()


def build_chat_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; tokens carry newlines with other text: ``.\\n``, ``\\n\\n``, ``\\n  ``."""
    merges = [(".", "Ċ"), ("Ċ", "Ċ"), ("Ċ", "Ġ"), ("ĊĠ", "Ġ"), ("Ġ", "Ġ")]
    tokens = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [a + b for a, b in merges]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Chat-templated byte-level BPE; its prompts need ``Prompt(chat=True)``."""
    return build_chat_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model("llama")``: directory of a random two-layer model, built once per session.

    Arguments: the architecture (a key of :data:`ARCHITECTURES`) and ``tokenizer``, ``"tape"`` or
    ``"chat"``. Weights are float32 in one safetensors file and large enough that the model's next
    tokens differ visibly in probability. Weights of equal arguments are equal across sessions.
    """
    built: dict[tuple[str, str], Path] = {}

    def build(architecture: str, tokenizer: str = "tape") -> Path:
        key = (architecture, tokenizer)
        if key not in built:
            built[key] = tmp_path_factory.mktemp(f"{architecture}-{tokenizer}")
            _build(built[key], architecture, tokenizer)
        return built[key]

    return build


def _build(path: Path, architecture: str, tokenizer: str) -> None:
    text = tape_tokenizer() if tokenizer == "tape" else build_chat_tokenizer()
    config_type, differences = ARCHITECTURES[architecture]
    config = config_type(
        vocab_size=len(text),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        **differences,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    text.save_pretrained(path)


class MakeVerifier(Protocol):
    """Type of the fixture :func:`make_verifier`."""

    def __call__(
        self,
        trunk: Path,
        output: Path,
        *,
        heads: Sequence[str] = ...,
        frozen: bool = ...,
        task: Task = ...,
        prompt: Prompt = ...,
        sampler: Sampler = ...,
        dtype: Literal["float32", "bfloat16"] = ...,
    ) -> HeadedTrunk: ...


@pytest.fixture(scope="session")
def make_verifier() -> MakeVerifier:
    """``make_verifier(trunk, output)``: writes an untrained checkpoint, as ``pav.train`` would.

    Heads are random rows with biases on ``trunk`` (a directory), which is also the base policy,
    named "base"; calibrators are the identity, with a small term for surprise where it is read.
    Returns trunk and heads in transformers, to compare with what is served.
    """
    return _make_verifier


def _make_verifier(
    trunk: Path,
    output: Path,
    *,
    heads: Sequence[str] = ("q/base", "orm"),
    frozen: bool = True,
    task: Task = Tape(),  # noqa: B008 (frozen)
    prompt: Prompt = Prompt(),  # noqa: B008
    sampler: Sampler = Sampler(max_length=160),  # noqa: B008
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> HeadedTrunk:
    from pav.train.command import save

    base = PolicyConfig(str(trunk), name="base", prompt=prompt, dtype=dtype)
    policy = load_policy(base, task.step_rule)
    plain = Calibrator(1.0, 0.0, [], [], [], [], [])
    width = 1 + len(SURPRISE)
    surprised = Calibrator(
        1.0, 0.0, [0.0] * width, [1.0] * width, [[0.0] + [0.05] * (width - 1)], [0.5], [1.0]
    )
    model = HeadedTrunk(load_trunk(str(trunk)), len(heads)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.head.weight.normal_(std=0.3, generator=generator)
        model.head.bias.normal_(generator=generator)
    card = VerifierMeta(
        heads=list(heads),
        recipe="pav" if len(heads) > 1 else "orm",
        trunk=str(trunk),
        trunk_digest=weights_digest(str(trunk)),
        frozen=frozen,
        prompt=asdict(prompt),
        dtype=dtype,
        task=task_spec(task),
        task_fingerprint=task.fingerprint,
        policy=asdict(base),
        policy_fingerprint=policy.fingerprint,
        tokenizer=tokenizer_fingerprint(policy.tokenizer),
        sampler=asdict(sampler),
        base_head=heads[0] if len(heads) > 1 else "",
        prover_head=heads[-2] if len(heads) > 1 else "",
        alpha=0.5,
        pick="last" if len(heads) > 1 else "orm",
        calibrators={head: asdict(plain) for head in heads},
        surprise_calibrators={head: asdict(surprised) for head in heads},
    )
    save(card, model, output)
    return model
