"""Adapters on SmolLM2-135M with GSM8K labels: ``python -m benchmarks.verifier.gsm8k``.

Run first (each resumes)::

    pav.convert --output runs/gsm8k/smollm2
    data_gen.rollouts --config configs/gsm8k_smollm2/rollouts.yaml \
        --config configs/gsm8k_smollm2/lora_rollouts.yaml --task.data train.jsonl.gz
    pav.train --config configs/gsm8k_smollm2/lora.yaml

Reads the learning curve (``pav.logs``) and the metrics (``pav.json``) beside the checkpoint.
Writes ``benchmarks/results/gsm8k_lora.{json,csv,png}``.
"""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.verifier.results import metric, write
from pav.cli import run
from pav.errors import UserError
from pav.judged import MODES

COMMAND = "pav.train --config configs/gsm8k_smollm2/lora.yaml"
KEYS = ("auc", "spearman", "brier", "brier_constant", "calibration_error")
Curves = dict[str, list[tuple[int, float, float]]]


@dataclass(frozen=True)
class GsmConfig:
    """Collect a training run.

    Args:
        verifier: the checkpoint.
    """

    verifier: str = "runs/gsm8k/lora/pav.ckpt"


def collect(config: GsmConfig) -> None:
    """Write curve and metrics."""
    path = Path(config.verifier)
    files = sorted(path.with_suffix(".logs").rglob("events.out.tfevents.*"))
    if not files or not path.exists():
        raise UserError(f"verifier {config.verifier!r} has no logs beside it; run: {COMMAND}")
    curves: Curves = defaultdict(list)
    for file in files:
        for tag, step, time, value in scalars(file):
            curves[tag].append((step, time, value))
    first = min(time for points in curves.values() for _, time, _ in points)
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    problems = found["data"]["problems"]
    metrics, table = [], []
    for head in [name.removesuffix("/plain") for name in found if name.endswith("/plain")]:
        for mode in MODES:
            for key in KEYS:
                if (value := found[f"{head}/{mode}"][key]) is not None:
                    metrics.append(metric(f"{head}, {mode}: {key}", value))
            if (a := found["advantage"].get(f"{head}/{mode}")) and a["correlation"] is not None:
                metrics.append(metric(f"{head}, {mode}: A corr", a["correlation"]))
    for tag, points in curves.items():
        table += [
            {"curve": tag, "step": step, "minutes": round((time - first) / 60, 2), "value": value}
            for step, time, value in points
        ]
    minutes = max(line["minutes"] for line in table)
    metrics.append(metric("training, minutes from the first to the last logged step", minutes))
    n = problems.get("validation", 0)
    write("gsm8k_lora", metrics, table, _draw(curves, found), [0], n, COMMAND)


def scalars(file: Path) -> list[tuple[str, int, float, float]]:
    """(tag, step, time, value) of a TensorBoard file: records of length, CRC, event, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found, data, at = [], file.read_bytes(), 0
    while at + 12 <= len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.append((value.tag, event.step, event.wall_time, value.simple_value))
    return found


def _draw(curves: Curves, found: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for tag, style in (("loss", "o-"), ("val_loss", "s--")):
        if tag in curves:
            steps, _, values = zip(*curves[tag], strict=True)
            left.plot(steps, values, style, markersize=4, label=tag.replace("_", " "))
    left.set(xlabel="optimiser step", ylabel="class-weighted BCE", title="learning curve")
    left.legend(fontsize=8)
    right.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for name, m in found.items():
        if isinstance(m, dict) and m.get("bins", {}).get("n") and name.endswith("/surprise"):
            label = f"{name.removesuffix('/surprise')}: AUC {m['auc'] or float('nan'):.2f}"
            right.plot(m["bins"]["q"], m["bins"]["right"], "o-", markersize=4, label=label)
    right.set(xlabel="predicted Q", ylabel="share of right rollouts", title="held-out validation")
    right.legend(fontsize=8)
    figure.suptitle("SmolLM2-135M-Instruct, LoRA, GSM8K labels", fontsize=10)
    return figure


if __name__ == "__main__":
    run(collect, GsmConfig, "benchmarks.verifier.gsm8k")
