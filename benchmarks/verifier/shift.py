"""What selection does to a verifier: ``OMP_NUM_THREADS=1 python -m benchmarks.verifier.shift``.

Run first (each resumes; minutes each)::

    data_gen.rollouts --config configs/tape/verifier/labels_validation.yaml
    search.beam --verifier pav:reference --n 16 --split validation --problems 60 \
        --output runs/verifier/searched
    data_gen.rollouts --config configs/tape/verifier/labels_searched.yaml

The reference verifier's Q on prefixes of sampled solutions and on those of the final sets of a beam
search of 16 places, against the share of right rollouts; problems are those of validation that its
calibrators were not fitted on. ``recalibrated``: the calibrator with surprise fitted again, on the
searched prefixes of the other problems. Intervals are 95% bootstraps over problems.
Writes ``benchmarks/results/verifier_selection_shift.{json,csv,png}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.verifier.figures import interval, resampled
from benchmarks.verifier.results import metric, write
from pav.cli.run import run
from pav.evaluate.command import load_on_device, trunk_policy
from pav.evaluate.metrics import Array, reliability_bins, value_metrics
from pav.evaluate.report import first_half
from pav.evaluate.scored_labels import MODES, ScoredLabels, score_labels
from pav.labels.examples import pav_examples
from pav.labels.tables import read_labels
from pav.tasks.tape import Tape
from pav.verifier.calibrate import Calibrator, fit_calibrator
from pav.verifier.checkpoint import load_verifier
from pav.verifier.forward import score

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.verifier.shift"
HEADS = ("q/base", "q/prover")
SAMPLED, SEARCHED = "sampled", "searched"
CALIBRATORS = (*MODES, "recalibrated")
NAMES = {"calibration_error": "ECE", "brier": "Brier", "auc": "AUC", "over": "mean over-estimate"}


@dataclass(frozen=True)
class ShiftConfig:
    """Calibration on searched prefixes.

    Args:
        verifier: what is judged.
        sampled: label run of solutions that were sampled.
        searched: label run of solutions that a search kept.
        n: width of that search, for the output.
    """

    verifier: str = "pav:reference"
    sampled: str = "runs/verifier/labels_validation"
    searched: str = "runs/verifier/labels_searched"
    n: int = 16


def shift(config: ShiftConfig) -> None:
    """Measure and write (see the module)."""
    verifier = load_verifier(config.verifier)
    card = verifier.card
    path, policy = trunk_policy(verifier, Tape(), None)
    model = load_on_device(verifier, path)
    judged: dict[str, ScoredLabels] = {}
    for name, directory in ((SAMPLED, config.sampled), (SEARCHED, config.searched)):
        labels = read_labels([directory])
        cap = labels.manifest["sampler"]["max_length"]
        examples = pav_examples(labels, "validation", card.heads, policy, cap)
        scored = score(model, examples, policy, name)
        judged[name] = score_labels(card.heads, examples, scored, labels, policy, Tape())
    halves = {name: _half(j) for name, j in judged.items()}
    table: list[dict[str, Any]] = []
    metrics = []
    bins: dict[tuple[str, str, str], dict[str, Array]] = {}
    count = 0
    for head in HEADS:
        h = card.heads.index(head)
        calibrators = {mode: card.calibrator(head, mode == "surprise") for mode in MODES}
        calibrators["recalibrated"] = _recalibrated(judged[SEARCHED], halves[SEARCHED], h)
        for name, j in judged.items():
            counts = j.counts[head]
            _, unique = np.unique(j.keys_N, return_index=True)
            once = np.isin(np.arange(len(j.keys_N)), unique)
            rows = np.flatnonzero(once & ~halves[name] & (counts.n_N > 0) & ~counts.exact_N)
            problem_N = np.array([e.problem_id for e in j.examples])[j.scored.example_N]
            _, number_N = np.unique(problem_N, return_inverse=True)
            count = len(np.unique(number_N[rows]))
            draws = resampled(number_N, rows)
            for calibrator, of in calibrators.items():
                q_N = of(j.scored.logits_NH[:, h], j.scored.surprise_NF)
                bins[head, name, calibrator] = reliability_bins(q_N[rows], counts[rows])

                def figures(at: np.ndarray, q_N: Array = q_N, counts: Any = counts) -> Any:
                    found = value_metrics(q_N[at], counts[at])
                    return found | {"over": found["mean_q"] - found["mean_right"]}

                whole, parts = figures(rows), [figures(at) for at in draws]
                line: dict[str, Any] = {
                    "head": head, "prefixes": name, "calibrator": calibrator, "problems": count,
                    "count": len(rows), "mean Q": whole["mean_q"],
                    "right": whole["mean_right"],
                }  # fmt: skip
                for key, shown in NAMES.items():
                    low, high = interval(np.array([p[key] for p in parts]))
                    line |= {shown: whole[key], f"{shown} low": low, f"{shown} high": high}
                    what = f"{head}, {name} prefixes, {calibrator}: {shown}"
                    metrics.append(metric(what, whole[key], (low, high), n_problems=count))
                table.append(line)
    table = [
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}
        for line in table
    ]
    for line in table:
        print({k: v for k, v in line.items() if not k.endswith(("low", "high"))})
    figure = _draw(bins, f"{config.verifier}, beam of {config.n}, {count} validation problems")
    write("verifier_selection_shift", metrics, table, figure, [0], count, COMMAND)


def _half(judged: ScoredLabels) -> np.ndarray:
    """Rows of the problems that calibrators are fitted on."""
    half = np.array([first_half(e.problem_id) for e in judged.examples])
    rows: np.ndarray = half[judged.scored.example_N]
    return rows


def _recalibrated(judged: ScoredLabels, half_N: np.ndarray, h: int) -> Calibrator:
    scored = judged.scored
    rows = np.flatnonzero(half_N & (scored.n_NH[:, h] > 0))
    return fit_calibrator(
        scored.logits_NH[rows, h], scored.surprise_NF[rows], scored.k_NH[rows, h],
        scored.n_NH[rows, h],
    )  # fmt: skip


def _draw(bins: dict[tuple[str, str, str], dict[str, Array]], title: str) -> Figure:
    figure = Figure(figsize=(3.6 * len(CALIBRATORS), 6.6), layout="constrained")
    axes = figure.subplots(len(HEADS), len(CALIBRATORS), sharex=True, sharey=True)
    for row, head in zip(axes, HEADS, strict=True):
        for axis, calibrator in zip(row, CALIBRATORS, strict=True):
            axis.plot([0, 1], [0, 1], color="0.6", linewidth=1)
            for name, colour in ((SAMPLED, "tab:blue"), (SEARCHED, "tab:red")):
                found = bins[head, name, calibrator]
                size = 6 + 120 * found["n"] / found["n"].sum()
                axis.plot(found["q"], found["right"], color=colour, linewidth=1, label=name)
                axis.scatter(found["q"], found["right"], size, color=colour)
            axis.set_title(f"{head}, {calibrator}", fontsize=9)
        row[0].set_ylabel("share of right rollouts")
        row[0].legend(fontsize=8, title="prefixes", title_fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("predicted Q")
    figure.suptitle(title, fontsize=10)
    return figure


if __name__ == "__main__":
    run(shift, ShiftConfig, "benchmarks.verifier.shift")
