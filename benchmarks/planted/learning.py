"""Figures 3a, 3b and 3c: what policy gradient learns on the planted task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.planted import paper
from benchmarks.planted.results import Results, mean_and_interval
from benchmarks.planted.task import RIGHT
from benchmarks.planted.train import (
    Curves,
    Settings,
    saved_at,
    sft,
    states,
    train,
    trained,
)
from pav.core.advantage import best_of_k_from_counts
from pav.core.errors import UserError

GAMMA = 10.0
WINDOW = 20  # updates behind one point of a curve: 1280 responses
LEARNT = 0.9
ROLLOUTS = 100
METHODS = ("effective", "only Q")
INITIAL = {False: "SFT of 50 passes", True: "SFT of 50 updates"}
PASS_AT, PASS_SAMPLES = 100, 16384


def curve(accuracy_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracy of ``WINDOW`` updates from each one on."""
    return np.convolve(accuracy_T, np.full(WINDOW, 1 / WINDOW), mode="valid")


def updates_to_learn(accuracy_T: NDArray[np.float64]) -> float:
    """Updates until the curve reaches ``LEARNT``; their whole number if it never does."""
    reached = np.flatnonzero(curve(accuracy_T) >= LEARNT)
    return float(reached[0] if len(reached) else len(accuracy_T))


def figure_3a(results: Results, runs: Path, seeds: int, iterations: int) -> None:
    """Accuracy over updates for effective reward (gamma = 10) and outcome reward alone."""
    seed_list = list(range(seeds))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    table: list[dict[str, Any]] = []
    for ax, (literal, initial) in zip(axes, INITIAL.items(), strict=True):
        all_curves: list[Curves] = [
            trained(Settings((GAMMA,) * 2, (1.0, 0.0), s, iterations, literal_sft=literal), runs)
            for s in seed_list
        ]
        accuracy_NTR = np.stack([c.accuracy_TR for c in all_curves])
        for r, method in enumerate(METHODS):
            smooth = np.stack([curve(a) for a in accuracy_NTR[:, :, r]])
            ax.plot(smooth.mean(0), color=f"C{r}", label=f"{method}, {seeds} seeds")
            ax.fill_between(range(smooth.shape[1]), *_band(smooth), color=f"C{r}", alpha=0.25, lw=0)
            published = paper.FIG_3A_ONLY_Q if r else paper.FIG_3A_EFFECTIVE
            ax.plot(
                paper.FIG_3A_ITERATIONS, published, "--", color=f"C{r}", label=f"{method}, paper"
            )
            learn = [updates_to_learn(a) for a in accuracy_NTR[:, :, r]]
            results.add(
                f"3a, {initial}: updates to {LEARNT:.0%}, {method}",
                learn,
                seed_list,
                never=sum(n == iterations for n in learn),
            )
            results.add(
                f"3a, {initial}: accuracy averaged over {iterations} updates, {method}",
                accuracy_NTR[:, :, r].mean(1).tolist(),
                seed_list,
            )
            results.add(
                f"3a, {initial}: accuracy over the last 100 updates, {method}",
                accuracy_NTR[:, -100:, r].mean(1).tolist(),
                seed_list,
            )
            for t in range(0, smooth.shape[1], 100):
                table += [
                    {"initial": initial, "method": method, "seed": s, "update": t,
                     "accuracy": smooth[s, t]}
                    for s in seed_list
                ]  # fmt: skip
        ratios = [updates_to_learn(a[:, 1]) / updates_to_learn(a[:, 0]) for a in accuracy_NTR]
        results.add(
            f"3a, {initial}: updates of only Q over updates of effective, to {LEARNT:.0%}",
            ratios,
            seed_list,
            paper="over 10",
        )
        results.add(
            f"3a, {initial}: seconds per seed",
            [c.seconds for c in all_curves],
            seed_list,
            ("<=", 120.0),
            cpu_seconds=[c.cpu_seconds for c in all_curves],
        )
        ax.set(title=initial, xlabel="policy updates")
        ax.legend(fontsize=8)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel(f"accuracy ({WINDOW}-update mean, 95% over seeds)")
    results.write(table, figure)


