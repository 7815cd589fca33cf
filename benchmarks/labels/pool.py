"""``python -m benchmarks.labels.pool``: every rollout that an arm of the study asks for, once.

One label store, filled by ``data_gen.labeler`` with the plan of one arm after the other; what is
there already is not sampled again, so the same command resumes, and a new or changed strategy costs
only what it asks for beyond the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.labels.study import (
    ARMS,
    MOST_SEEDS,
    REFERENCE,
    REFERENCE_SEEDS,
    Arm,
    Replays,
    StudyConfig,
)
from data_gen.config import RolloutsConfig
from data_gen.engines import loaded
from data_gen.labeler import Labeler, PlannedTrace, label
from data_gen.store import Store
from pav.cli.run import run
from pav.core.signals import interruptible
from pav.grading.sandbox import GuardedGrader
from pav.policy.policy import Policy, asked, load_policy, tokenizer_fingerprint
from pav.tasks.base import Problem, task_spec

CONCURRENCY = 256


def fill(config: StudyConfig, arms: Sequence[Arm] = ARMS) -> None:
    """Sample what the pool lacks of ``arms``."""
    policy = load_policy(asked(config.policy, config.task), config.task.step_rule)
    run_config = RolloutsConfig(
        str(config.pool), config.task, config.policy, sampler=config.sampler, seed=config.seed
    )
    groups = [problems for _, _, problems in config.groups()]
    everything = list({p.id: p for problems in groups for p in problems}.values())
    manifest = _manifest(config, policy)
    with interruptible(), Store(config.pool, manifest) as store:
        name = policy.config.label
        with loaded(run_config, [policy]) as rollout_policies:
            replays = Replays(name, store.traces, store.completions)

            def sample(arm: Arm, problems: Sequence[Problem], number: int) -> None:
                seeds = [PlannedTrace("train", problem, name, number) for problem in problems]
                plan = replays.plan(arm)
                labeler = Labeler(
                    GuardedGrader(config.task), rollout_policies, plan, config.seed, store
                )
                label(labeler, [seeds], CONCURRENCY)

            for number in range(REFERENCE_SEEDS):
                sample(REFERENCE, everything, number)
            budgets = [replays.budget(problems) for problems in groups]
            for arm in arms:
                for number in range(MOST_SEEDS):
                    if _is_complete(replays, arm, groups, budgets):
                        break
                    sample(arm, _short(replays, arm, groups, budgets, number), number)
                print(f"{arm.name}: {_tokens(store)} tokens in the pool")
        store.seal({name: policy.fingerprint})


def _is_complete(
    replays: Replays, arm: Arm, groups: Sequence[Sequence[Problem]], budgets: Sequence[int]
) -> bool:
    """Whether everything that the arm asks for is there."""
    try:
        for problems, budget in zip(groups, budgets, strict=True):
            replays.buy(arm, problems, budget)
    except KeyError:
        return False
    return True


def _short(
    replays: Replays,
    arm: Arm,
    groups: Sequence[Sequence[Problem]],
    budgets: Sequence[int],
    rounds: int,
) -> list[Problem]:
    """Problems of the groups whose budget is not spent after so many rounds."""
    found = {
        problem.id: problem
        for problems, budget in zip(groups, budgets, strict=True)
        if replays.buy(arm, problems, budget, rounds).tokens < budget
        for problem in problems
    }
    return list(found.values())


def _tokens(store: Store) -> int:
    return sum(len(r.ids) for t in (store.traces, store.completions) for r in t.values())


def _manifest(config: StudyConfig, policy: Policy) -> dict[str, object]:
    return {
        "format": 1,
        "task": config.task.fingerprint,
        "task_spec": task_spec(config.task),
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "policy": asdict(policy.config),
        "policy_fingerprint": policy.fingerprint,
        "rollout_policies": {policy.config.label: policy.fingerprint},
        "sampler": asdict(config.sampler),
        "seed": config.seed,
    }


if __name__ == "__main__":
    run(fill, StudyConfig, "benchmarks.labels.pool")
