"""The learning curve of a training run, read back from its TensorBoard log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.verifier import lora
from pav.core.errors import UserError
from pav.train.command import train
from pav.train.config import TrainConfig
from tests.pav.label_runs import write_labels


def test_learning_curve_is_that_of_the_run(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = tiny_model("llama")
    labels = write_labels(tmp_path / "labels", trunk, policies=("base",))
    output = str(tmp_path / "pav.ckpt")
    with pytest.raises(UserError, match="train it with --logger tensorboard first"):
        lora.lora(lora.LoraConfig(output, labels))
    train(
        TrainConfig([labels], output, trunk=str(trunk), trunk_mode="lora", max_epochs=2,
                    tokens_per_batch=512, accelerator="cpu", logger="tensorboard")
    )  # fmt: skip
    written: list[Any] = []
    monkeypatch.setattr(lora, "write", lambda *given: written.append(given))
    lora.lora(lora.LoraConfig(output, labels))
    ((name, metrics, lines, figure, _, problems, _),) = written
    assert name == "verifier_lora" and problems > 50 and isinstance(figure, Figure)
    steps = {tag: [line["step"] for line in lines if line["curve"] == tag]
             for tag in ("loss", "val_loss", "val_auc")}  # fmt: skip
    # One validation an epoch; the loss every tenth step.
    assert len(steps["val_loss"]) == len(steps["val_auc"]) == 2
    assert steps["loss"] and all(step % 10 == 0 for step in steps["loss"])
    assert steps["val_loss"][1] == 2 * steps["val_loss"][0] > steps["loss"][-1] // 10
    found = {m["metric"]: m["value"] for m in metrics}
    assert all(0 < v < 5 for k, v in found.items() if "val_loss" in k)
    aucs = [
        v for k, v in found.items() if k.startswith("SmolLM2 LoRA, q/base") and k.endswith(": auc")
    ]
    assert aucs and all(0 <= v <= 1 for v in aucs)
