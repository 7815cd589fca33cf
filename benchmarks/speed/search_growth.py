"""How a beam search grows: ``OMP_NUM_THREADS=1 python -m benchmarks.speed.search_growth``.

Seconds, tokens and memory over the width N and over the number of problems, in one process.
Writes ``benchmarks/results/speed_search_growth.{json,csv,png}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil

from benchmarks.speed.results import SECOND, metric, result, seconds, write
from pav.cli.run import run
from pav.engine.loading import EngineConfig
from pav.tasks.base import Problem
from pav.verifier.checkpoint import load_verifier
from search.run.opening import open_session
from search.run.records import Record
from search.run.solve import beam_record, beam_settings

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.speed.search_growth"


@dataclass(frozen=True)
class GrowthConfig:
    """How a beam search grows.

    Args:
        verifier: what ranks steps.
        n: widths, for ``n_problems`` problems.
        n_problems: see ``n``.
        problems: numbers of problems, at width ``width``.
        width: see ``problems``.
        concurrency: problems in flight.
        engine: device settings.
    """

    verifier: str = "pav:reference"
    n: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64, 128])
    n_problems: int = 4
    problems: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256, 512])
    width: int = 2
    concurrency: int = 64
    engine: EngineConfig = field(default_factory=EngineConfig)


def growth(config: GrowthConfig) -> None:
    """Measure and write (see the module)."""
    verifier = load_verifier(config.verifier)
    session = open_session(verifier, None, None, None, config.engine)
    scorer = session.scorer(verifier, "auto", True, None)
    session.sampling_engine(scorer)
    process = psutil.Process()

    def measured(n: int, problems: list[Problem], over: str) -> dict[str, Any]:
        settings = beam_settings(verifier.card, n, 3, None, None)

        async def search(problem: Problem) -> Record:
            return await beam_record(session, scorer, settings, "orm", "beam", 0, problem)

        with TemporaryDirectory() as directory:
            started = seconds()
            path, what = Path(directory) / "r.jsonl", f"N={n}, {len(problems)} problems"
            found, _ = session.run(path, problems, search, config.concurrency, what)
            spent = seconds() - started
        return {
            "over": over,
            "n": n,
            "problems": len(problems),
            "seconds": round(spent, 2),
            "policy_tokens": sum(r.policy_tokens for r in found),
            "verifier_tokens": sum(r.verifier_tokens for r in found),
            "rss_gib": round(process.memory_info().rss / 2**30, 3),
        }

    most = session.problems("test", max(config.n_problems, *config.problems))
    measured(2, most[:4], "warm-up")
    rows = [measured(n, most[: config.n_problems], "n") for n in config.n]
    rows += [measured(config.width, most[:count], "problems") for count in config.problems]
    session.shutdown()
    metrics = []
    for over in ("n", "problems"):
        own = [r for r in rows if r["over"] == over]
        for what in ("seconds", "policy_tokens"):
            metrics.append(
                metric(
                    f"{what} grow with {over} to the power of (least squares, "
                    f"{over} = {own[0][over]} to {own[-1][over]})",
                    _power([r[over] for r in own], [r[what] for r in own]),
                )
            )
        grown = own[-1]["rss_gib"] - own[0]["rss_gib"]
        metrics.append(metric(f"resident memory added from the smallest to the largest {over}, GiB",
                              grown))  # fmt: skip
    write("search_growth", metrics, rows, [0], max(config.problems), COMMAND)
    _plot(rows, result("search_growth", "png"))


def _power(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _plot(rows: Sequence[dict[str, Any]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(2, 3, sharex="row")
    named = {"seconds": f"{SECOND}s", "policy_tokens": "policy tokens",
             "rss_gib": "resident memory, GiB"}  # fmt: skip
    for line, over in zip(axes, ("n", "problems"), strict=True):
        own = [r for r in rows if r["over"] == over]
        fixed = f"{own[0]['problems']} problems" if over == "n" else f"N = {own[0]['n']}"
        for ax, (what, name) in zip(line, named.items(), strict=True):
            x, y = np.array([r[over] for r in own]), np.array([r[what] for r in own])
            ax.plot(x, y, "o-")
            ax.set_xscale("log", base=2)
            if what != "rss_gib":
                ax.plot(x, y[0] * x / x[0], ":", color="gray", label="linear")
                ax.set_yscale("log", base=2)
                ax.legend(frameon=False)
            else:
                ax.set_ylim(0, 1.15 * y.max())
            ax.set_xlabel("width N" if over == "n" else "problems")
            ax.set_title(f"{name} ({fixed})", fontsize=9)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    run(growth, GrowthConfig, "benchmarks.speed.search_growth")
