"""Which labels should calibrators be fitted on?

Run first (a minute), then this (two)::

    data_gen.rollouts --config configs/tape/demo/rollouts.yaml
    OMP_NUM_THREADS=1 python -m benchmarks.verifier.calibrating

Heads of the frozen strong policy on the labels of 2 to 100 training problems: with 2 they see about
as many labels as the trunk has dimensions. Calibrators are fitted on one half of the 60 validation
problems, and on that and the training labels; Brier scores are of the other half, intervals of the
paired difference are 95% bootstraps over its problems.
Writes ``benchmarks/results/verifier_calibrating.{json,csv,png}``.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure as Picture

from benchmarks.verifier.figures import interval, weights
from benchmarks.verifier.fitting import trained_heads
from benchmarks.verifier.results import metric, write
from benchmarks.verifier.setting import HEADS
from pav.cli.run import run
from pav.evaluate.report import first_half
from pav.evaluate.scored_labels import MODES
from pav.labels.examples import pav_examples
from pav.labels.tables import read_labels
from pav.policy.policy import PolicyConfig, load_policy, model_path
from pav.tasks.tape import Tape
from pav.train.config import TrainConfig
from pav.verifier.calibrate import fit_calibrator
from pav.verifier.forward import score
from pav.verifier.trunk import load_trunk

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.verifier.calibrating"
TRUNK = "pav:strong"


@dataclass(frozen=True)
class CalibratingConfig:
    """What calibrators are fitted on.

    Args:
        labels: run of configs/tape/demo/rollouts.yaml.
        problems: training problems that heads see.
    """

    labels: str = "runs/demo/labels"
    problems: list[int] = field(default_factory=lambda: [2, 5, 15, 50, 100])


def calibrating(config: CalibratingConfig) -> None:
    """Measure and write (see the module)."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    labels = read_labels([config.labels])
    policy = load_policy(PolicyConfig(TRUNK), Tape().step_rule)
    cap = int(labels.manifest["sampler"]["max_length"])
    training, validation = (
        pav_examples(labels, split, HEADS, policy, cap) for split in ("train", "validation")
    )
    trunk = load_trunk(model_path(TRUNK), torch.float32)
    ids = sorted({e.problem_id for e in training})
    names = sorted({e.problem_id for e in validation})
    settings = TrainConfig(
        [config.labels], "pav.ckpt", trunk=TRUNK, accelerator="cpu", checkpoint_minutes=1e6
    )
    metrics: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for count in config.problems:
        seen = [e for e in training if e.problem_id in ids[:count]]
        model = trained_heads(settings, trunk, seen, validation, policy, 0)
        known, judged = (score(model, part, policy, "scoring") for part in (seen, validation))
        problem_N = np.array([names.index(e.problem_id) for e in validation])[judged.example_N]
        half_N = np.array([first_half(e.problem_id) for e in validation])[judged.example_N]
        for h, head in enumerate(HEADS):
            told_N = judged.n_NH[:, h] > 0
            held = np.flatnonzero(told_N & ~half_N)
            n = judged.n_NH[held, h].astype(np.float64)
            share = judged.k_NH[held, h] / n
            w = weights(problem_N, held) * n
            for mode in MODES:
                error = {}
                for name in ("validation", "all"):
                    sources = [(judged, told_N & half_N)]
                    if name == "all":
                        sources.append((known, known.n_NH[:, h] > 0))
                    logit, k, of = (
                        np.concatenate([getattr(s, a)[at, h] for s, at in sources])
                        for a in ("logits_NH", "k_NH", "n_NH")
                    )
                    x = np.concatenate([s.surprise_NF[at] for s, at in sources])
                    calibrator = fit_calibrator(logit, x if mode == "surprise" else None, k, of)
                    q = calibrator(judged.logits_NH[held, h], judged.surprise_NF[held])
                    error[name] = (q - share) ** 2
                gain = error["all"] - error["validation"]
                d = float(np.average(gain, weights=n))
                low, high = interval(np.array([np.average(gain, weights=one) for one in w]))
                rows = int((known.n_NH[:, h] > 0).sum())
                line = {"problems": count, "training_labels": rows, "head": head, "mode": mode,
                        **{k: float(np.average(v, weights=n)) for k, v in error.items()},
                        "difference": d, "low": low, "high": high}  # fmt: skip
                lines.append(line)
                what = f"{head}, {mode}, {count} training problems ({rows} labels)"
                metrics.append(metric(f"Brier, fitted on training labels too: {what}", d,
                                      (low, high)))  # fmt: skip
                print(f"{what}: {d:+.4f} [{low:+.4f}, {high:+.4f}]", flush=True)
    count = len({p for p in names if not first_half(p)})
    write("verifier_calibrating", metrics, lines, _draw(lines), [0], count, COMMAND)


def _draw(lines: list[dict[str, Any]]) -> Picture:
    picture = Picture(figsize=(9, 3.2), layout="constrained")
    for axis, mode in zip(picture.subplots(1, 2, sharey=True), MODES, strict=True):
        for i, head in enumerate(HEADS):
            own = [one for one in lines if one["mode"] == mode and one["head"] == head]
            x = np.array([one["problems"] for one in own]) * 1.06 ** (i - 1)
            y, low, high = (np.array([one[c] for one in own])
                            for c in ("difference", "low", "high"))  # fmt: skip
            axis.errorbar(x, y, yerr=[y - low, high - y], fmt="o-", capsize=3, label=head)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks([one["problems"] for one in own], [one["problems"] for one in own])
        axis.minorticks_off()
        axis.set_xlabel("training problems")
        axis.set_title(f"calibrators: {mode}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
        axis.set_ylabel("change of Brier" if mode == MODES[0] else "")
    return picture


if __name__ == "__main__":
    run(calibrating, CalibratingConfig, "benchmarks.verifier.calibrating")
