"""Which engines a search loads is known before the first one: on a GPU they share it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pav.engine.gpu_memory import GIB
from pav.engine.loading import UTILIZATION, EngineConfig
from pav.policy.policy import PolicyConfig, Sampler
from pav.verifier.checkpoint import load_verifier
from search.compare.command import CompareConfig, Method, _expect
from search.run.opening import open_session
from search.run.session import Session

SAMPLER = Sampler(max_length=128)


@pytest.fixture
def made(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, EngineConfig]:  # fmt: skip
    """Settings of the engines that a session on an 80 GiB GPU makes, by directory."""
    model = tiny_model("llama")
    make_verifier(model, tmp_path / "pav.ckpt", sampler=SAMPLER)
    make_verifier(model, tmp_path / "orm.ckpt", heads=("orm",), sampler=SAMPLER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pav.engine.gpu_memory.on_cpu", lambda: False)
    monkeypatch.setattr("pav.engine.gpu_memory.gpu_bytes", lambda: 80 * GIB)
    made: dict[str, EngineConfig] = {}

    def engine(directory: str, dtype: Any, length: int, ids: Any, config: EngineConfig) -> Any:
        made[Path(directory).name] = config
        return SimpleNamespace()

    monkeypatch.setattr("search.run.session.VllmEngine", engine)
    return made


def session_of(config: EngineConfig) -> Session:
    return open_session(load_verifier("pav.ckpt"), None, None, None, config)


def shares(made: dict[str, EngineConfig]) -> list[float | None]:
    return [config.gpu_memory_utilization for config in made.values()]


def test_policy_verifier_and_baseline_share_the_gpu(made: dict[str, EngineConfig]) -> None:
    session = session_of(EngineConfig())
    pav, orm = load_verifier("pav.ckpt"), load_verifier("orm.ckpt")
    for verifier in (pav, orm):
        session.expect_scorer(verifier, "separate", None)
    session.sampling_engine(session.scorer(pav, "separate", True, None))
    assert shares(made) == [pytest.approx(UTILIZATION / 3)] * 2
    # The third one comes when a first search has long been running.
    session.scorer(orm, "separate", True, None)
    assert shares(made) == [pytest.approx(UTILIZATION / 3)] * 3


def test_fused_verifier_has_the_gpu_for_itself(made: dict[str, EngineConfig]) -> None:
    session = session_of(EngineConfig())
    session.sampling_engine(session.scorer(load_verifier("pav.ckpt"), "auto", True, None))
    assert len(made) == 1
    assert shares(made) == [None]  # all that a single engine may take


def test_explicit_setting_reaches_every_engine_unchanged(made: dict[str, EngineConfig]) -> None:
    own = EngineConfig(gpu_memory_utilization=0.3)
    session = session_of(own)
    session.sampling_engine(session.scorer(load_verifier("pav.ckpt"), "separate", True, None))
    assert list(made.values()) == [own, own]


@pytest.mark.parametrize("pick", ["majority", "orm"])
def test_comparison_expects_what_it_loads(
    pick: Any, made: dict[str, EngineConfig], tiny_model: Callable[..., Path]
) -> None:
    methods = [
        Method("beam", verifier="pav.ckpt"),
        Method("q", verifier="pav.ckpt", score="q"),
        Method("best", "best_of_n", "orm.ckpt", pick=pick),
        Method("prover", "best_of_n", pick="majority",
               policy=PolicyConfig(str(tiny_model("qwen2")))),
    ]  # fmt: skip
    verifiers = {name: load_verifier(name) for name in ("pav.ckpt", "orm.ckpt")}
    session = session_of(EngineConfig())
    _expect(CompareConfig(methods, "unused"), session, verifiers)
    kinds = sorted(key.split()[0] for key in session.expected)
    # The policy, that of the majority, the beam's fused verifier and the ORM.
    assert kinds == ["policy", "policy", "verifier", "verifier"]
