"""Learning curve of ``configs/gsm8k_smollm2/lora.yaml``: ``python -m benchmarks.verifier.lora``.

Run first (see the two files; an hour of one core in all)::

    data_gen.rollouts --config configs/gsm8k_smollm2/rollouts.yaml \
        --config configs/gsm8k_smollm2/lora_rollouts.yaml --task.data train.jsonl.gz
    pav.train --config configs/gsm8k_smollm2/lora.yaml

Training loss is weighted to balance right and wrong labels, so a batch with a right one stands out.
Writes ``benchmarks/results/verifier_lora.{json,csv,png}``.
"""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event

from benchmarks.verifier.results import metric, write
from pav.cli.run import run
from pav.core.errors import UserError
from pav.labels.tables import read_labels

COMMAND = "pav.train --config configs/gsm8k_smollm2/lora.yaml; python -m benchmarks.verifier.lora"


@dataclass(frozen=True)
class LoraConfig:
    """Collect the learning curve and the metrics of a training run with ``--logger tensorboard``.

    Args:
        verifier: its checkpoint.
        labels: what it was trained on.
    """

    verifier: str = "runs/gsm8k/lora/pav.ckpt"
    labels: str = "runs/gsm8k/lora/labels"


def lora(config: LoraConfig) -> None:
    """Write the result (see the module)."""
    checkpoint = Path(config.verifier)
    metrics_file = checkpoint.with_suffix(".json")
    logs = sorted(checkpoint.with_suffix(".logs").glob("events*"))
    if not metrics_file.is_file() or not logs:
        raise UserError(
            f"verifier {config.verifier!r} has no metrics or no TensorBoard log beside it; train "
            "it with --logger tensorboard first"
        )
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for log in logs:
        for event in _events(log.read_bytes()):
            for value in event.summary.value:
                curves[value.tag].append((event.step + 1, value.simple_value))
    lines = [
        {"curve": tag, "step": step, "value": value}
        for tag in ("loss", "val_loss", "val_auc")
        for step, value in curves[tag]
    ]
    found = [
        metric(f"SmolLM2 LoRA on GSM8K labels, {line['curve']} after step {line['step']}",
               float(line["value"]), None)
        for line in lines if line["curve"] != "loss"
    ]  # fmt: skip
    for name, values in json.loads(metrics_file.read_text()).items():
        for key in ("auc", "brier", "brier_constant", "calibration_error"):
            if isinstance(values, dict) and values.get(key) is not None:
                found.append(metric(f"SmolLM2 LoRA, {name}: {key}", values[key], None))
    problems = {trace.problem_id for trace in read_labels([config.labels]).traces}
    write("verifier_lora", found, lines, _draw(curves), [0], len(problems), COMMAND)


def _events(data: bytes) -> list[Event]:
    """Events of a TFRecord file: length, its checksum, the event, its checksum, and so on."""
    found, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        found.append(Event.FromString(data[at + 12 : at + 12 + length]))
        at += length + 16
    return found


def _draw(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    losses, auc = figure.subplots(1, 2)
    for tag, label in (("loss", "training, every tenth step"), ("val_loss", "validation")):
        losses.plot(*zip(*curves[tag], strict=True), "o-", label=label)
    losses.set_ylabel("loss")
    losses.legend(frameon=False)
    auc.plot(*zip(*curves["val_auc"], strict=True), "o-", color="C1")
    auc.axhline(0.5, color="0.6", lw=1)
    auc.set_ylim(0, 1)
    auc.set_ylabel("AUC on validation")
    for axes in (losses, auc):
        axes.set_xlabel("optimiser steps")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    run(lora, LoraConfig, "benchmarks.verifier.lora")
