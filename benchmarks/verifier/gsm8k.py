"""Surprise on a real model: ``OMP_NUM_THREADS=1 python -m benchmarks.verifier.gsm8k``.

Run first (see ``configs/gsm8k_smollm2/lora_rollouts.yaml``; ten minutes)::

    data_gen.rollouts --config configs/gsm8k_smollm2/rollouts.yaml \
        --config configs/gsm8k_smollm2/lora_rollouts.yaml --task.data train.jsonl.gz

SmolLM2-135M-Instruct under its own labels. Few solutions are right, so all problems are judged:
heads are trained on five eighths of them, stopped and calibrated on two, and judged on the eighth
that is left, eight times over. Pairs of an AUC are of one eighth, a prefix counts once, intervals
are bootstraps over problems. Single surprise features, as they are, fit nothing.
Writes ``benchmarks/results/verifier_gsm8k.{json,csv,png}``.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure as Picture

from benchmarks.verifier.figures import interval, weights, within
from benchmarks.verifier.fitting import dataset
from benchmarks.verifier.results import metric, write
from pav.cli.run import run
from pav.evaluate.scored_labels import MODES
from pav.labels.examples import Example, pav_examples
from pav.labels.tables import read_labels
from pav.policy.policy import Policy, PolicyConfig, load_policy, model_path
from pav.train.config import TrainConfig
from pav.train.fit import fit, label_data
from pav.verifier.calibrate import SURPRISE, fit_calibrator
from pav.verifier.checkpoint import prompt_from, resolve_task
from pav.verifier.forward import score
from pav.verifier.trunk import HeadedTrunk, load_trunk

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.verifier.gsm8k"
PARTS = 8
CALIBRATED = (6, 7)  # how many parts after the one that is judged; those between are trained on


@dataclass(frozen=True)
class Gsm8kConfig:
    """Surprise on a real model.

    Args:
        labels: label run.
        seed: of heads.
    """

    labels: str = "runs/gsm8k/lora/labels"
    seed: int = 0


def gsm8k(config: Gsm8kConfig) -> None:
    """AUC with and without surprise (see the module)."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    labels = read_labels([config.labels])
    plain = dict(labels.manifest["policy"])
    asked = PolicyConfig(**{**plain, "prompt": prompt_from(plain["prompt"])})
    task = resolve_task(labels.manifest["task_spec"], None, f"labels {config.labels!r}")
    policy = load_policy(asked, task.step_rule)
    heads = [f"q/{asked.label}", "orm"]
    cap = int(labels.manifest["sampler"]["max_length"])
    splits = ("train", "validation")
    examples = [e for s in splits for e in pav_examples(labels, s, heads, policy, cap)]
    model = HeadedTrunk(load_trunk(model_path(asked.model)), len(heads))
    scored = score(model, examples, policy, "encoding")
    order = np.lexsort((scored.step_N, scored.example_N))
    hidden_ND = scored.hidden_ND[torch.as_tensor(order)].clone()
    features_NF, k_NH, n_NH = (a[order] for a in (scored.surprise_NF, scored.k_NH, scored.n_NH))
    step_N, example_N = scored.step_N[order], scored.example_N[order]
    problems = {p: i for i, p in enumerate(dict.fromkeys(e.problem_id for e in examples))}
    problem_N = np.array([problems[e.problem_id] for e in examples])[example_N]
    part_N = problem_N % PARTS
    share_N = np.concatenate([e.share_P1[:, 0] for e in examples]).astype(np.float64)

    q_MHN = np.zeros((len(MODES), len(heads), len(order)))
    for part in range(PARTS):
        after_N = (part_N - part) % PARTS
        fitted_N = np.isin(after_N, CALIBRATED)
        train_N = (after_N > 0) & ~fitted_N
        split = [
            ([e for i, e in enumerate(examples) if rows[example_N == i].all()], hidden_ND[rows])
            for rows in (train_N, fitted_N)
        ]
        _fit_heads(config, asked.model, model, policy, *split)
        with torch.inference_mode():
            logits_NH = model.head_logits(hidden_ND).numpy()
        for h in range(len(heads)):
            rows = fitted_N & (n_NH[:, h] > 0)
            for m, mode in enumerate(MODES):
                x = features_NF if mode == "surprise" else None
                calibrator = fit_calibrator(
                    logits_NH[rows, h], None if x is None else x[rows], k_NH[rows, h], n_NH[rows, h]
                )
                q_MHN[m, h, part_N == part] = calibrator(logits_NH[:, h], x)[part_N == part]

    last_N = step_N == np.array([len(e.ends) for e in examples])[example_N]
    metrics: list[dict[str, Any]] = []
    for h, head in enumerate(heads):
        # Step 0 has no surprise; the outcome of a whole solution is the ORM's label.
        told_N = (n_NH[:, h] > 0) & (last_N if head == "orm" else (step_N > 0) & ~last_N)
        rows = np.flatnonzero(told_N)
        high_N = k_NH[:, h] > 0
        auc = within(head, rows, high_N, part_N).of
        once = share_N[rows]
        w = weights(problem_N, rows) * once
        what = f"{head}, {(high_N[rows] * once).sum():.0f} right of {once.sum():.0f}"
        values = {f"calibrator {m}": q_MHN[i, h] for i, m in enumerate(MODES)}
        values |= {f"feature {name} alone": features_NF[:, f] for f, name in enumerate(SURPRISE)}
        spread = {name: np.array([auc(v, one) for one in w]) for name, v in values.items()}
        found = {name: auc(v, once) for name, v in values.items()}
        gain = [f"calibrator {m}" for m in ("surprise", "plain")]
        found["gain of surprise"] = found[gain[0]] - found[gain[1]]
        spread["gain of surprise"] = spread[gain[0]] - spread[gain[1]]
        for name, value in found.items():
            metrics.append(metric(f"{what}: AUC, {name}", value, interval(spread[name])))
    lines = [
        {"metric": x["metric"], "value": x["value"], "low": x["ci95"][0], "high": x["ci95"][1]}
        for x in metrics
    ]
    for line in lines:
        print("{metric}: {value:.2f} [{low:.2f}, {high:.2f}]".format(**line))
    write("verifier_gsm8k", metrics, lines, _draw(lines), [config.seed], len(problems), COMMAND)


