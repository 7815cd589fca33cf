"""Command ``pav.rl_diagnose``: would likelihood rewards shorten this policy's chains?

Within a group the baseline is the problem's own, so what counts is the correlation of chain length
and log-probability of the reference among chains of the *same* problem (arXiv 2602.03979, Section
5), not over all of them.

Axes: P problems, G chains of each.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text, replace_file
from pav.engine.loading import EngineConfig
from pav.policy.policy import PolicyConfig, Sampler
from pav.tasks.base import Split, Task

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pav.rl.trace import Trace

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DiagnoseConfig:
    """Correlation of chain length and likelihood of the reference, within problems.

    Args:
        policy: the policy.
        output: directory to write ``diagnose.json``, ``chains.csv`` and ``diagnose.png`` to.
        task: the task; the tape where the policy is a shipped one.
        answer_tags: text that opens and closes an answer; by default the task's.
        sampler: how chains are sampled.
        split: of the problems.
        problems: how many.
        chains: of each.
        tokens_per_batch: padded tokens of one forward pass.
        engine: device settings of the policy's engine.
        seed: of the chains.
    """

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    output: str = "runs/diagnose"
    task: Task | None = None
    answer_tags: tuple[str, str] | None = None
    sampler: Sampler = field(default_factory=Sampler)
    split: Split = "train"
    problems: int = 100
    chains: int = 64
    tokens_per_batch: int = 8192
    engine: EngineConfig = field(default_factory=EngineConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("problems", 2), ("chains", 3)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; give {least} or more")


def diagnose(config: DiagnoseConfig) -> None:
    """Sample chains, read the reference after each, and show what length has to do with it."""
    traces, log_PG = _read(config)
    length_PG = np.array([len(t.ids) for t in traces], dtype=float).reshape(log_PG.shape)
    within_P = within(length_PG, log_PG)
    everywhere = float(np.corrcoef(length_PG.ravel(), log_PG.ravel())[0, 1])
    known_P = within_P[~np.isnan(within_P)]
    from pav.core.statistics import bootstrap

    mean = bootstrap(known_P[:, None])
    figures: dict[str, Any] = {
        "problems": len(log_PG), "chains": log_PG.shape[1],
        "correlation_within_problems": mean.mean, "low": mean.low, "high": mean.high,
        "problems_where_negative": float((known_P < 0).mean()),
        "problems_where_all_alike": int(np.isnan(within_P).sum()),
        "correlation_over_all": everywhere,
        "mean_chain": float(length_PG.mean()), "mean_logprob": float(log_PG.mean()),
        "untagged": float(np.mean([not t.is_tagged for t in traces])),
    }  # fmt: skip
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / "diagnose.json", json_text(figures))
    with (output / "chains.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["problem_id", "chain_tokens", "logprob", "is_tagged"])
        writer.writerows(
            [t.problem.id, len(t.ids), round(float(log), 5), t.is_tagged]
            for t, log in zip(traces, log_PG.ravel(), strict=True)
        )
    draw(length_PG, log_PG, within_P, output / "diagnose.png")
    verdict = "shorten" if mean.high < 0 else "lengthen" if mean.low > 0 else "not change"
    print(
        f"correlation of chain length and log-probability within problems: {mean.mean:+.3f} "
        f"[{mean.low:+.3f}, {mean.high:+.3f}] ({figures['problems_where_negative']:.0%} of "
        f"{len(known_P)} problems negative); over all chains {everywhere:+.3f}\n"
        f"a likelihood reward would {verdict} chains at first\n"
        f"figures: {output / 'diagnose.json'}; plot: {output / 'diagnose.png'}"
    )


def within(length_PG: Array, log_PG: Array) -> Array:
    """Correlation (P,) of each problem's chains; NaN where they are all alike in one of both."""
    length = length_PG - length_PG.mean(1, keepdims=True)
    log = log_PG - log_PG.mean(1, keepdims=True)
    scale = np.sqrt((length**2).sum(1) * (log**2).sum(1))
    return np.where(scale > 1e-12, (length * log).sum(1) / np.maximum(scale, 1e-12), np.nan)


def _read(config: DiagnoseConfig) -> tuple[list[Trace], Array]:
    """Chains of every problem, and the log-probability (P, G) of the reference after each."""
    from pav.core.signals import interruptible
    from pav.engine.vllm import VllmEngine
    from pav.grading.sandbox import GuardedGrader
    from pav.policy.opening import settle_cap, task_for
    from pav.policy.policy import asked, load_policy
    from pav.rl.chain import Tags
    from pav.rl.learner import Learner
    from pav.rl.read import read_after
    from pav.rl.references import References, answers
    from pav.rl.rollout import Actor, rollout

    task = task_for(config.task, [config.policy.model])
    policy = load_policy(asked(config.policy, task), task.step_rule)
    problems = list(islice(task.problems(config.split), config.problems))
    sampler, cap = settle_cap(config.sampler, task, [policy], problems)
    print(f"{len(problems)} problems, {config.chains} chains of each; {cap}")
    references = References(
        policy, task, Tags(*(config.answer_tags or task.answer_tags)), config.seed
    )
    engine = VllmEngine(
        policy.path, policy.config.dtype, sampler.max_length, config=config.engine, trained=True
    )
    with interruptible(), GuardedGrader(task) as grader:
        try:
            engine.start()
            actor = Actor(engine, policy, sampler, grader, references, config.seed)
            traces = rollout(actor, problems, config.chains, ("diagnose",), 0, chain=True)
        finally:
            engine.shutdown()
    traces = [references.after(t, answers(t.problem)[0]) for t in traces]
    learner = Learner(policy.path, sampler.temperature, with_value=False)
    read = read_after(learner, traces, config.tokens_per_batch)
    return traces, np.array([row.sum() for row in read]).reshape(len(problems), -1)


def draw(length_PG: Array, log_PG: Array, within_P: Array, target: Path) -> None:
    """Chains around the mean of their problem, and the correlation of every problem."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = (length_PG - length_PG.mean(1, keepdims=True)).ravel()
    y = (log_PG - log_PG.mean(1, keepdims=True)).ravel()
    left.plot(x, y, ".", ms=2, alpha=0.3)
    edges = np.unique(np.quantile(x, np.linspace(0, 1, 11)))
    which = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    bins = [b for b in range(len(edges) - 1) if (which == b).any()]
    left.plot([x[which == b].mean() for b in bins], [y[which == b].mean() for b in bins],
              "o-", color="C1", label="mean of a tenth")  # fmt: skip
    left.axhline(0, color="gray", lw=0.5)
    left.set_xlabel("tokens of the chain, less its problem's mean")
    left.set_ylabel("log p of the reference, less its problem's mean")
    left.legend()
    known_P = within_P[~np.isnan(within_P)]
    right.hist(known_P, bins=np.linspace(-1, 1, 41))
    right.axvline(known_P.mean(), color="C1", label=f"mean {known_P.mean():+.2f}")
    right.axvline(0, color="gray", lw=0.5)
    right.set_xlabel("correlation within a problem")
    right.set_ylabel("problems")
    right.legend()
    figure.savefig(target, dpi=150)


def main() -> None:
    """Entry point of ``pav.rl_diagnose``."""
    run(diagnose, DiagnoseConfig, "pav.rl_diagnose")


if __name__ == "__main__":
    main()
