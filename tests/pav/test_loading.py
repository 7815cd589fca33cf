"""What vLLM cannot serve is one line, said before anything is loaded where that can be known."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pav.core.errors import UserError
from pav.engine import loading
from pav.engine.loading import EngineConfig, check_model, first_cause
from pav.engine.vllm import VllmEngine


def changed(model: Path, directory: Path, **settings: Any) -> str:
    """A copy of ``model`` whose config says something else."""
    shutil.copytree(model, directory)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(directory)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and len(said) < 600
    return said


def test_what_vllm_cannot_serve_is_known_before_weights_are_read(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.LLMEngine.from_engine_args", None)  # it would be a TypeError
    llama, small = tiny_model("llama"), EngineConfig(kv_gib=0.02)
    before = dict(os.environ)
    check_model(str(llama), "float32", 160, small)
    assert dict(os.environ) == before

    narrow = changed(llama, tmp_path / "narrow", num_attention_heads=4, head_dim=None)
    said = refused(lambda: check_model(narrow, "float32", 160, small))
    assert "head_dim is 16" in said and "32, 64, 80" in said

    said = refused(lambda: check_model(str(llama), "float32", 5000, small))
    assert "5000" in said and "256" in said and "validation error" not in said

    said = refused(
        lambda: check_model(str(llama), "float32", 160, EngineConfig(tensor_parallel_size=3))
    )
    assert "3" in said

    unknown = changed(llama, tmp_path / "unknown", architectures=["NobodysForCausalLM"])
    assert "NobodysForCausalLM" in refused(lambda: check_model(unknown, "float32", 160, small))


def test_whatever_vllm_raises_at_start_is_one_line_and_a_log(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Weights of another shape: an AssertionError of vLLM's.
    other = changed(tiny_model("llama"), tmp_path / "other", intermediate_size=256)
    said = refused(VllmEngine(other, "float32", 160, config=EngineConfig(kv_gib=0.02)).start)
    assert repr(other) in said and "engine.kv_gib" in said
    log = Path(re.findall(r"traceback: (\S+)\)", said)[0])
    assert log.parent == tmp_path
    assert "Traceback" in log.read_text() and "site-packages/vllm" in log.read_text()
    assert "Traceback" not in capfd.readouterr().err


def test_cause_is_the_first_one_and_the_first_line_that_says_something() -> None:
    def raised(*errors: Exception) -> Exception:
        for error, cause in pairwise(errors):
            error.__cause__ = cause
        return errors[0]

    counted = "1 validation error for ModelConfig\n  Value error, too long. [type=value_error]\n x"
    assert first_cause(ValueError(counted)) == "too long"
    field = "1 validation error for CacheConfig\nblock_size\n  Input is odd [type=odd]\n   For more"
    assert first_cause(ValueError(field)) == "block_size Input is odd"
    assert first_cause(raised(RuntimeError("engine died"), KeyError("layer.7"))) == "'layer.7'"
    assert first_cause(raised(RuntimeError("see above"), AssertionError())) == "AssertionError"
    assert first_cause(OSError("\n\n  no space \nmore")) == "no space"


def test_emulated_dtype_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("pav.engine.loading.is_emulated", lambda dtype: dtype == "bfloat16")
    monkeypatch.setattr("vllm.LLMEngine.from_engine_args", lambda _: None)
    loading._note.cache_clear()
    for _ in range(2):
        loading.load(str(tmp_path), "float32", 160, EngineConfig())
    assert capsys.readouterr().err == ""
    for _ in range(2):
        loading.load(str(tmp_path), "bfloat16", 160, EngineConfig())
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no bfloat16 arithmetic" in said and "float32" in said
