"""Small label runs with a planted rule, written without sampling anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from data_gen.store import Store
from pav.labels.tables import Completion, Trace, prefix_key
from pav.policy.policy import PolicyConfig, Sampler, load_policy, tokenizer_fingerprint
from pav.tasks.base import Problem, Split, task_spec
from pav.tasks.tape import Tape, apply, parse

TASK = Tape(n_ops=3)
SAMPLER = Sampler(max_length=64)
HEADS = ["q/base", "q/prover", "orm"]


def solution(rng: Random, question: str) -> str:
    """A solution, half of the time with one wrong result."""
    value, operations = parse(question)
    slip = rng.randrange(2 * len(operations))
    lines = []
    for i, (op, operand) in enumerate(operations):
        line = f"{value}{op}{operand}="
        value = (apply(value, op, operand) + (rng.randint(1, 9) if i == slip else 0)) % 100
        lines.append(f"{line}{value}")
    return "\n".join([*lines, f"A{value}"])


def promising(ids: Sequence[int], limit: int) -> bool:
    """A planted rule that any trunk can tell: the digit before the delimiter is below ``limit``."""
    return len(ids) < 2 or ids[-2] - 3 < limit


def write_labels(
    directory: Path, model: Path, *, train_problems: int = 60, validation_problems: int = 40,
    seeds: int = 4, policies: Sequence[str] = ("base", "prover"), task: Tape = TASK,
    truncated: bool = False,
) -> str:  # fmt: skip
    """A label run in which the base finishes right after digits below 5, the prover below 7."""
    policy = load_policy(PolicyConfig(str(model), "base"), task.step_rule)
    manifest = {
        "format": 1,
        "task": task.fingerprint,
        "task_spec": task_spec(task),
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "policy": asdict(policy.config),
        "policy_fingerprint": policy.fingerprint,
        "rollout_policies": dict.fromkeys(policies, "fingerprint"),
        "sampler": asdict(SAMPLER),
    }
    rng = Random(0)
    splits: list[tuple[Split, int]] = [
        ("train", train_problems),
        ("validation", validation_problems),
    ]
    with Store(directory, manifest) as store:
        for split, count in splits:
            for problem in islice(task.problems(split), count):
                for seed in range(seeds):
                    write_trace(store, policy, split, problem, seed, rng, policies, truncated)
        store.seal(dict.fromkeys(policies, "fingerprint"))
    return str(directory)


def write_trace(
    store: Store, policy: Any, split: Split, problem: Problem, seed: int, rng: Random,
    policies: Sequence[str], truncated: bool,
) -> None:  # fmt: skip
    text = solution(rng, problem.question)
    whole = [
        *policy.tokenizer.encode(text, add_special_tokens=False),
        policy.tokenizer.eos_token_id,
    ]
    ends = policy.stepper.step_ends(whole)
    ids = whole[: ends[-2] + 1] if truncated else whole
    store.add(
        Trace(f"{problem.id}/{seed}", problem.id, problem.question, problem.gold, split, "base",
              seed, ids, ends[:-1] if truncated else ends, text.rsplit("A")[-1],
              promising(whole, 5) and not truncated, truncated)
    )  # fmt: skip
    for end in (0, *ends[:-1]):
        prefix = whole[:end]
        key = prefix_key(problem.id, prefix)
        for name, limit in zip(policies, (5, 7), strict=False):
            for index in range(2):
                if (key, name, index) not in store.completions:
                    store.add(
                        Completion(key, problem.id, name, index, prefix, whole[end:], "1",
                                   promising(prefix, limit), False)
                    )  # fmt: skip
