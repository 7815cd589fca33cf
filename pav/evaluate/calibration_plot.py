"""The picture of a verifier's calibration: predicted Q against the share of right rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def draw(metrics: dict[str, Any], path: Path, title: str = "") -> bool:
    """Write reliability diagrams and figures by step to ``path`` (PNG).

    Args:
        metrics: what :func:`pav.evaluate.suite.measure` found.
        path: of the picture.
        title: above it.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib
    from matplotlib.figure import Figure

    heads = [
        name.removesuffix("/surprise")
        for name, m in metrics.items()
        if name.endswith("/surprise") and isinstance(m, dict) and m.get("bins")
    ]
    if not heads:
        return False
    # Names hold dollar signs; they are no formulas.
    matplotlib.rcParams["text.parse_math"] = False
    figure = Figure(figsize=(4.2 * len(heads) + 0.4, 7.6), layout="constrained")
    axes = figure.subplots(2, len(heads), squeeze=False)
    for (above, below), head in zip(axes.T, heads, strict=True):
        _reliability(above, head, metrics)
        _steps(below, head, metrics)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=90)
    return True


def _reliability(axis: Any, head: str, metrics: dict[str, Any]) -> None:
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for mode, colour in (("plain", "tab:orange"), ("surprise", "tab:blue")):
        m = metrics[f"{head}/{mode}"]
        n, q, right = (np.array(m["bins"][key]) for key in ("n", "q", "right"))
        # Of the share of right rollouts; those of a prefix are not independent of each other.
        low, high = np.array([wilson(*pair) for pair in zip(right, n, strict=True)]).T
        label = f"{mode}: Brier {m['brier']:.3f}, ECE {m['calibration_error']:.3f}"
        error = np.maximum([right - low, high - right], 0)
        axis.errorbar(q, right, error, fmt="o-", color=colour, markersize=4, label=label)
    share = np.array(metrics[f"{head}/surprise"]["bins"]["n"], dtype=float)
    share /= share.sum()
    q = metrics[f"{head}/surprise"]["bins"]["q"]
    axis.bar(q, 0.25 * share / share.max(), 0.06, color="tab:blue", alpha=0.15)
    axis.set(title=head, xlabel="predicted Q", ylabel="share of right rollouts")
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.legend(fontsize=8, loc="upper left")


def _steps(axis: Any, head: str, metrics: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    found = metrics[f"{head}/surprise"]["steps"]
    if not found["step"]:
        axis.axis("off")
        return
    axis.plot(found["step"], found["auc"], "o-", color="tab:blue", markersize=4, label="AUC")
    ceiling = metrics.get(f"{head}/ceiling", {}).get("steps", {"step": []})
    if ceiling["step"] and not np.isnan(np.array(ceiling["auc"], dtype=float)).all():
        axis.plot(ceiling["step"], ceiling["auc"], "--", color="0.4", label="AUC, knowing Q")
    axis.plot(
        found["step"], found["calibration_error"], "s-", color="tab:red", markersize=4, label="ECE"
    )
    axis.set(xlabel="step", ylabel="AUC, ECE", ylim=(-0.02, 1.02))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8)


def wilson(share: float, n: float) -> tuple[float, float]:
    """95% interval of a share of ``n`` trials: within 0 and 1, and wider than nothing at them."""
    from scipy.stats import binomtest

    interval = binomtest(round(share * n), round(n)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
