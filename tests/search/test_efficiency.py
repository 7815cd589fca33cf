"""Compute-efficiency ratios: the paper's own figures, honest intervals, investments."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pav.labels.tables import COMPLETIONS, TRACES
from pav.policy.cost import context_of, forward_flops, shape_of
from pav.reward_models.text import RewardModelConfig
from pav.tasks.base import task_spec
from pav.tasks.tape import Tape
from pav.verifier.checkpoint import load_verifier
from search.compare.command import _uncounted
from search.compare.efficiency import Ratio, _ratio, budget_for, ratios
from search.compare.investment import invested_flops
from search.compare.plan import CompareConfig, Investment, Method
from search.compare.results import MethodResult

N = (2, 4, 8, 16, 32, 64, 128)
# PAV paper, Figure 4: Gemma 2 9B, prover Bo4.
ORM_9B = (0.375, 0.409, 0.435, 0.457, 0.458, 0.452, 0.449)
PAV_9B = (0.395, 0.438, 0.475, 0.509, 0.527, 0.539, 0.540)


def curve(
    method: str, accuracies: Sequence[float], *, beam: bool, flops: float = 1.0, rows: int = 1000
) -> list[MethodResult]:
    """Points at N = 2, 4, ...: of 1000 problems so many right; tokens 10 and FLOPs as given."""
    return [
        point(method, n, np.arange(rows)[:, None] < round(a * rows), beam=beam, flops=flops)
        for n, a in zip(N, accuracies, strict=False)
    ]


def point(method: str, n: int, right: Any, *, beam: bool, flops: float = 1.0) -> MethodResult:
    correct_PS = np.asarray(right, dtype=np.float64)
    traces = 3 * n if beam else n
    return MethodResult(
        method, n, None, None, correct_PS, correct_PS, correct_PS, 10.0 * traces, 0.0, 0.0, 0.0,
        0.0, flops * traces, 0.0, 0.0, {"samples": 3} if beam else {"pick": "orm"},
    )  # fmt: skip


def by_axis(found: Sequence[Ratio]) -> dict[str, Ratio]:
    return {r.axis: r for r in found}


def test_ratio_of_the_papers_9b_curves_is_the_papers() -> None:
    found = by_axis(ratios(curve("beam", PAV_9B, beam=True) + curve("orm", ORM_9B, beam=False)))
    assert set(found) == {"traces", "policy tokens", "total FLOPs"}
    # Best-of-N is at its best, .458, at 32; the beam is as good at a width of 5.8: 32 / (3 * 5.8).
    assert found["traces"].baseline_budget == 32
    assert found["traces"].budget == pytest.approx(3 * 5.8, rel=0.02)
    assert found["traces"].ratio == pytest.approx(1.8, abs=0.05)
    assert found["policy tokens"].ratio == pytest.approx(found["traces"].ratio)
    assert not found["traces"].rising


def test_traces_of_a_search_are_its_children_a_step() -> None:
    right = np.ones((2, 1))
    beam = point("beam", 8, right, beam=True)
    # A greedy search with the same children has one place.
    greedy = replace(beam, settings={"samples": 24, "places": 1})
    assert beam.traces == greedy.traces == 24
    assert point("orm", 8, right, beam=False).traces == 8


def test_method_that_is_never_as_good_has_ratio_zero_and_one_better_from_the_start_a_bound() -> (
    None
):
    orm = curve("orm", (0.3, 0.5), beam=False)
    never = by_axis(ratios(curve("beam", (0.2, 0.4), beam=True) + orm))["traces"]
    assert (never.ratio, never.budget, never.high) == (0.0, None, 0.0)
    assert never.rising
    always = by_axis(ratios(curve("beam", (0.6, 0.7), beam=True) + orm))["traces"]
    assert always.at_least and always.budget == 6 and always.ratio == pytest.approx(4 / 6)


def test_without_an_orm_baseline_there_is_no_ratio() -> None:
    assert ratios(curve("beam", PAV_9B, beam=True)) == []


def test_with_a_baseline_that_is_never_right_there_is_no_ratio() -> None:
    never = curve("orm", [0.0, 0.0], beam=False)
    assert ratios(curve("beam", [0.0, 0.5], beam=True) + never) == []


def test_flops_are_left_out_where_they_are_unknown() -> None:
    found = ratios(
        curve("beam", PAV_9B, beam=True, flops=math.nan) + curve("orm", ORM_9B, beam=False)
    )
    assert {r.axis for r in found} == {"traces", "policy tokens"}


def test_interval_holds_the_true_ratio() -> None:
    """Curves with known crossing: the baseline is best at 16 with .5, the beam reaches .5 at 4."""
    rng = np.random.default_rng(0)
    hits, trials = 0, 20
    for _ in range(trials):
        u_P = rng.random(400)
        points = [
            point("beam", n, (rng.random((400, 1)) < a) | (u_P[:, None] < a - 0.2), beam=True)
            for n, a in zip((2, 4, 8, 16), (0.3, 0.45, 0.6, 0.7), strict=True)
        ]
        points += [
            point("orm", n, (rng.random((400, 1)) < a) | (u_P[:, None] < a - 0.2), beam=False)
            for n, a in zip((2, 4, 8, 16), (0.2, 0.3, 0.38, 0.45), strict=True)
        ]
        found = _ratio("traces", points[:4], points[4:])
        # Equal chances at beam 4 and best-of-16.
        hits += found.low <= 16 / 12 <= found.high
    assert hits / trials >= 0.85


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_budget_lies_where_the_curve_first_reaches_the_target(
    accuracies: list[float], target: float
) -> None:
    budgets_K = 2.0 ** np.arange(len(accuracies))
    y_K = np.array(accuracies)
    found = budget_for(target, budgets_K, y_K)
    if max(accuracies) < target:
        assert math.isnan(found)
        return
    first = next(k for k, a in enumerate(accuracies) if a >= target)
    assert found <= budgets_K[first] * (1 + 1e-9)
    assert first == 0 or found >= budgets_K[first - 1] * (1 - 1e-9)


def test_investment_is_shared_out_over_the_problems_and_breaks_even() -> None:
    points = curve("beam", (0.5, 0.6), beam=True, rows=100) + curve(
        "orm", (0.1, 0.2, 0.3, 0.5), beam=False, rows=100
    )
    plain = by_axis(ratios(points))["total FLOPs"]
    assert (plain.baseline_budget, plain.budget, plain.invested) == (16.0, 6.0, None)
    found = by_axis(ratios(points, {"beam": 5000.0, "orm": 1000.0}))
    assert found["traces"].invested is None
    flops = found["total FLOPs"]
    assert flops.break_even_problems == pytest.approx(4000 / 10)
    assert flops.ratio_with_investment == pytest.approx((1000 + 1600) / (5000 + 600))
    # What is unknown is not taken for free.
    assert by_axis(ratios(points, {"beam": 5000.0}))["total FLOPs"].invested is None
    cheaper = by_axis(ratios(points, {"beam": 500.0, "orm": 1000.0}))["total FLOPs"]
    assert cheaper.break_even_problems == 0.0
    # A method that costs more to make and more to run never breaks even.
    worse = curve("beam", (0.5, 0.6), beam=True, flops=9.0, rows=100) + points[2:]
    assert (
        by_axis(ratios(worse, {"beam": 5000.0, "orm": 0.0}))["total FLOPs"].break_even_problems
        is None
    )


def test_verifiers_whose_cost_is_unknown_are_named() -> None:
    points = curve("beam", (0.5, 0.6), beam=True) + curve("orm", (0.1, 0.2), beam=False)
    methods = [
        Method("beam", verifier="pav:reference"),
        Method("orm", "best_of_n", reward_model=RewardModelConfig("some/model")),
        Method("vote", "best_of_n", pick="majority"),
    ]
    config = CompareConfig(methods, "unused")
    assert _uncounted(config, ratios(points), {}) == ["pav:reference", "some/model"]
    assert _uncounted(config, ratios(points), {"beam": 1.0, "vote": 0.0}) == ["some/model"]
    assert _uncounted(config, [], {}) == []


def test_investment_is_counted_from_the_label_tables(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    make_verifier(model, tmp_path / "pav.ckpt")
    make_verifier(model, tmp_path / "orm.ckpt", heads=("orm",), frozen=False)
    task = Tape()
    for folder in ("traces", "completions"):
        (tmp_path / "labels" / folder).mkdir(parents=True)
    (tmp_path / "labels" / "manifest.json").write_text(json.dumps(
        {"task": task.fingerprint, "task_spec": task_spec(task), "tokenizer": "t", "sampler": {},
         "policy_fingerprint": "f"}
    ))  # fmt: skip
    trace = {"trace_id": "t", "problem_id": "p", "question": "12+3", "gold": "15", "split": "train",
             "policy": "base", "seed_index": 0, "ids": [3] * 10, "step_ends": [6, 10],
             "answer": "15", "correct": True, "truncated": False}  # fmt: skip
    rollout = {"prefix_key": "k", "problem_id": "p", "policy": "base", "index": 0,
               "prefix_ids": [3] * 6, "ids": [3] * 4, "answer": "15", "correct": True,
               "truncated": False}  # fmt: skip
    for folder, schema, row in (("traces", TRACES, trace), ("completions", COMPLETIONS, rollout)):
        table = pa.Table.from_pylist([row], schema=schema)
        pq.write_table(table, tmp_path / "labels" / folder / "part.parquet")
    shape = shape_of(str(model))
    # BOS, "12+3" and a newline are the prompt: 6 tokens; the last sampled one is not computed.
    whole = forward_flops(shape, 15, context_of(0, 15), 10)
    finished = forward_flops(shape, 15, context_of(0, 15), 4)

    def spent(name: str, **settings: Any) -> float:
        verifier = load_verifier(str(tmp_path / name))
        made = Investment(str(tmp_path / name), [str(tmp_path / "labels")], **settings)
        return invested_flops(made, verifier, None)

    # Labels, and one pass of the frozen trunk over the seed solutions.
    assert spent("pav.ckpt") == whole + finished + whole
    # An ORM's own labels are whole solutions; a trained trunk costs three passes an epoch.
    assert spent("orm.ckpt", rollouts=False, epochs=2.0) == whole + 6 * whole
    assert spent("orm.ckpt", epochs=1.0) == whole + finished + 3 * (whole + finished)
