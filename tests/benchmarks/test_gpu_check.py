"""The check of a GPU can be run where there is none: what it compares holds on a CPU, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_check
from pav.policy.policy import asset


def test_scores_of_the_gpu_check_are_as_expected_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "PROMPTS", 6)
    monkeypatch.setattr(gpu_check, "NEW_TOKENS", 40)
    monkeypatch.setattr(gpu_check, "KV_GIB", 0.05)
    monkeypatch.setattr(gpu_check, "asset", lambda _: tmp_path)  # the random model alone
    gpu_check.run_check("weights", tmp_path)
    rows = json.loads((tmp_path / "weights.json").read_text())
    assert len(rows) == 3
    assert [row["metric"] for row in rows if not gpu_check.met(row)] == []
    gpu_check.run_check("scores", tmp_path)
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [row["metric"] for row in rows if not gpu_check.met(row)] == []
    cached = [row["value"] for row in rows if "were cached" in row["metric"]]
    assert len(cached) == 1 and cached[0] > 0.3


def test_rl_of_the_gpu_check_runs_here_on_the_tape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "rl.yaml"
    monkeypatch.setattr(gpu_check, "RL_CONFIG", config)
    monkeypatch.setattr(gpu_check, "RL_ITERATIONS", 2)
    settings = "batch: 2\ngroup: 2\neval_problems: 0\nproblems: 4\n"
    config.write_text(f"verifier: {tmp_path / 'missing.ckpt'}\n{settings}")
    gpu_check.run_check("rl", tmp_path)
    assert "make demo-gsm8k" in capsys.readouterr().out
    assert json.loads((tmp_path / "rl.json").read_text()) == []
    config.write_text(f"verifier: {asset('verifiers/reference.ckpt')}\n{settings}")
    gpu_check.run_check("rl", tmp_path)
    rows = json.loads((tmp_path / "rl.json").read_text())
    assert [row["metric"] for row in rows if not gpu_check.met(row)] == []
    assert [row["value"] for row in rows if row["metric"].endswith(": iterations")] == [2]
    assert all(row["value"] > 0 for row in rows if "seconds/" in row["metric"])
