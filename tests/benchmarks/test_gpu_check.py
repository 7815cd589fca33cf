"""The check of a GPU can be run where there is none: what it compares holds on a CPU, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_check


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
