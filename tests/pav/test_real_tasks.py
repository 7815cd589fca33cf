"""GSM8K and MATH: named on the command line, read from files, asked with their own template."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pav.cli.run import run
from pav.core.steps import StepRule
from pav.policy.policy import PolicyConfig, Prompt, asked
from pav.tasks.base import Grade, Task
from pav.tasks.gsm8k import Gsm8k
from pav.tasks.jsonl import Jsonl
from pav.tasks.math import Math
from pav.tasks.tape import Tape
from pav.verifier.checkpoint import resolve_task

SHARED = Path(__file__).parents[3] / "shared" / "data"


@dataclass(frozen=True)
class Config:
    """A command with a task.

    Args:
        task: the task.
        policy: the policy.
    """

    task: Task = field(default_factory=Tape)
    policy: PolicyConfig = field(default_factory=PolicyConfig)


def given(*argv: str) -> Config:
    seen: list[Config] = []
    run(seen.append, Config, "test", argv)
    return seen[0]


@pytest.mark.parametrize("name", ["Gsm8k", "pav.tasks.gsm8k.Gsm8k"])
def test_a_built_in_task_goes_by_its_class_name(name: str) -> None:
    task = given("--task", name, "--task.data", "mine.jsonl", "--task.test", "null").task
    assert task == Gsm8k(data="mine.jsonl", test=None)


def test_settings_of_the_default_task_are_not_carried_over_to_another(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("task:\n  class_path: Math\n  init_args:\n    data: mine.jsonl\n")
    wanted = Math(data="mine.jsonl")
    assert wanted.step_rule.min_tokens == 4
    assert given("--task", "Math", "--task.data", "mine.jsonl").task == wanted
    assert given("--config", str(config)).task == wanted
    # Settings alone still go to the default task.
    config.write_text("task:\n  init_args:\n    n_ops: 6\n")
    assert given("--config", str(config), "--task.step_rule.min_tokens", "2").task == Tape(
        n_ops=6, step_rule=StepRule(min_tokens=2)
    )


def test_a_policy_is_asked_with_the_task_s_template_unless_it_has_its_own() -> None:
    plain = PolicyConfig("m", prompt=Prompt(chat=True, few_shot=[("1+1?", "#### 2")]))
    prompt = asked(plain, Gsm8k()).prompt
    assert prompt == replace(plain.prompt, template=Gsm8k.template)
    assert "####" in prompt.template and "\\boxed{}" in asked(plain, Math()).prompt.template
    own = replace(plain, prompt=Prompt(template="Q: {question}"))
    assert asked(own, Gsm8k()) == own
    assert asked(plain, Tape()) == plain == asked(plain, Jsonl(data="x"))


def test_a_template_is_no_setting_that_labels_depend_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Gsm8k(data=str(path), test=None)
    assert "template" not in task.fingerprint
    spec = {"class_path": "pav.tasks.gsm8k.Gsm8k", "init_args": {"data": str(path), "test": None}}
    assert resolve_task(spec, None, "a file") == task
    problem = next(task.problems("train"))
    assert task.grade(f"So it is\n#### {problem.gold}", problem) == Grade(problem.gold, True)


@pytest.mark.skipif(not SHARED.exists(), reason="needs GSM8K and MATH-500 in ../shared/data")
def test_every_reference_solution_is_right() -> None:
    gsm8k = Gsm8k(
        data=str(SHARED / "gsm8k_train.jsonl.gz"), test=str(SHARED / "gsm8k_test.jsonl.gz")
    )
    train = {p.id for p in gsm8k.problems("train")}
    held_out = {p.id for split in ("validation", "test") for p in gsm8k.problems(split)}  # type: ignore[arg-type]
    assert len(train) + len(held_out) == 7473 + 1319
    assert not train & held_out
    math = Math(data=str(SHARED / "math500.jsonl.gz"), test=None)
    whole = replace(math, answer_key="solution")
    solved = zip(math.problems("train"), whole.problems("train"), strict=True)
    assert all(math.grade(f"\\boxed{{{of.gold}}}", problem).correct for problem, of in solved)
