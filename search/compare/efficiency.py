"""How much less compute a method needs to be as good as best-of-N by the ORM at its best.

The paper's figure is N_ORM / (C * N_PAV): N_ORM is the smallest N at which best-of-N is at its
best, N_PAV the width, interpolated, at which the beam is as good. Scoring is not paid in it, so
the same ratio is given in policy tokens and in forward FLOPs of policy and verifier, and the latter
also with what the verifiers cost to make.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pav.core.files import json_text
from pav.core.statistics import resampled
from pav.core.tables import print_table
from search.compare.results import MethodResult, baseline

RISING = "with more samples the baseline might be better still"
RESAMPLES = 2000
AXES = {
    "traces": lambda p: float(p.traces),
    "policy tokens": lambda p: p.policy_tokens,
    "total FLOPs": lambda p: p.flops,
}


@dataclass(frozen=True)
class Ratio:
    """Compute-efficiency ratio of one method on one axis.

    Attributes:
        method, baseline, axis: what is compared; budgets are per problem, in units of ``axis``.
        baseline_budget: where the baseline is first at its best.
        target: its accuracy there.
        budget: where the method is as good, interpolated between its points; None if nowhere.
        ratio: ``baseline_budget / budget``; 0 if nowhere.
        low, high: 95% bootstrap interval over problems.
        at_least: the method is that good at its smallest budget already: the ratio is a lower
            bound.
        rising: the baseline is best at its largest budget: with more samples it might be better.
        invested, baseline_invested: FLOPs that went into the verifiers; None where not asked for.
        ratio_with_investment: with them shared out over the problems compared here.
        break_even_problems: from how many problems on the method is cheaper; None if never.
    """

    method: str
    baseline: str
    axis: str
    baseline_budget: float
    target: float
    budget: float | None
    ratio: float
    low: float
    high: float
    at_least: bool
    rising: bool
    invested: float | None = None
    baseline_invested: float | None = None
    ratio_with_investment: float | None = None
    break_even_problems: float | None = None


def budget_for(target: float, budgets_K: NDArray[np.float64], y_K: NDArray[np.float64]) -> float:
    """Smallest budget at which a curve reaches ``target``; NaN if it never does.

    Args:
        target: accuracy to reach.
        budgets_K: rising budgets of the curve's points.
        y_K: accuracies there; linear in between over the logarithm of the budget.
    """
    reached = np.flatnonzero(y_K >= target)
    if not len(reached):
        return math.nan
    k = int(reached[0])
    if k == 0:
        return float(budgets_K[0])
    share = (target - y_K[k - 1]) / (y_K[k] - y_K[k - 1])
    logs = np.log(budgets_K)
    return float(np.exp(logs[k - 1] + share * (logs[k] - logs[k - 1])))


def ratios(
    results: Sequence[MethodResult], invested: dict[str, float] | None = None
) -> list[Ratio]:
    """Ratios of every method on the base policy against the ORM baseline, on every axis.

    Args:
        results: of a comparison; without an ORM baseline that is ever right there is no ratio.
        invested: method -> FLOPs that went into its verifier; those it lacks are unknown.
    """
    name = baseline(results)
    if name is None or not any(p.correct_PS.any() for p in results if p.method == name):
        return []
    out = []
    for method in dict.fromkeys(p.method for p in results if p.base and p.method != name):
        for axis, of in AXES.items():
            own, other = (
                sorted((p for p in results if p.method == m), key=of) for m in (method, name)
            )
            if any(math.isnan(of(p)) for p in own + other):
                continue
            ratio = _ratio(axis, own, other)
            if invested and {method, name} <= invested.keys() and axis == "total FLOPs":
                ratio = _with_investment(ratio, invested[method], invested[name], own[0])
            out.append(ratio)
    return out


def _ratio(axis: str, own: Sequence[MethodResult], other: Sequence[MethodResult]) -> Ratio:
    of = AXES[axis]
    own_x, other_x = (np.array([of(p) for p in results]) for results in (own, other))
    own_PK, other_PK = (
        np.stack([p.correct_PS.mean(axis=1) for p in results], axis=1) for results in (own, other)
    )

    def at(own_K: NDArray[np.float64], other_K: NDArray[np.float64]) -> tuple[float, float]:
        # The first of equal maxima; rounding must not make a later one the best.
        best = int(np.argmax(np.round(other_K, 12)))
        budget = budget_for(float(np.round(other_K[best], 12)), own_x, np.round(own_K, 12))
        return float(other_x[best]), budget

    problems = len(own_PK)
    draws_RP = resampled(problems, RESAMPLES)
    ratios_R = [
        0.0 if math.isnan(budget) else spent / budget
        for spent, budget in map(at, draws_RP @ own_PK / problems, draws_RP @ other_PK / problems)
    ]
    low, high = np.quantile(ratios_R, [0.025, 0.975])
    own_K, other_K = own_PK.mean(axis=0), other_PK.mean(axis=0)
    spent, budget = at(own_K, other_K)
    nowhere = math.isnan(budget)
    return Ratio(
        method=own[0].method,
        baseline=other[0].method,
        axis=axis,
        baseline_budget=spent,
        target=float(other_K.max()),
        budget=None if nowhere else budget,
        ratio=0.0 if nowhere else spent / budget,
        low=float(low),
        high=float(high),
        at_least=not nowhere and bool(budget == own_x[0]),
        rising=bool(spent == other_x[-1]),
    )


def _with_investment(ratio: Ratio, mine: float, its: float, point: MethodResult) -> Ratio:
    problems = len(point.correct_PS)
    plain = asdict(ratio) | {"invested": mine, "baseline_invested": its}
    if ratio.budget is not None:
        spent = its + problems * ratio.baseline_budget
        plain["ratio_with_investment"] = spent / (mine + problems * ratio.budget)
        saved = ratio.baseline_budget - ratio.budget
        if mine <= its and saved >= 0:
            plain["break_even_problems"] = 0.0
        elif saved > 0:
            plain["break_even_problems"] = (mine - its) / saved
    return Ratio(**plain)


def write_ratios(found: Sequence[Ratio], path: Path) -> None:
    """All ratios as JSON."""
    path.write_text(json_text([asdict(r) for r in found]))


def ratio_rows(found: Sequence[Ratio]) -> list[dict[str, str]]:
    """The ratios as a table shows them."""
    with_investment = any(r.invested is not None for r in found)
    rows = []
    for r in found:
        row = {
            "method": r.method,
            "budget in": r.axis,
            "of baseline": f"{r.baseline_budget:.4g}",
            "of method": "never as good" if r.budget is None else f"{r.budget:.4g}",
            "ratio [95%]": _ratio_text(r),
        }
        if with_investment:
            shared, even = r.ratio_with_investment, r.break_even_problems
            row["with labels and training"] = "" if shared is None else f"{shared:.3g}"
            never = "" if r.invested is None else "never"
            row["breaks even at"] = never if even is None else f"{even:.3g} problems"
        rows.append(row)
    return rows


def _ratio_text(r: Ratio) -> str:
    return f"{'>= ' if r.at_least else ''}{r.ratio:.2f} [{r.low:.2f}, {r.high:.2f}]"


def ratio_title(found: Sequence[Ratio]) -> str:
    """What the table of ratios is of."""
    return (
        f"budget of {found[0].baseline} at its best ({found[0].target:.3f}) over the budget at "
        "which the method is as good" + (f"; {RISING}" if found[0].rising else "")
    )


def print_ratios(found: Sequence[Ratio]) -> None:
    """A table of the ratios."""
    if found:
        print_table(ratio_title(found), ratio_rows(found))


def said(found: Sequence[Ratio]) -> str:
    """What the first method's ratios say, in a sentence; empty without ratios."""
    own = [r for r in found if r.method == found[0].method and r.axis != "traces"]
    if not own:
        return ""
    goal = f"{own[0].baseline} at its best ({own[0].target:.3f}".replace("(0.", "(.") + ")"
    if all(r.budget is None for r in own):
        return f"{own[0].method} is nowhere as good as {goal}"
    spent = " and ".join(
        f"{_ratio_text(r)} times fewer {r.axis}" for r in own if r.budget is not None
    )
    return f"to be as good as {goal}, {own[0].method} needs {spent}" + (
        f"; {RISING}" if own[0].rising else ""
    )
