"""One side of :mod:`benchmarks.speed.rl_trl`: iterations of online RL, one for every line it reads.

``python -m benchmarks.speed.rl_turns SIDE WORK.json`` runs in an environment that has what the side
needs: this project's or, for TRL's trainers, one that has TRL and in which this project's ``pav``
can be imported. Its start and one iteration are behind it when it writes its first line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import psutil

from pav.core.files import json_text
from pav.tasks.base import Problem
from pav.tasks.tape import Tape


@dataclass(frozen=True)
class Work:
    """What every side does alike.

    Attributes:
        verifier: of the run; it scores nothing here, but knows policy, prompt and sampler.
        policy: directory of the policy that is trained.
        batch: problems of an iteration.
        group: traces of each.
        iterations: in all, the one that is not counted included.
        prompt_tokens: mean length of a prompt.
        max_length: longest prompt and solution.
        micro_batch: traces of a forward pass of TRL's.
        lr: of AdamW.
        directory: to write to.
    """

    verifier: str
    policy: str
    batch: int
    group: int
    iterations: int
    prompt_tokens: int
    max_length: int
    micro_batch: int
    lr: float
    directory: str


def tree_seconds() -> float:
    """Processor seconds, of user and system, of this process and all below it, ended or not."""
    here = psutil.Process()
    found = here.cpu_times()
    total = found.user + found.system + found.children_user + found.children_system
    for child in here.children(recursive=True):
        times = child.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return float(total)


class Turns:
    """Does an iteration for every line of standard input, and writes a line on what it took."""

    def __init__(self) -> None:
        # Libraries write where they like; what is read is written here alone.
        self.stream: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.done = 0
        self.began = (0.0, 0.0)
        self.found: dict[str, float] = {}

    def begin(self) -> None:
        """Wait for a line, unless this is the first iteration; start the clocks."""
        if self.done and not sys.stdin.readline():
            raise SystemExit(0)
        self.began = (tree_seconds(), time.perf_counter())

    def end(self) -> None:
        """Say what the iteration took."""
        took = {
            "processor seconds": tree_seconds() - self.began[0],
            "seconds": time.perf_counter() - self.began[1],
        }
        self.done += 1
        print(json_text({**took, **self.found}, None), file=self.stream, flush=True)


def ours(work: Work, turns: Turns, every_group: bool) -> None:
    """Iterations of ``pav.rl``; with ``every_group`` none is left out of the update."""
    from lightning.fabric import Fabric

    from pav.engine.vllm import VllmEngine
    from pav.grading.sandbox import GuardedGrader
    from pav.rl import loop
    from pav.rl.command import assembled, opened, problems_of
    from pav.rl.config import RlConfig
    from pav.rl.rollout import Actor

    if every_group:
        loop.is_idle = lambda sample: False
    config = RlConfig(
        work.verifier, work.directory, dense="none", batch=work.batch, group=work.group, kl=0.0,
        lr=work.lr, warmup=0.0, schedule="constant", eval_problems=0, iterations=work.iterations,
    )  # fmt: skip
    rewarder, policy, task, sampler = opened(config)
    problems, _ = problems_of(config, task)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    engine = VllmEngine(policy.path, policy.config.dtype, sampler.max_length, trained=True)
    with GuardedGrader(task) as grader:
        engine.start()
        assert rewarder.references is not None
        actor = Actor(engine, policy, sampler, grader, rewarder.references, config.seed)
        run = assembled(config, fabric, engine, actor, rewarder, problems, [])
        for _ in range(work.iterations):
            turns.begin()
            traces, _, metrics = loop.iterate(run)
            turns.found = {
                "tokens": sum(len(t.ids) for t in traces),
                "right": metrics["train/accuracy"],
                "groups alike": metrics["train/dead_groups"],
            }
            turns.end()
        engine.shutdown()


def serve_on_cpu() -> None:
    """Let TRL's colocated vLLM run in float32 on a CPU, which it does not by itself.

    It writes new weights into vLLM's parameters, which a CPU's kernels have packed by then and
    which have no loader any more: :class:`AttributeError`. They go in as ``pav.rl`` hands them in.
    """
    from trl.generation import vllm_generation as served

    served.LLM = partial(served.LLM, dtype="float32", enforce_eager=True, block_size=32)

    def sync(generation: Any) -> None:
        weights = list(generation.model.state_dict().items())
        generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        generation.llm.reset_prefix_cache()

    served.VLLMGeneration.sync_weights = sync


def trl(
    work: Work, turns: Turns, trainer: str, use_vllm: bool = False, as_shipped: bool = False
) -> None:
    """Iterations of one of TRL's trainers: the optimiser and length cap of ``pav.rl``'s."""
    import trl as library
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    task = Tape()
    problems = list(islice(task.problems("train"), work.batch * work.iterations))
    rows = [{"prompt": f"{p.question}\n", "gold": p.gold} for p in problems]

    def right(
        prompts: Sequence[str], completions: Sequence[str], gold: Sequence[str],
        completion_ids: Sequence[Sequence[int]], **_: Any,
    ) -> list[float]:  # fmt: skip
        graded = [
            float(task.grade(text, Problem("", question, answer)).correct)
            for question, text, answer in zip(prompts, completions, gold, strict=True)
        ]
        groups = [set(graded[i : i + work.group]) for i in range(0, len(graded), work.group)]
        turns.found = {
            "tokens": sum(map(len, completion_ids)),
            "right": sum(graded) / len(graded),
            "groups alike": sum(len(g) == 1 for g in groups) / len(groups),
        }
        return graded

    class Callback(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    arguments: dict[str, Any] = {
        "output_dir": work.directory,
        "use_cpu": True,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": False,
        "per_device_train_batch_size": work.micro_batch,
        "gradient_accumulation_steps": work.batch * work.group // work.micro_batch,
        "num_generations": work.group,
        "max_completion_length": work.max_length - work.prompt_tokens,
        "max_steps": work.iterations,
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "temperature": 1.0,
        "shuffle_dataset": False,
        "use_vllm": use_vllm,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if use_vllm:
        arguments["vllm_max_model_length"] = work.max_length
        if not as_shipped:
            serve_on_cpu()
    made = getattr(library, f"{trainer}Trainer")(
        work.policy,
        right,
        args=getattr(library, f"{trainer}Config")(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work.policy),
        callbacks=[Callback()],
    )
    made.train()


SIDES: dict[str, Callable[[Work, Turns], None]] = {
    "pav.rl": lambda work, turns: ours(work, turns, False),
    "pav.rl, no group left out": lambda work, turns: ours(work, turns, True),
    "TRL RLOO": lambda work, turns: trl(work, turns, "RLOO"),
    "TRL GRPO": lambda work, turns: trl(work, turns, "GRPO"),
    "TRL RLOO, vLLM": lambda work, turns: trl(work, turns, "RLOO", True),
    "TRL GRPO, vLLM": lambda work, turns: trl(work, turns, "GRPO", True),
    "TRL GRPO, vLLM as shipped": lambda work, turns: trl(work, turns, "GRPO", True, True),
}


if __name__ == "__main__":
    SIDES[sys.argv[1]](Work(**json.loads(Path(sys.argv[2]).read_text())), Turns())
