"""``python -m benchmarks.planted --figure 3a``: the paper's didactic experiment and its theory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.planted.exact import figure_10, figure_theory
from benchmarks.planted.learning import figure_3a, figure_3b, figure_3c
from benchmarks.planted.results import Results
from pav.cli.run import run
from pav.core.errors import UserError

SEEDS = {"3a": 5, "3b": 1, "3c": 5}
ITERATIONS = {"3a": 3400, "3b": 2000}


@dataclass(frozen=True)
class PlantedConfig:
    """The planted sub-sequence task: a figure of the PAV paper, measured.

    Args:
        figure: which; ``theory`` is Theorem 3.1, Remark 3.1 and Proposition F.1.
        seeds: initial policies for 3a, 3b and 3c; by default 5, 1 and 5.
        iterations: policy updates for 3a and 3b; by default 3400 and 2000 (the paper: 10,000).
        finished_only: for 3b: start nothing, draw the runs that are finished.
        runs: directory of finished runs; the same command resumes there.
        results: directory of the table, the rows and the plot.
    """

    figure: Literal["3a", "3b", "3c", "10", "theory"]
    seeds: int | None = None
    iterations: int | None = None
    finished_only: bool = False
    runs: str = "runs/planted"
    results: str = "benchmarks/results"

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise UserError(f"seeds is {self.seeds}; give a positive number")
        if self.iterations is not None and self.iterations < 100:
            raise UserError(f"iterations is {self.iterations}; give at least 100")
        if self.seeds is not None and self.figure not in SEEDS:
            raise UserError(f"seeds means nothing to figure {self.figure}; leave it out")
        if self.iterations is not None and self.figure not in ITERATIONS:
            raise UserError(f"iterations means nothing to figure {self.figure}; leave it out")
        if self.finished_only and self.figure != "3b":
            raise UserError(f"finished_only means nothing to figure {self.figure}; leave it out")

    @property
    def command(self) -> str:
        """What repeats this measurement."""
        given = "".join(
            f" --{name} {value}"
            for name, value in (("seeds", self.seeds), ("iterations", self.iterations))
            if value is not None
        )
        given += " --finished_only true" if self.finished_only else ""
        return f"python -m benchmarks.planted --figure {self.figure}{given}"


def planted(config: PlantedConfig) -> None:
    """Measure and draw one figure (see :class:`PlantedConfig`)."""
    results = Results(Path(config.results), f"planted_{config.figure}", config.command)
    seeds = config.seeds or SEEDS.get(config.figure, 1)
    iterations = config.iterations or ITERATIONS.get(config.figure, 1)
    if config.figure == "3a":
        figure_3a(results, Path(config.runs), seeds, iterations)
    elif config.figure == "3b":
        figure_3b(results, Path(config.runs), seeds, iterations, config.finished_only)
    elif config.figure == "3c":
        figure_3c(results, seeds)
    elif config.figure == "10":
        figure_10(results)
    else:
        figure_theory(results)


if __name__ == "__main__":
    run(planted, PlantedConfig, "benchmarks.planted")
