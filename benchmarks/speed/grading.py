"""How many ``math`` answers are graded in a second, by two processes on two cores.

``python -m benchmarks.speed.grading`` writes ``benchmarks/results/speed_grading.{json,csv,png}``.
Every problem of MATH-500 gets a right answer in another spelling and the answer of another
problem, each (answer, reference) pair once: nothing is answered from a cache but the reference,
which is read before the clock starts (a label run grades hundreds of answers per reference). Equal
text counts for nothing: that short cut is cut off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from pav.cli.run import run
from pav.core.errors import UserError
from pav.grading import kinds as grading
from pav.grading import math_worker
from pav.tasks.base import Problem
from pav.tasks.math import Math

Pair = tuple[str, str]
COMMAND = "python -m benchmarks.speed.grading"
TARGET = (">=", 500.0)


@dataclass(frozen=True)
class GradingConfig:
    """Grades per second of ``math`` answers.

    Args:
        data: problems with answers, a file or a data set of the hub.
        processes: graders, each with a math-verify process of its own.
    """

    data: str = "HuggingFaceH4/MATH-500:default:test"
    processes: int = 2

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise UserError(f"processes is {self.processes}; give 1 or more")


@dataclass(frozen=True)
class Timed:
    """What one process did.

    Attributes:
        grades: answers graded.
        right: of these, how many were right.
        seconds: by the clock on the wall.
        cpu_seconds: of the process and its math-verify process.
    """

    grades: int
    right: int
    seconds: float
    cpu_seconds: float


def measure(config: GradingConfig) -> None:
    """Grade, print and write (see :class:`GradingConfig`)."""
    from benchmarks.speed.results import bars, metric, result, write  # torch: not here

    task = Math(data=config.data, test=None)
    problems = [p for s in ("train", "validation", "test") for p in task.problems(s)]
    pairs = answers(problems)
    size = -(-len(pairs) // config.processes)
    parts = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    metrics, table = [], []
    for name, job, target in (
        ("math answers graded per second", by_grader, TARGET),
        ("math answers graded per second, all by math-verify", by_algebra, None),
    ):
        with ProcessPoolExecutor(config.processes, mp_context=get_context("spawn")) as pool:
            timed = list(pool.map(job, parts))
        grades, wall = sum(t.grades for t in timed), max(t.seconds for t in timed)
        measured = {
            "grades": grades,
            "right": sum(t.right for t in timed),
            "processes": config.processes,
            "seconds": wall,
            "processor_seconds": sum(t.cpu_seconds for t in timed),
        }
        # What idle cores show by the clock; other work on the machine hardly changes it.
        rate = config.processes * grades / sum(t.cpu_seconds for t in timed)
        metrics.append(metric(f"{name}, by the clock", grades / wall, target) | measured)
        metrics.append(metric(f"{name}, by the processor", rate, target) | measured)
        table.append({"metric": name, "grades_per_second": grades / wall} | measured)
    write("grading", metrics, table, [], len(problems), COMMAND)
    rates = [(row["metric"].removeprefix("math answers graded per second, "), row["value"])
             for row in metrics]  # fmt: skip
    what = f"math answers graded per second, {config.processes} processes"
    bars(rates, what, result("grading", "png"))


def answers(problems: list[Problem]) -> list[Pair]:
    """(solution, reference): a right one and another problem's answer for every problem."""
    golds = [p.gold or "" for p in problems]
    pairs = []
    for gold, other in zip(golds, golds[1:] + golds[:1], strict=True):
        # Spaces tell the spellings apart: no answer has been parsed before, as a reference or not.
        for space, answer in (("\\,", gold), ("\\;", other)):
            spelling = answer.replace("\\frac{", "\\dfrac{").replace("+", " + ")
            pairs.append((f"Therefore the answer is $\\boxed{{{space} {spelling}}}$.", gold))
    return list(dict.fromkeys(pairs))


def by_grader(pairs: list[Pair]) -> Timed:
    """Time the grader without its comparison of text."""
    grading.normalise = lambda latex: object()  # type: ignore[assignment, return-value]
    return _timed(pairs, lambda text, gold: grading.grade_text("math", text, gold).correct)


def by_algebra(pairs: list[Pair]) -> Timed:
    """Time math-verify alone: plain numbers go there too."""
    return _timed(
        pairs,
        lambda text, gold: bool(
            math_worker.compare(f"\\boxed{{{grading.last_boxed(text)}}}", gold).get("correct")
        ),
    )


def _timed(pairs: list[Pair], grade: Callable[[str, str], bool]) -> Timed:
    for gold in dict.fromkeys(gold for _, gold in pairs):
        math_worker.compare(f"\\boxed{{{gold}}}", gold)
    # Answers of the warm-up are not answered from memory.
    math_worker.compare.cache_clear()
    worker = math_worker.workers[os.getpid()].process.pid
    cpu = time.process_time() + _cpu_seconds(worker)
    start = time.perf_counter()
    right = sum(grade(text, gold) for text, gold in pairs)
    seconds = time.perf_counter() - start
    return Timed(len(pairs), right, seconds, time.process_time() + _cpu_seconds(worker) - cpu)


def _cpu_seconds(pid: int) -> float:
    """Processor time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    run(measure, GradingConfig, "benchmarks.speed.grading")
