"""Likelihood rewards on the tape and on the ledger: ``python -m benchmarks.rl.likelihood``.

Where an answer can be checked (the tape, groups of 4 and of 32) and where none can (the ledger,
groups of 4), every arm runs with every seed from the same start, on the same problems and with as
many chains per iteration (fine-tuning: as many references). Every run is ``pav.rl`` in a process of
its own, so the same command goes on where it was stopped.

Reads ``configs/tape/likelihood/arms.yaml``. Writes ``rl_likelihood_<setting>.json``, ``.csv``,
``.md`` (in the shape of Tables 1 to 3 of arXiv 2602.03979) and ``.png`` to ``benchmarks/results``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from benchmarks.rl.runs import rows_of, run_once, write_rows
from benchmarks.speed.results import commit, machine, metric
from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text

ARMS = Path("configs/tape/likelihood/arms.yaml")
RESULTS = Path(__file__).parents[1] / "results"
# Arm that starts from what ``warm`` made.
WARM = "logprob_warm"
# Name in the table -> figure of an evaluation.
FIGURES = {
    "greedy": "greedy",
    "T=1": "accuracy",
    "perplexity": "reference/perplexity",
    "perplexity (MC)": "reference/perplexity_mc",
    "log p of the answer": "reference/answer",
    "chain": "held_out/chain",
    "no tag": "held_out/untagged",
}
# Of an iteration: what an answer that is not sampled saves.
SECONDS = {"sampling, s": "seconds/sample", "update, s": "seconds/update"}
CURVES = ("T=1", "perplexity", "chain")


@dataclass(frozen=True)
class LikelihoodBenchConfig:
    """Likelihood rewards on the tape and the ledger.

    Args:
        setting: which task, and how large a group.
        output: where runs are kept.
        arms: names of arms; by default all of ``configs/tape/likelihood/arms.yaml``.
        seeds: of runs: problems, samples.
        iterations: of every run.
        only_report: make tables and plots of what is there.
    """

    setting: Literal["verifiable_g4", "verifiable_g32", "ledger_g4"] = "ledger_g4"
    output: str = "runs/rl_likelihood"
    arms: list[str] | None = None
    seeds: int = 2
    iterations: int = 60
    only_report: bool = False


def likelihood(config: LikelihoodBenchConfig) -> None:
    """Run what is missing, then report (see the module)."""
    plan = yaml.safe_load(ARMS.read_text())
    names = config.arms or list(plan["arms"])
    if unknown := set(names) - set(plan["arms"]):
        raise UserError(f"arms names {sorted(unknown)[0]!r}; choose from {', '.join(plan['arms'])}")
    common = plan["common"] | plan["settings"][config.setting]
    common |= {"iterations": config.iterations, "eval_every": max(1, config.iterations // 3)}
    if not config.only_report:
        for seed in range(config.seeds):
            for name in names:
                settings = common | plan["arms"][name] | {"seed": seed}
                if settings["reward"] == "sft":  # as many references as the others see chains
                    settings["batch"] = common["batch"] * common["group"]
                if name == WARM:
                    warm = _directory(config, "warm", seed)
                    run_once(common | plan["warm"] | {"seed": seed}, warm)
                    settings["init"] = str(warm / "last")
                run_once(settings, _directory(config, name, seed))
    found = {name: runs for name in names if (runs := _evaluations(config, name))}
    if not found:
        raise UserError(f"no run of {config.setting} is in {config.output!r}")
    _report(config, found, common["eval_problems"])


def _directory(config: LikelihoodBenchConfig, name: str, seed: int) -> Path:
    return Path(config.output) / config.setting / name / f"seed{seed}"


def _evaluations(config: LikelihoodBenchConfig, name: str) -> list[list[dict[str, Any]]]:
    """Evaluations of every seed that is there, oldest first."""
    runs = [rows_of(_directory(config, name, seed)) for seed in range(config.seeds)]
    found = [[row for row in rows if "reference/answer" in row or "accuracy" in row]
             for rows in runs if rows]  # fmt: skip
    for row in (row for rows in found for row in rows):
        # Of as many chains as there are of a problem.
        for key in [key for key in row if key.startswith("reference/perplexity_mc")]:
            row["reference/perplexity_mc"] = row[key]
    return found


def _seconds(config: LikelihoodBenchConfig, name: str) -> dict[str, float]:
    """Medians over the iterations of all seeds."""
    rows = [row for seed in range(config.seeds) for row in rows_of(_directory(config, name, seed))]
    return {
        label: float(np.median([row.get(key, 0.0) for row in rows if "train/outcome" in row]))
        for label, key in SECONDS.items()
    }


def _report(
    config: LikelihoodBenchConfig, found: dict[str, list[list[dict[str, Any]]]], problems: int
) -> None:
    rows = [
        {"setting": config.setting, "arm": name, "seed": seed, "iteration": int(row["iteration"])}
        | {label: round(row[key], 4) if key in row else "" for label, key in FIGURES.items()}
        for name, runs in found.items()
        for seed, run_rows in enumerate(runs)
        for row in run_rows
    ]
    metrics = []
    seconds = {name: _seconds(config, name) for name in found}
    for name, runs in found.items():
        for label, value in seconds[name].items():
            metrics.append(metric(f"likelihood, {config.setting}, {name}: {label}", value, None))
        for label, key in FIGURES.items():
            last = [rows[-1][key] for rows in runs if key in rows[-1]]
            if last:
                seeds = f"{len(last)} seed{'s' * (len(last) > 1)}"
                what = f"likelihood, {config.setting}, {name}, {seeds}: {label} at the end"
                metrics.append(metric(what, float(np.mean(last))))
    target = RESULTS / f"rl_likelihood_{config.setting}.json"
    common = {
        "seeds": list(range(config.seeds)), "n_problems": problems, "machine": machine(),
        "date": date.today().isoformat(), "commit": commit(),
        "command": f"python -m benchmarks.rl.likelihood --setting {config.setting} --arms "
        f"'[{', '.join(found)}]' --seeds {config.seeds} --iterations {config.iterations}",
    }  # fmt: skip
    target.write_text(json_text([{**m, **common} for m in metrics]) + "\n")
    write_rows(rows, target.with_suffix(".csv"))
    table = _table(found, seconds)
    target.with_suffix(".md").write_text(table)
    draw(found, config, target.with_suffix(".png"))
    print(f"{table}\nfigures: {target}\nplot: {target.with_suffix('.png')}")


def _table(
    found: dict[str, list[list[dict[str, Any]]]], seconds: dict[str, dict[str, float]]
) -> str:
    """Figures at the end, mean over seeds, beside those of the start."""
    start = next(iter(found.values()))[0][0]
    lines = ["| | start | " + " | ".join(found) + " |", "|---" * (len(found) + 2) + "|"]
    for label, key in FIGURES.items():
        if key not in start:
            continue
        cells = [
            f"{np.mean([rows[-1][key] for rows in runs]):.3g}" if key in runs[0][-1] else ""
            for runs in found.values()
        ]
        lines.append(f"| {label} | {start[key]:.3g} | {' | '.join(cells)} |")
    for label in SECONDS:
        cells = [f"{seconds[name][label]:.2f}" for name in found]
        lines.append(f"| {label} | | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(
    found: dict[str, list[list[dict[str, Any]]]], config: LikelihoodBenchConfig, target: Path
) -> None:
    """Success, perplexity and chain length over iterations."""
    from matplotlib.figure import Figure

    shown = [c for c in CURVES if any(FIGURES[c] in runs[0][0] for runs in found.values())]
    figure = Figure(figsize=(4.6 * len(shown) + 1.6, 4.2), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, len(shown))).flat)
    for ax, label in zip(axes, shown, strict=True):
        key = FIGURES[label]
        for number, (name, runs) in enumerate(found.items()):
            runs = [[row for row in rows if key in row] for rows in runs]
            if not all(runs):
                continue
            x = [row["iteration"] for row in runs[0]]
            y_SE = np.array([[row[key] for row in rows] for rows in runs])
            ax.plot(x, y_SE.mean(0), "o-", ms=3, color=f"C{number}", label=name)
            ax.fill_between(x, y_SE.min(0), y_SE.max(0), color=f"C{number}", alpha=0.12, lw=0)
        ax.set_title(label)
        ax.set_xlabel("iterations")
        if label == "perplexity":
            ax.set_yscale("log")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    said = "one seed" if config.seeds == 1 else f"mean and range of {config.seeds} seeds"
    figure.suptitle(f"Likelihood rewards, {config.setting}: {said}")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    run(likelihood, LikelihoodBenchConfig, "benchmarks.rl.likelihood")
