"""A user's own task and chat model, end to end, from a directory of theirs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from data_gen.config import RolloutsConfig
from data_gen.rollouts import rollouts
from pav.cli.run import run
from pav.core.steps import StepRule
from pav.labels.tables import read_labels
from pav.policy.policy import PolicyConfig, Prompt, load_policy
from pav.tasks.base import Problem
from pav.train.command import TrainConfig, train
from pav.verifier.checkpoint import load_verifier
from search.beam import BeamConfig, beam
from search.run.records import read
from tests.following import follow, printed

REPOSITORY = Path(__file__).parents[1]
MY_TASK = '''
"""Small additions, graded by parity: of random text about half is right."""
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pav.tasks.base import Grade, Problem, Split, Task, problem_id, split_of

Path("my_task_was_imported").touch()


@dataclass(frozen=True)
class MyTask(Task):
    """Additions.

    Args:
        largest: largest summand.
    """

    largest: int = 9

    def problems(self, split: Split) -> Iterator[Problem]:
        for a in range(self.largest + 1):
            for b in range(100):
                question = f"What is {a} + {b}?"
                pid = problem_id(question)
                if split_of(pid) == split:
                    yield Problem(pid, question, str((a + b) % 2))

    def grade(self, text: str, problem: Problem) -> Grade:
        answer = str(len(text) % 2) if text else None
        return Grade(answer, answer == problem.gold)
'''
TASK = ["--task", "my_task.MyTask", "--task.step_rule.max_tokens", "8", "--task.largest", "20"]
CHAT = ["--policy", "./chat", "--policy.prompt.chat", "true", "--policy.prompt.system", "Add."]
SMALL = ["--ignore_warnings", "true", "--sampler.max_length", "88", "--engine.kv_gib", "0.05",
         "--n_traces", "3", "--problems", "24", "--validation_problems", "12"]  # fmt: skip


Command = Callable[..., "Done"]


@pytest.fixture
def directory(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Where the user works: ``my_task.py`` and a random chat model whose answers end."""
    chat = tmp_path / "chat"
    shutil.copytree(tiny_model("llama", "chat"), chat)
    weights = load_file(chat / "model.safetensors")
    # A direction that every state has, so that output rows can have something like a bias.
    weights["model.embed_tokens.weight"][:, 0] = 2.0
    weights["lm_head.weight"][:, 0] = 0.0
    weights["lm_head.weight"][
        load_policy(PolicyConfig(str(chat)), StepRule()).stepper.stop_ids, 0
    ] = 0.4
    save_file(weights, chat / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "my_task.py").write_text(MY_TASK)
    monkeypatch.chdir(tmp_path)
    # Commands look for modules where they are started.
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    return tmp_path


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command as its console script does: the directory is on no path, no task imported."""

    def perform(*words: str) -> Done:
        with monkeypatch.context() as patch:
            here = {"", os.getcwd(), str(REPOSITORY)}
            patch.setattr(sys, "path", [place for place in sys.path if place not in here])
            patch.delitem(sys.modules, "my_task", raising=False)
            code = 0
            capfd.readouterr()
            try:
                follow(list(words))
            except SystemExit as ended:
                code = int(ended.code or 0)
            said = capfd.readouterr()
            return Done(code, said.out, said.err)

    return perform


def test_users_own_task_and_chat_model_go_from_rollouts_to_search(
    directory: Path, command: Command
) -> None:
    made = command("data_gen.rollouts", *TASK, *CHAT, *SMALL, "--output", "labels")
    assert made.code == 0, made.err
    labels = read_labels(["labels"])
    assert any(len(t.step_ends) > 1 for t in labels.traces)
    assert {0, 1} <= {k for k, _ in labels.counts.values()}
    assert any(not t.truncated for t in labels.traces)
    for t in labels.traces:
        starts = [0, *t.step_ends]
        assert all(b - a <= 8 for a, b in zip(starts, t.step_ends, strict=False))
    # The start says how the model is asked; every command prints the next one, task included.
    assert "policy: ./chat (chat prompt), float32\nfirst prompt of policy:\n" in made.out
    assert "  | <|im_start|>system\n  | Add.<|im_end|>\n" in made.out
    (training,) = printed(made.out)
    trained = command(*training, "--max_epochs", "2")
    assert trained.code == 0, trained.err
    card = load_verifier("pav.ckpt").card
    assert card.heads == ["q/chat", "orm"] and card.prompt["system"] == "Add."
    (search,) = printed(trained.out)
    searched = command(*search, "--n", "2", "--problems", "3", "--engine.kv_gib", "0.05")
    said = searched.err.splitlines()
    errors = [line for line in said if line.startswith("search.beam: error:")]
    assert searched.code == (2 if errors else 0), searched.err
    assert "PAV beam" in searched.out
    # A random model often runs into the length cap, and that is said; nothing else is out of place.
    warned = [line for line in said if "WARNING" in line]
    assert all("hit sampler.max_length" in line for line in warned + errors)
    (found,) = directory.glob("search/*/beam.jsonl")
    records = read(found)
    assert len(records) == 3 and all(r.question.startswith("What is") for r in records)
    assert records[0].settings["scoring"] == "fused"

    # A file's word is not enough to import a module: the user has to name it again.
    (directory / "my_task_was_imported").unlink()
    for module, arguments in (
        ("pav.train", ["--labels", "[labels]", "--trunk", "./chat", "--output", "again.ckpt"]),
        ("search.beam", ["--verifier", "pav.ckpt"]),
    ):
        refused = command(module, *arguments)
        assert refused.code == 2
        (error,) = refused.err.splitlines()
        assert error.startswith(f"{module}: error: ")
        assert "names the task 'my_task.MyTask', which is not built in" in error
        assert "add --task my_task.MyTask and its settings" in error
    assert not (directory / "my_task_was_imported").exists()
    assert not (directory / "again.ckpt").exists()


def test_problems_in_a_file_need_no_code_and_are_named_once(directory: Path) -> None:
    rows = [{"q": f"What is {a} + {b}?", "a": a + b} for a in range(10) for b in range(40)]
    Path("x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--task.data", "x.jsonl", "--task.question_key", "q", "--task.answer_key", "a"]
    steps = ["--task.step_rule.max_tokens", "8"]
    made = [*data, *steps, *CHAT, *SMALL, "--output", "labels"]
    run(rollouts, RolloutsConfig, "data_gen.rollouts", made)
    assert {t.split for t in read_labels(["labels"]).traces} == {"train", "validation"}
    # Labels remember their task, and the verifier does.
    trained = ["--labels", "[labels]", "--trunk", "./chat", "--output", "pav.ckpt"]
    run(train, TrainConfig, "pav.train", [*trained, "--max_epochs", "1"])
    searched = ["--verifier", "pav.ckpt", "--n", "2", "--problems", "3", "--engine.kv_gib", "0.05"]
    run(beam, BeamConfig, "search.beam", searched)
    (found,) = directory.glob("search/*/beam.jsonl")
    assert [r.gold is not None and int(r.gold) < 50 for r in read(found)] == [True] * 3


RAW_PROVER = """
prover:
  model: ./chat
  name: raw
  prompt: {template: "Q: {question}\\n"}
