"""Surprise on a real model: here a small one, whose labels follow a rule that heads can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.verifier import gsm8k
from pav.policy.policy import model_path
from tests.pav.label_runs import write_labels


def test_heads_are_judged_on_problems_that_they_did_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = write_labels(tmp_path / "labels", Path(model_path("pav:base")), policies=("base",))
    written: list[Any] = []
    monkeypatch.setattr(gsm8k, "write", lambda *given: written.append(given))
    gsm8k.gsm8k(gsm8k.Gsm8kConfig(labels))
    ((name, metrics, table, _, _, problems, _),) = written
    assert name == "verifier_gsm8k" and problems == 100 and len(table) == len(metrics)
    found = {m["metric"].split(": ")[1]: m["value"] for m in metrics if "q/base" in m["metric"]}
    assert found["AUC, calibrator plain"] > 0.8
    assert found["AUC, gain of surprise"] == pytest.approx(
        found["AUC, calibrator surprise"] - found["AUC, calibrator plain"]
    )