def _fit_heads(
    config: Gsm8kConfig,
    trunk: str,
    model: HeadedTrunk,
    policy: Policy,
    train: tuple[list[Example], torch.Tensor],
    early: tuple[list[Example], torch.Tensor],
) -> None:
    """New heads of ``model``, as ``pav.train`` fits them on a frozen trunk."""
    with tempfile.TemporaryDirectory() as directory:
        settings = TrainConfig(
            [config.labels], f"{directory}/pav.ckpt", trunk=trunk, seed=config.seed,
            accelerator="cpu", checkpoint_minutes=1e6,
        )  # fmt: skip
        L.seed_everything(config.seed, verbose=False)
        for parameter in model.head.parameters():
            torch.nn.init.zeros_(parameter)
        data = label_data(settings, model, train[0], early[0], policy)
        data.cached = {
            "train": dataset(train[1], train[0]),
            "validation": dataset(early[1], early[0]),
        }
        state = fit(settings, model, data, Path(directory) / "run")
    if state is None:
        raise RuntimeError("nothing was trained")
    model.load_state_dict(state, strict=False)


def _draw(lines: list[dict[str, Any]]) -> Picture:
    picture = Picture(figsize=(8, 0.25 * len(lines) + 1), layout="constrained")
    axis = picture.subplots()
    y = -np.arange(len(lines))
    x, low, high = (np.array([line[c] for line in lines]) for c in ("value", "low", "high"))
    axis.errorbar(x, y, xerr=[x - low, high - x], fmt="o", markersize=4)
    axis.set_yticks(y, [line["metric"] for line in lines], fontsize=7)
    axis.axvline(0.5, color="0.6", linewidth=0.8)
    axis.axvline(0.0, color="0.8", linewidth=0.8)
    axis.set_xlabel("AUC (or difference of two), 95% bootstrap over problems")
    return picture


if __name__ == "__main__":
    run(gsm8k, Gsm8kConfig, "benchmarks.verifier.gsm8k")