"""


def test_prover_without_a_chat_template_finishes_a_chat_models_solutions(directory: Path) -> None:
    """Every policy has its own prompt; only solution ids are shared."""
    Path("prover.yaml").write_text(RAW_PROVER)
    made = [
        "--config",
        "prover.yaml",
        *TASK,
        *CHAT,
        *SMALL,
        "--problems",
        "4",
        "--output",
        "labels",
    ]
    run(rollouts, RolloutsConfig, "data_gen.rollouts", made)
    labels = read_labels(["labels"])
    assert labels.policies == ["chat", "raw"]
    names = labels.manifest["rollout_policies"]
    assert names["chat"] != names["raw"]
    chat = load_policy(PolicyConfig("./chat", prompt=Prompt(chat=True, system="Add.")), StepRule())
    raw = load_policy(PolicyConfig("./chat", prompt=Prompt("Q: {question}\n")), StepRule())
    cap = labels.manifest["sampler"]["max_length"]
    questions = {t.problem_id: Problem(t.problem_id, t.question) for t in labels.traces}
    cut = [c for c in labels.completions if c.truncated]
    assert {c.policy for c in cut} == {"chat", "raw"}
    for c in cut:
        # The cap counts each policy's own prompt.
        prompt = (chat if c.policy == "chat" else raw).encode(questions[c.problem_id])
        used = len(prompt) + len(c.prefix_ids)
        assert len(c.ids) == max(0, cap - used)


@pytest.mark.xfail(strict=True, reason="jsonargparse reads settings of an optional class as YAML")
def test_templates_on_the_command_line_are_taken_literally(directory: Path) -> None:
    seen: list[RolloutsConfig] = []
    given = ["--policy.prompt.template", "Q: {question}\n", "--prover", "./chat",
             "--prover.prompt.template", "P: {question}\n"]  # fmt: skip
    run(seen.append, RolloutsConfig, "data_gen.rollouts", [*given, "--output", "labels"])
    assert seen[0].policy.prompt.template == "Q: {question}\n"
    assert seen[0].prover is not None
    assert seen[0].prover.prompt.template == "P: {question}\n"
