"""How engines share a GPU; no GPU is needed to know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from data_gen import engines
from data_gen.config import RolloutsConfig
from pav.core.errors import UserError
from pav.engine import gpu_memory, remote
from pav.engine.gpu_memory import GIB, Planned, gpu_shares, planned, share_gpu
from pav.engine.loading import UTILIZATION, EngineConfig, engine_arguments
from pav.engine.remote import Model, Models
from pav.policy.policy import PolicyConfig, load_policy
from pav.tasks.tape import Tape

ENGINES = st.lists(
    st.builds(
        Planned,
        st.just("model"),
        st.integers(1 << 20, 20 * GIB),
        st.integers(1 << 10, 1 << 19),
    ),
    min_size=1,
    max_size=4,
)


@given(ENGINES, st.integers(8 * GIB, 140 * GIB), st.integers(16, 8192))
def test_shares_fit_the_gpu_and_leave_every_engine_equally_many_tokens(
    engines: list[Planned], total: int, max_length: int
) -> None:
    workspace = min(gpu_memory.WORKSPACE, int(total * gpu_memory.WORKSPACE_SHARE))
    needed = sum(e.weights + workspace + e.kv_token * max_length for e in engines)
    if needed > total * UTILIZATION * (1 + 1e-9):
        with pytest.raises(UserError, match=r"engine\.gpu_memory_utilization"):
            gpu_shares(engines, total, max_length)
        return
    if needed > total * UTILIZATION * (1 - 1e-9):
        return
    shares = gpu_shares(engines, total, max_length)
    assert sum(shares) == pytest.approx(UTILIZATION)
    tokens = [
        (share * total - e.weights - workspace) / e.kv_token
        for share, e in zip(shares, engines, strict=True)
    ]
    assert min(tokens) == pytest.approx(max(tokens), rel=1e-6)
    assert min(tokens) >= max_length * (1 - 1e-6)


def test_one_engine_gets_what_it_got_alone() -> None:
    assert gpu_shares([Planned("7B", 14 * GIB, 57_344)], 80 * GIB, 1024) == [
        pytest.approx(UTILIZATION)
    ]


def test_models_that_do_not_fit_are_named_with_what_to_set() -> None:
    engines = [Planned("policy-7B", 14 * GIB, 57_344), Planned("trunk-7B", 14 * GIB, 57_344)]
    with pytest.raises(UserError) as refused:
        gpu_shares(engines, 24 * GIB, 1024)
    said = str(refused.value)
    assert "\n" not in said
    for part in ("24.0 GiB", "policy-7B 14.0", "trunk-7B 14.0", "engine.kv_gib",
                 "engine.gpu_memory_utilization", "engine.tensor_parallel_size"):  # fmt: skip
        assert part in said


@pytest.mark.parametrize("architecture", ["llama", "qwen3-tied", "gemma2"])
def test_planned_sizes_are_those_of_the_model(
    architecture: str, tiny_model: Callable[..., Path]
) -> None:
    path = tiny_model(architecture)
    found = planned(str(path), "float32", 1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    assert found.weights == 4 * sum(p.numel() for p in model.parameters())
    # Two layers of one key head of 32 and one value head of 32.
    assert found.kv_token == 4 * 2 * (32 + 32)
    half = planned(str(path), "bfloat16", 2)
    assert (half.weights, half.kv_token) == (found.weights // 4, found.kv_token // 4)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GiB, as far as planning goes."""
    monkeypatch.setattr("pav.engine.gpu_memory.on_cpu", lambda: False)
    monkeypatch.setattr("pav.engine.gpu_memory.gpu_bytes", lambda: 80 * GIB)


def test_explicit_setting_wins(on_gpu: None, tiny_model: Callable[..., Path]) -> None:
    models: Any = [(str(tiny_model("llama")), "float32")] * 2
    for own in (EngineConfig(kv_gib=2.0), EngineConfig(gpu_memory_utilization=0.3)):
        assert share_gpu(own, models, 160) == [own, own]
    shared = share_gpu(EngineConfig(), models, 160)
    assert [s.gpu_memory_utilization for s in shared] == [pytest.approx(UTILIZATION / 2)] * 2
    beside = [Planned("reward model", 40 * GIB, 0)]
    (alone,) = share_gpu(EngineConfig(), models[:1], 160, beside)
    assert alone.gpu_memory_utilization < 0.4


def test_cpu_is_not_shared_out(tiny_model: Callable[..., Path]) -> None:
    models: Any = [(str(tiny_model("llama")), "float32")] * 2
    assert share_gpu(EngineConfig(), models, 160) == [EngineConfig()] * 2


def test_vllm_is_told_the_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pav.engine.loading.on_cpu", lambda: False)

    def told(**settings: Any) -> tuple[float, int | None]:
        arguments = engine_arguments(str(tmp_path), "float32", 160, EngineConfig(**settings))
        return arguments.gpu_memory_utilization, arguments.kv_cache_memory_bytes

    assert told() == (UTILIZATION, None)
    assert told(gpu_memory_utilization=0.4) == (0.4, None)
    assert told(kv_gib=2.0) == (0.05, 2 * GIB)


def test_engine_that_is_trained_can_sleep_on_a_gpu_and_no_other_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def told(trained: bool) -> bool:
        asked = engine_arguments(str(tmp_path), "float32", 160, EngineConfig(), trained)
        return bool(asked.enable_sleep_mode)

    assert not told(True)
    monkeypatch.setattr("pav.engine.loading.on_cpu", lambda: False)
    assert told(True) and not told(False)


def test_engines_of_a_label_run_get_shares_here_and_in_workers(
    on_gpu: None, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tiny_model("llama"))
    made: list[float | None] = []

    def engine(*_: Any, config: EngineConfig, **__: Any) -> Any:
        made.append(config.gpu_memory_utilization)
        if len(made) == 2:
            raise UserError("enough")  # a worker that serves would never end
        return SimpleNamespace(start=lambda: None, shutdown=lambda: None)

    monkeypatch.setattr(engines, "VllmEngine", engine)
    monkeypatch.setattr(remote, "VllmEngine", engine)
    config = RolloutsConfig(
        output="unused",
        task=Tape(),
        policy=PolicyConfig(path, name="base"),
        prover=PolicyConfig(path, name="prover"),
    )
    loaded = [load_policy(p, config.task.step_rule) for p in config.policies]
    with pytest.raises(UserError, match="enough"), engines.loaded(config, loaded):
        pass
    here, made[:] = made.copy(), []
    models = [Model(p.path, "float32", 160, EngineConfig()) for p in loaded]
    with pytest.raises(UserError, match="enough"):
        Models(models).load()
    remote._engine.cache_clear()
    assert here == made == [pytest.approx(UTILIZATION / 2)] * 2
