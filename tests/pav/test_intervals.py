"""Intervals over problems: each draw's figure is the metric of its rows, and coverage is honest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pav.evaluate.first_error import first_error_metrics
from pav.evaluate.intervals import (
    Draws,
    advantage_intervals,
    auc_interval,
    location_intervals,
    value_intervals,
)
from pav.evaluate.metrics import Counts, advantage_metrics, auc, value_metrics


def made(rng: np.random.Generator, problems: int, rows: int) -> tuple[Any, Any, Any]:
    """(q, counts, problem) of rows with ties."""
    q = rng.integers(0, 8, rows) / 7
    n = rng.integers(1, 4, rows).astype(float)
    k = rng.binomial(n.astype(int), np.clip(q + rng.normal(0, 0.3, rows), 0, 1)).astype(float)
    problem = np.array([f"p{i}" for i in rng.integers(0, problems, rows)])
    return q, Counts(k, n, np.zeros(rows, dtype=bool)), problem


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 60))
@settings(max_examples=25, deadline=None)
def test_figure_of_a_draw_is_the_metric_of_its_rows(seed: int, problems: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    q, counts, problem = made(rng, problems, rows)
    other, after, _ = made(rng, problems, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pav.evaluate.intervals.DRAWS", 1)  # then both ends are that draw's figure
        draws = Draws(problem)
        index = np.repeat(np.arange(rows), draws.weight_RP[0][draws.index_N].astype(int))
        found = value_intervals(q, counts, problem)
        metrics = value_metrics(q[index], counts[index])
        gain = metrics["brier_constant"] - metrics["brier"]
        assert found.pop("brier_gain") == pytest.approx([gain, gain])
        same(found, metrics, "rows")
        high = counts.share_N >= 0.5
        same({"auc": auc_interval(q, high, problem)}, {"auc": auc(q[index], high[index])})
        a = q - other
        same(
            advantage_intervals(a, counts, after, problem),
            advantage_metrics(a[index], counts[index], after[index]),
            "rows",
        )
        q_TP = np.stack([q, q[::-1]], axis=1)
        first = rng.integers(0, 3, rows)
        below = q_TP < 0.5
        hit = np.where(below.any(1), below.argmax(1) + 1, 0) == first
        same(
            location_intervals(hit, first > 0, problem),
            first_error_metrics(q_TP[index], first[index], 0.5),
            "traces",
        )


def same(found: dict[str, list[float]], figures: dict[str, float], but: str = "") -> None:
    told = {name: [value, value] for name, value in figures.items() if name != but}
    assert found.keys() == told.keys()
    for name, value in told.items():
        assert found[name] == pytest.approx(value, abs=1e-4, nan_ok=True), name


def test_rows_of_one_problem_are_no_independent_evidence() -> None:
    rng = np.random.default_rng(0)
    q, counts, _ = made(rng, 1, 400)
    alone = np.array([f"p{i}" for i in range(400)])
    together = np.array([f"p{i // 100}" for i in range(400)])
    right = np.repeat([0.0, 1.0, 0.0, 1.0], 100)
    counts = Counts(right, np.ones(400), counts.exact_N)

    def width(problem: np.ndarray) -> float:
        low, high = value_intervals(q, counts, problem)["mean_right"]
        return high - low

    assert width(together) > 5 * width(alone)


def test_nothing_is_known_of_no_rows() -> None:
    none = np.zeros(0)
    found = value_intervals(none, Counts(none, none, none.astype(bool)), none.astype(str))
    assert all(np.isnan(end) for interval in found.values() for end in interval)
