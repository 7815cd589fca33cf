"""How good predicted values are on labels: k right of n rollouts of a prefix.

Axes: N prefixes (in an advantage: steps between two prefixes). ``pav/evaluate/ceilings.py`` says
how good they could be at best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BINS = 10
NAN = float("nan")
NAMES = (
    "mean_q",
    "mean_right",
    "auc",
    "correlation",
    "spearman",
    "brier",
    "brier_constant",
    "reliability",
    "resolution",
    "calibration_error",
)


@dataclass(frozen=True)
class Counts:
    """Labels of prefixes.

    Attributes:
        k_N: right rollouts.
        n_N: rollouts, positive.
        exact_N: whether k/n is the truth itself: the outcome of a solution that is complete.
    """

    k_N: Array
    n_N: Array
    exact_N: NDArray[np.bool_]

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Counts:
        return Counts(self.k_N[rows], self.n_N[rows], self.exact_N[rows])

    def __len__(self) -> int:
        return len(self.n_N)

    @property
    def share_N(self) -> Array:
        """k/n."""
        return self.k_N / self.n_N

    @property
    def telling_N(self) -> NDArray[np.bool_]:
        """Whether the noise of a prefix can be told: two rollouts, or none needed."""
        return self.exact_N | (self.n_N >= 2)


def value_metrics(q_N: Array, counts: Counts) -> dict[str, float]:
    """What is not defined (one class, constant values, no rows) is NaN.

    ``auc`` tells k/n of 0.5 and more from less; ``correlation`` (Pearson) and ``spearman`` are with
    k/n. The others are per rollout y (0 or 1): ``mean_q`` and ``mean_right`` of them, ``brier``,
    the mean of (q - y)^2, ``brier_constant``, that of the mean of y (its "uncertainty"), and
    ``brier = reliability - resolution + brier_constant`` over ten equal bins of q, the spread of q
    inside the bins being put into the resolution (Stephenson et al. 2008); ``calibration_error`` is
    the mean distance between both sides of these bins (as torchmetrics has it, for k that may be a
    fraction).
    """
    if not len(q_N):
        return {"rows": 0} | dict.fromkeys(NAMES, NAN)
    k, n = counts.k_N, counts.n_N
    total = n.sum()
    mean = float(k.sum() / total)
    constant = mean * (1 - mean)
    brier = float((k * (q_N - 1) ** 2 + (n - k) * q_N**2).sum() / total)
    bins = reliability_bins(q_N, counts)
    reliability = float((bins["n"] * (bins["q"] - bins["right"]) ** 2).sum() / total)
    varied = np.ptp(q_N) > 0 and np.ptp(counts.share_N) > 0
    return {
        "rows": len(q_N),
        "mean_q": float((n * q_N).sum() / total),
        "mean_right": mean,
        "auc": auc(q_N, counts.share_N >= 0.5),
        "correlation": _pearson(q_N, counts.share_N) if varied else NAN,
        "spearman": _spearman(q_N, counts.share_N) if varied else NAN,
        "brier": brier,
        "brier_constant": constant,
        "reliability": reliability,
        "resolution": reliability + constant - brier,
        "calibration_error": float((bins["n"] * np.abs(bins["q"] - bins["right"])).sum() / total),
    }


def auc(values: Array, high: NDArray[np.bool_]) -> float:
    """Area under the ROC curve; NaN where one class is missing."""
    if not 0 < high.sum() < len(high):
        return NAN
    # Here and below not at the top: they bring torch, and --help stays fast.
    import torch
    from torchmetrics.functional.classification import binary_auroc

    return float(binary_auroc(torch.tensor(values), torch.tensor(high.astype(int))))


def reliability_bins(q_N: Array, counts: Counts) -> dict[str, Array]:
    """Ten equal bins of q, empty ones left out: rollouts ``n``, mean ``q``, share ``right``."""
    index = np.clip(np.ceil(q_N * BINS) - 1, 0, BINS - 1).astype(int)
    n, q, k = (
        np.asarray(np.bincount(index, weights=w, minlength=BINS), dtype=np.float64)
        for w in (counts.n_N, counts.n_N * q_N, counts.k_N)
    )
    full = n > 0
    return {"n": n[full], "q": q[full] / n[full], "right": k[full] / n[full]}


def advantage_metrics(a_N: Array, before: Counts, after: Counts) -> dict[str, float]:
    """Predicted advantages against the change of k/n over the step.

    ``sign`` is the share of steps with a change whose direction is right (no prediction counts
    half), ``correlation`` is Pearson's.
    """
    change = after.share_N - before.share_N
    moved = change != 0
    agree = np.sign(a_N[moved]) == np.sign(change[moved])
    varied = len(a_N) > 1 and np.ptp(a_N) > 0 and np.ptp(change) > 0
    return {
        "rows": len(a_N),
        "sign": float(np.where(a_N[moved] == 0, 0.5, agree).mean()) if moved.any() else NAN,
        "correlation": _pearson(a_N, change) if varied else NAN,
    }


def _pearson(a_N: Array, b_N: Array) -> float:
    import torch
    from torchmetrics.functional import pearson_corrcoef

    return float(pearson_corrcoef(torch.tensor(a_N, dtype=torch.float64), torch.tensor(b_N)))


def _spearman(a_N: Array, b_N: Array) -> float:
    import torch
    from torchmetrics.functional import spearman_corrcoef

    return float(spearman_corrcoef(torch.tensor(a_N, dtype=torch.float64), torch.tensor(b_N)))
