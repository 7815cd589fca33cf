"""``data_gen.select_prover DIR``: which prover to choose, from a pilot under several policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from data_gen.label_run import Run, base_policy, read_run, task_of, warn_unfinished
from data_gen.provers.statistics import State, States, of_best_of_k, of_policy, states_of
from pav.cli.directories import run_on_directories
from pav.core.advantage import best_of_k_from_counts
from pav.core.errors import UserError
from pav.core.files import json_text, replace_file
from pav.core.printable import cell, one_line
from pav.core.statistics import resampled
from pav.core.tables import wide_console
from pav.tasks.base import Task

MOST_K = 32
RESAMPLES = 2000
RESULT = "select_prover.json"
PICTURE = "select_prover.png"
STATISTICS = ("distinguishability", "alignment", "sum")
# Below this share of visits the states that can be judged are not those that the base visits.
COVERED = 0.9


@dataclass(frozen=True)
class SelectProverConfig:
    """Estimate which prover tells the base policy's steps apart best, and agrees with it.

    The pilot is a small label run under all candidates with ``branches`` of 1 or more (two draws in
    every state) and many rollouts per prefix, for example
    ``data_gen.rollouts --config pilot.yaml --problems 200 --n_traces 1 --branches 2 --n_mc 16``.

    Args:
        labels: directory of the pilot (``data_gen.select_prover DIR`` is short for
            ``--labels DIR``).
        best_of: values of K for Best-of-K of the base, each at most half of the pilot's n_mc; by
            default all up to 32 that n_mc allows.
        seed: of the bootstrap.
        task: the run's task, where it is not built in.
    """

    labels: str
    best_of: list[int] | None = None
    seed: int = 0
    task: Task | None = None


@dataclass(frozen=True)
class Candidate:
    """A prover with its statistics.

    Attributes:
        name: the policy, or ``bo<K>``.
        success: chance to solve a problem.
        values: estimates by name of :data:`STATISTICS`.
        resampled: the same for each bootstrap sample, by name.
    """

    name: str
    success: float
    values: dict[str, float]
    resampled: dict[str, NDArray[np.float64]]

    def interval(self, statistic: str) -> list[float]:
        """95% bootstrap interval over problems."""
        return [float(x) for x in np.percentile(self.resampled[statistic], [2.5, 97.5])]


def select_prover(config: SelectProverConfig) -> None:
    """Judge the provers of a pilot (see :class:`SelectProverConfig`)."""
    run = read_run(config.labels)
    policy = base_policy(run, task_of(run, config.task))
    warn_unfinished(run, policy.stepper)
    states = states_of(run, policy.stepper)
    if states.n < 2 or not states.states:
        raise UserError(
            f"labels {config.labels!r} have {states.n} rollouts per prefix and {len(states.states)}"
            " states with two labelled next steps; label a pilot with n_mc of 4 or more and "
            "branches of 1 or more"
        )
    found = candidates(run, states, best_of(config.best_of, states.n), config.seed)
    chosen, reason = recommend(found, run.base)
    problems = len({s.problem_id for s in states.states})
    print(
        f"{len(states.states)} states of {problems} problems with {states.n} rollouts per step, "
        f"{states.covered:.1%} of the base's visits"
    )
    wide_console().print(_table(found, run.base, chosen))
    if states.covered < COVERED:
        print(
            "WARNING: few states have two labelled next steps (step 0 has one per trace); label a "
            "pilot with branches of 1 or more for the others"
        )
    print(one_line(f"recommended: {chosen}: {reason}"))
    directory = Path(config.labels)
    result = {
        "recommended": chosen,
        "reason": reason,
        "base": run.base,
        "states": len(states.states),
        "problems": problems,
        "covered": states.covered,
        "n_mc": states.n,
        "candidates": [
            {"name": c.name, "success": c.success}
            | {s: {"value": c.values[s], "ci95": c.interval(s)} for s in STATISTICS}
            for c in found
        ],
    }
    replace_file(directory / RESULT, json_text(result))
    draw(found, run.base, chosen, directory / PICTURE)
    print(f"  {directory / RESULT}, {directory / PICTURE}")
    if chosen.startswith("bo") and chosen not in run.policies:
        print(f"to use it: label with the base alone, and search with --prover {chosen}")
    else:
        print(f"to use it: label with {chosen} as the one prover, and without branches")


def best_of(wanted: Sequence[int] | None, n: int) -> list[int]:
    """The values of K to judge; 1 is the base itself.

    Raises:
        UserError: if one has no unbiased estimate from ``n`` rollouts.
    """
    if wanted is None:
        return list(range(2, min(MOST_K, n // 2) + 1))
    for k in wanted:
        if not 2 <= k <= n // 2:
            raise UserError(
                f"best_of holds {k}: the square of a Best-of-K value has no unbiased estimate from "
                f"fewer than 2 K rollouts, the labels have {n}; give K from 2 to {n // 2}, or "
                "label a pilot with a larger n_mc"
            )
    return sorted(set(wanted))


def candidates(run: Run, states: States, ks: Sequence[int], seed: int) -> list[Candidate]:
    """All rollout policies of the run and Best-of-K of the base, by name.

    A statistic is its mean over visits; problems are drawn anew for the intervals, the same ones
    for all candidates.
    """
    problems = {pid: i for i, pid in enumerate(dict.fromkeys(s.problem_id for s in states.states))}
    visits_P = np.zeros(len(problems))
    for state in states.states:
        visits_P[problems[state.problem_id]] += state.visits
    draws_BP = resampled(len(problems), RESAMPLES, seed)
    n, base = states.n, run.base

    def candidate(
        name: str, success: float, statistic: Callable[[State], tuple[float, float]]
    ) -> Candidate:
        sums_P2 = np.zeros((len(problems), 2))
        for state in states.states:
            sums_P2[problems[state.problem_id]] += np.multiply(state.visits, statistic(state))
        spread, agreement = sums_P2.sum(axis=0) / visits_P.sum()
        resampled_B2 = (draws_BP @ sums_P2) / (draws_BP @ visits_P)[:, None]
        columns = (resampled_B2[:, 0], resampled_B2[:, 1], resampled_B2.sum(axis=1))
        return Candidate(
            name,
            success,
            {
                "distinguishability": float(spread),
                "alignment": float(agreement),
                "sum": float(spread + agreement),
            },
            dict(zip(STATISTICS, columns, strict=True)),
        )

    first = _first_counts(run, n)
    found = [
        candidate(
            name, float(first[name].mean() / n), partial(of_policy, name=name, base=base, n=n)
        )
        for name in run.policies
    ]
    return found + [
        candidate(
            f"bo{k}",
            float(best_of_k_from_counts(first[base], n, k).mean()),
            partial(of_best_of_k, k=k, base=base, n=n),
        )
        for k in ks
    ]


def _first_counts(run: Run, n: int) -> dict[str, NDArray[np.float64]]:
    """Right rollouts of ``n`` from the problems themselves, by policy."""
    counts: dict[str, dict[str, int]] = {name: {} for name in run.policies}
    for c in run.completions.values():
        if not c.prefix_ids and c.index < n:
            own = counts[c.policy]
            own[c.prefix_key] = own.get(c.prefix_key, 0) + c.correct
    return {name: np.array([*own.values()], dtype=np.float64) for name, own in counts.items()}


def recommend(found: Sequence[Candidate], base: str) -> tuple[str, str]:
    """(name, why) of the prover with the largest sum of both statistics.

    The base as its own prover is left out: that is no more than outcome reward (PAV paper, 3.3).
    """
    others = sorted((c for c in found if c.name != base), key=lambda c: -c.values["sum"])
    if not others:
        return base, "it is the only one; give other provers, or n_mc of 4 for Best-of-K"
    best = others[0]
    reason = (
        f"the largest distinguishability + alignment, the bound of Theorem 3.1: "
        f"{_figure(best, 'sum')}"
    )
    low, high = best.interval("alignment")
    if high < 0:
        reason += f"; it works against the base (alignment [{low:+.4f}, {high:+.4f}])"
    if len(others) > 1:
        second = others[1]
        lead = best.resampled["sum"] - second.resampled["sum"]
        low, high = np.percentile(lead, [2.5, 97.5])
        settled = "is settled" if low > 0 else "is not settled by this pilot"
        reason += (
            f"; its lead over {second.name} {settled} "
            f"({best.values['sum'] - second.values['sum']:+.4f} [{low:+.4f}, {high:+.4f}])"
        )
    return best.name, reason


def _figure(candidate: Candidate, statistic: str) -> str:
    low, high = candidate.interval(statistic)
    return f"{candidate.values[statistic]:+.4f} [{low:+.4f}, {high:+.4f}]"


def _table(found: Sequence[Candidate], base: str, chosen: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("prover")
    for column in ("solves", *STATISTICS):
        table.add_column(column, justify="right", no_wrap=True)
    for c in found:
        note = " (the base itself)" if c.name == base else " <-" if c.name == chosen else ""
        table.add_row(cell(c.name + note), f"{c.success:.3f}", *(_figure(c, s) for s in STATISTICS))
    return table


def draw(found: Sequence[Candidate], base: str, chosen: str, path: Path) -> None:
    """Write both statistics of every candidate as a picture; error bars are 95% intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axis: Any = figure.subplots()
    curve = [c for c in found if c.name == base]
    curve += [c for c in found if c.name.startswith("bo") and c.name[2:].isdecimal()]
    x = [c.values["alignment"] for c in curve]
    axis.plot(x, [c.values["distinguishability"] for c in curve], "-", color="0.7",
              label="Best-of-K of the base")  # fmt: skip
    for c in found:
        point = (c.values["alignment"], c.values["distinguishability"])
        bars = []
        for value, statistic in zip(point, ("alignment", "distinguishability"), strict=True):
            low, high = c.interval(statistic)
            bars.append([[max(value - low, 0.0)], [max(high - value, 0.0)]])
        colour = "C3" if c.name == chosen else "C7" if c in curve else "C0"
        axis.errorbar(*point, xerr=bars[0], yerr=bars[1], fmt="o", ms=4, lw=0.8, color=colour)
        if c not in curve or c.name == chosen or c is curve[0] or _is_power(c.name):
            axis.annotate(c.name, point, xytext=(5, 4), textcoords="offset points", fontsize=9)
    axis.axvline(0, color="0.8", lw=0.8, zorder=0)
    axis.set(
        xlabel="alignment with the base",
        ylabel="distinguishability",
        title=f"provers by Theorem 3.1 (recommended: {chosen})",
    )
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=90)


def _is_power(name: str) -> bool:
    k = int(name[2:]) if name[2:].isdecimal() else 0
    return k > 0 and k & (k - 1) == 0


def main() -> None:
    """Entry point of ``data_gen.select_prover``."""
    run_on_directories(select_prover, SelectProverConfig, "data_gen.select_prover")


if __name__ == "__main__":
    main()
