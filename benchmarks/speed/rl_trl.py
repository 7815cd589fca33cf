"""Online RL beside TRL: ``python -m benchmarks.speed.rl_trl --trl_python VENV/bin/python``.

The same policy, problems, group size, length cap, outcome reward and optimiser; no KL divergence,
temperature 1, float32, one thread. Every side (:mod:`benchmarks.speed.rl_turns`) is a process of
its own, and all stay up: a turn is one iteration of each, one side after the other. What counts is
samples per processor second, user and system, of a side's processes, their start left out.

``pav.rl`` leaves groups out of the update whose outcomes are all alike: they have no gradient.
TRL computes them. ``pav.rl, no group left out`` does so, too.

TRL's environment is made by hand and is no part of this project's (TRL 1.16 takes vLLM to 0.31)::

    python -m venv VENV
    VENV/bin/pip install --no-deps trl==1.16.0 accelerate datasets
    echo <this project's site-packages> > VENV/lib/python3.11/site-packages/project.pth

Writes ``benchmarks/results/speed_rl_trl.{json,csv}``; ratios are means over turns with t intervals.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from benchmarks.speed.results import Target, metric, write
from benchmarks.speed.rl_turns import Work
from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text
from pav.rl.command import opened, problems_of
from pav.rl.config import RlConfig

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.speed.rl_trl --trl_python VENV/bin/python"
OURS = ("pav.rl", "pav.rl, no group left out")
TRANSFORMERS = ("TRL RLOO", "TRL GRPO")
VLLM = ("TRL RLOO, vLLM", "TRL GRPO, vLLM")
# What TRL's colocated vLLM does on a CPU if nobody helps it.
AS_SHIPPED = "TRL GRPO, vLLM as shipped"
# The settings of an engine of this project, where TRL has none for them.
ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCH_COMPILE_DISABLE": "1",
}


@dataclass(frozen=True)
class RlTrlConfig:
    """Online RL beside TRL's trainers, on one core.

    Args:
        trl_python: Python of an environment with TRL and what this project needs.
        verifier: its base policy is trained.
        batch: problems of an iteration.
        group: traces of each.
        turns: iterations of every side, after one that is not counted.
        micro_batch: traces of a forward pass of TRL's; 64 and 256 were slower here.
    """

    trl_python: str
    verifier: str = "pav:reference"
    batch: int = 64
    group: int = 4
    turns: int = 4
    micro_batch: int = 32


class Side:
    """A process that does an iteration when it is told to."""

    def __init__(self, name: str, python: str, work: Path) -> None:
        self.name = name
        self.log = work.with_name(f"{name}.log")
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, **ENGINE, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.speed.rl_turns", name, str(work)],
            env={**environment, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def answer(self) -> dict[str, float] | str:
        """What its iteration took, or the line that it died with."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            found: dict[str, float] = json.loads(line)
            return found
        lines = [line for line in self.log.read_text().splitlines() if "Error" in line]
        return lines[-1].strip() if lines else f"exit code {self.process.wait()}"

    def iterate(self) -> dict[str, float]:
        """One more iteration.

        Raises:
            RuntimeError: with the line that it died with.
        """
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = self.answer()
        if isinstance(found, str):
            raise RuntimeError(f"{self.name}: {found}")
        return found

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def compare(config: RlTrlConfig) -> None:
    """Measure and write (see the module).

    Raises:
        UserError: if a side does not start.
    """
    with tempfile.TemporaryDirectory() as directory, ExitStack() as ends:
        work = Path(directory) / "work.json"
        work.write_text(json_text(asdict(_work(config, directory))))

        def started(name: str) -> tuple[Side, dict[str, float] | str]:
            python = sys.executable if name in OURS else config.trl_python
            side = Side(name, python, work)
            ends.callback(side.end)
            found = side.answer()
            print(f"{name}: {found}", flush=True)
            return side, found

        alone, reason = started(AS_SHIPPED)
        alone.end()
        sides: list[Side] = []
        for name in (*OURS, *TRANSFORMERS, *VLLM):
            side, found = started(name)
            if isinstance(found, str):
                raise UserError(f"{name} did not start: {found}; its log ends\n{_tail(side.log)}")
            sides.append(side)
        rows: list[dict[str, Any]] = []
        for turn in range(config.turns):
            for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                found = side.iterate()
                rows.append(
                    {"turn": turn, "side": side.name} | {k: round(v, 4) for k, v in found.items()}
                )
                print(f"turn {turn}, {side.name}: {found}", flush=True)
    metrics = _metrics(config, rows)
    shipped = f"RL: {AS_SHIPPED} runs on a CPU"
    if isinstance(reason, str):
        shipped += (
            f" (it ends with {reason.partition(': ')[2] if reason.startswith('[') else reason})"
        )
    metrics.append(metric(shipped, float(not isinstance(reason, str))))
    write("rl_trl", metrics, rows, [0], config.batch, COMMAND)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-20:])


def _work(config: RlTrlConfig, directory: str) -> Work:
    """What every side does; TRL's length cap is of the solution alone."""
    settings = RlConfig(
        config.verifier, dense="none", batch=config.batch, group=config.group, eval_problems=0
    )
    _, policy, task, sampler = opened(settings)
    problems, _ = problems_of(settings, task)
    prompts = [len(policy.encode(problem)) for problem in problems[:1000]]
    return Work(
        config.verifier, policy.path, config.batch, config.group, config.turns + 1,
        round(float(np.mean(prompts))), sampler.max_length, config.micro_batch, 1e-6, directory,
    )  # fmt: skip


def _metrics(config: RlTrlConfig, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples per processor second of every side, and ours by those of TRL's fastest."""
    samples = config.batch * config.group
    rates = {
        side: np.array([samples / r["processor seconds"] for r in rows if r["side"] == side])
        for side in (*OURS, *TRANSFORMERS, *VLLM)
    }

    def mean(name: str, values: np.ndarray, target: Target = None) -> dict[str, Any]:
        half = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
        at = float(values.mean())
        return metric(name, at, target, [at - half, at + half])

    found = [mean(f"RL: samples per processor second, {side}", r) for side, r in rates.items()]
    for ours in OURS:
        for least, sides in ((1.4, (*TRANSFORMERS, *VLLM)), (1.9, VLLM)):
            fastest = max(sides, key=lambda side: rates[side].mean())
            what = "fastest with vLLM" if sides is VLLM else "fastest"
            name = f"RL: samples per processor second, {ours} by TRL's {what} ({fastest})"
            found.append(mean(name, rates[ours] / rates[fastest], (">=", least)))
    return found


if __name__ == "__main__":
    run(compare, RlTrlConfig, "benchmarks.speed.rl_trl")