def figure_3b(
    results: Results, runs: Path, seeds: int, iterations: int, finished_only: bool = False
) -> None:
    """Accuracy averaged over the run against the prover's gamma: values, baseline, SFT varied.

    With ``finished_only`` nothing is started: what was run before is drawn, with its seeds.

    Raises:
        UserError: if nothing was run before.
    """
    gammas = paper.FIG_3B_GAMMAS
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    table: list[dict[str, Any]] = []
    for literal, initial in INITIAL.items():
        for baseline in (False, True):
            for rollouts in (0, ROLLOUTS):
                name = f"{f'Monte Carlo ({rollouts})' if rollouts else 'exact'} advantages"
                name += ", baseline" if baseline else ""
                settings = [
                    Settings(
                        (*gammas, GAMMA),
                        (1.0,) * len(gammas) + (0.0,),
                        seed,
                        iterations,
                        rollouts,
                        baseline,
                        literal,
                    )
                    for seed in range(seeds)
                ]
                if finished_only:
                    settings = [s for s in settings if saved_at(s, runs).exists()]
                if not settings:
                    continue
                seed_list = [s.seed for s in settings]
                stacks = [trained(s, runs) for s in settings]
                mean_NR = np.stack([c.accuracy_TR.mean(0) for c in stacks])
                last_NR = np.stack([c.accuracy_TR[-100:].mean(0) for c in stacks])
                colour, ls = f"C{int(bool(rollouts))}", "-" if not baseline else "--"
                for i, values_NR in enumerate((mean_NR, last_NR)):
                    ax = axes[int(literal), i]
                    y = values_NR[:, :-1]
                    ax.plot(gammas, y.mean(0), ls, marker="o", ms=3, color=colour, label=name)
                    ax.axhline(values_NR[:, -1].mean(), ls=":", lw=1, color=colour)
                for g, gamma in enumerate((*gammas, None)):
                    prover = "only Q" if gamma is None else f"gamma {gamma:g}"
                    for what, values_NR in (("mean", mean_NR), ("final", last_NR)):
                        results.add(
                            f"3b, {initial}, {name}, {prover}: {what} accuracy",
                            values_NR[:, g].tolist(),
                            seed_list,
                        )
                    table += [
                        {"initial": initial, "advantages": name, "prover": prover, "seed": s,
                         "mean": mean_NR[n, g], "final": last_NR[n, g]}
                        for n, s in enumerate(seed_list)
                    ]  # fmt: skip
                results.add(
                    f"3b, {initial}, {name}: seconds per seed, {iterations} updates",
                    [c.seconds for c in stacks],
                    seed_list,
                    ("<=", 1800.0) if iterations >= paper.ITERATIONS else None,
                    cpu_seconds=[c.cpu_seconds for c in stacks],
                )
    if not table:
        raise UserError(f"{str(runs)!r} holds no finished run; leave out --finished_only")
    for (row, column), ax in np.ndenumerate(axes):
        ax.plot(gammas, paper.FIG_3B_EFFECTIVE, color="k", lw=1, label="paper (mean)")
        measure = "last 100 updates" if column else f"mean over {iterations} updates"
        ax.set(title=f"{INITIAL[bool(row)]}: {measure}", xlabel="gamma of the prover")
        ax.legend(fontsize=7)
        ax.grid(alpha=0.25)
    axes[0, 0].set_ylabel("accuracy (dotted: only Q)")
    axes[1, 0].set_ylabel("accuracy (dotted: only Q)")
    results.write(table, figure)


def figure_3c(results: Results, seeds: int) -> None:
    """pass@N of the initial policy and of the policies after 100 updates."""
    seed_list = list(range(seeds))
    widths = (1, *paper.FIG_3C_N)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    table: list[dict[str, Any]] = []
    for ax, (literal, initial) in zip(axes, INITIAL.items(), strict=True):
        right: dict[str, list[int]] = {m: [] for m in (*METHODS, "initial")}
        for s in seed_list:
            start = sft(s, literal)
            _, policy = train(Settings((GAMMA,) * 2, (1.0, 0.0), s, PASS_AT), start)
            generator = torch.Generator().manual_seed(s + 7)
            drawn = [*_right(policy.sample(PASS_SAMPLES, generator))]
            drawn += _right(start.sample(PASS_SAMPLES, generator))
            for method, count in zip(right, drawn, strict=True):
                right[method].append(count)
        for i, (method, counts) in enumerate(right.items()):
            pass_NK = np.stack(
                [best_of_k_from_counts(np.array(counts), PASS_SAMPLES, n) for n in widths], axis=1
            )
            ax.plot(widths, pass_NK.mean(0), "o-", color=f"C{i}", ms=3, label=method)
            ax.fill_between(widths, *_band(pass_NK), color=f"C{i}", alpha=0.25, lw=0)
            ax.plot(paper.FIG_3C_N, paper.FIG_3C[method], "--", color=f"C{i}")
            for k, n in enumerate(widths):
                results.add(f"3c, {initial}: pass@{n}, {method}", pass_NK[:, k].tolist(), seed_list)
                table += [
                    {"initial": initial, "policy": method, "seed": s, "N": n,
                     "pass": pass_NK[s, k]}
                    for s in seed_list
                ]  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set(title=initial, xlabel="N (dashed: paper, N as printed)")
        ax.legend(fontsize=8)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel(f"pass@N after {PASS_AT} updates, 95% over seeds")
    results.write(table, figure)


def _right(tokens_RBH: torch.Tensor) -> list[int]:
    return [int(n) for n in (states(tokens_RBH)[..., -1] == RIGHT).sum(1)]


def _band(values_NX: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pairs = [mean_and_interval(column.tolist()) for column in values_NX.T]
    low, high = zip(*[ci or (mean, mean) for mean, ci in pairs], strict=True)
    return np.clip(low, 0, 1), np.clip(high, 0, 1)
