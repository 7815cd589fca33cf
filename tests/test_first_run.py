"""A first run with a model of one's own: task, prompts and length cap are what is meant."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.config import RolloutsConfig
from pav.cli.run import run
from pav.core import hub
from pav.core.errors import UserError
from pav.core.printable import printable
from pav.policy.opening import block, print_opening, settle_cap, task_option
from pav.policy.policy import PolicyConfig, Prompt, Sampler, like, load_policy, model_path
from pav.tasks.base import Problem, task_spec
from pav.tasks.gsm8k import Gsm8k
from pav.tasks.jsonl import Jsonl
from pav.tasks.ledger import Ledger
from pav.tasks.tape import Tape
from pav.train.command import TrainConfig, new_card
from pav.verifier.checkpoint import load_verifier, prompt_from
from search.best_of_n import BestOfNConfig, best_of_n
from tests.pav.label_runs import TASK, write_labels


def configured(*argv: str) -> RolloutsConfig:
    seen: list[RolloutsConfig] = []
    run(seen.append, RolloutsConfig, "data_gen.rollouts", ["--output", "x", *argv])
    return seen[0]


@pytest.mark.parametrize(
    "argv",
    [
        ["--policy", "./mine", "--prover", "./theirs"],
        ["--prover", "./theirs"],
        ["--prover", "[{model: pav:prover}, {model: owner/name}]"],
    ],
)
def test_whoever_names_a_model_has_to_name_a_task(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        configured(*argv)
    (said,) = capsys.readouterr().err.splitlines()
    assert "is named, and no task; add one, e.g. --task.data problems.jsonl or --task Gsm8k" in said
    assert configured(*argv, "--task", "Tape").task == Tape()
    assert configured(*argv, "--task.data", "x.jsonl").task == Jsonl(data="x.jsonl")


def test_shipped_models_work_on_their_own_task() -> None:
    assert configured().task == Tape()
    assert configured("--policy", "pav:strong", "--prover", "pav:prover").task == Tape()
    assert configured("--policy", "pav:ledger").task == Ledger()


def test_a_setting_of_no_task_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        configured("--policy", "./mine", "--task.step_rule.max_tokens", "8")
    (said,) = capsys.readouterr().err.splitlines()
    assert "--task.step_rule.max_tokens is a setting of a task, and none is named" in said


def test_search_without_a_verifier_asks_for_the_task_of_an_own_model(
    tiny_model: Callable[..., Path],
) -> None:
    with pytest.raises(UserError, match="no task; add one"):
        best_of_n(BestOfNConfig(pick="majority", policy=PolicyConfig(str(tiny_model("llama")))))


def test_prover_without_a_prompt_is_asked_as_the_policy_is() -> None:
    chat = ["--task", "Gsm8k", "--policy", "./a", "--policy.prompt.chat", "true",
            "--policy.prompt.system", "Add."]  # fmt: skip
    policy, prover = configured(*chat, "--prover", "./b").policies
    assert prover.prompt == policy.prompt == Prompt(chat=True, system="Add.")
    _, *several = configured(*chat, "--prover", "[{model: ./b}, {model: ./c}]").policies
    assert [p.prompt for p in several] == [policy.prompt] * 2
    # What is said of a prover holds, also where it is what a prompt is by default.
    _, raw = configured(*chat, "--prover", "./b", "--prover.prompt.chat", "false").policies
    assert raw.prompt == Prompt(chat=False)
    _, own = configured(
        *chat, "--prover", "./b", "--prover.prompt.template", "P {question}"
    ).policies
    assert own.prompt == Prompt("P {question}")


def test_trunk_is_the_labels_policy_and_asked_alike_by_default(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from pav.labels.tables import read_labels

    labels = read_labels([write_labels(tmp_path / "labels", tiny_model("llama"))])
    card = new_card(TrainConfig([]), labels, TASK)
    assert card.trunk == card.policy["model"] == str(tiny_model("llama"))
    assert card.prompt == card.policy["prompt"]
    own = new_card(TrainConfig([], trunk="pav:strong", prompt=Prompt("T {question}")), labels, TASK)
    assert (own.trunk, own.prompt["template"]) == ("pav:strong", "T {question}")


def test_what_is_recorded_of_prompt_and_sampler_is_what_it_was() -> None:
    card = load_verifier("pav:reference").card
    loaded = load_policy(PolicyConfig(card.policy["model"]), Tape().step_rule)
    assert loaded.fingerprint == card.policy_fingerprint
    assert asdict(loaded.config) == card.policy
    assert prompt_from(asdict(Prompt())) == prompt_from(card.prompt)
    problems = list(p for p, _ in zip(Tape().problems("train"), range(300), strict=False))
    settled, _ = settle_cap(Sampler(), Tape(), [loaded], problems)
    assert asdict(settled) == card.sampler


def test_help_shows_the_fields_of_settings_that_may_be_absent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        configured("--help")
    said = capsys.readouterr().out
    for option in ("--prover.model", "--prover.prompt.chat", "--prover.prompt.few_shot",
                   "--policy.prompt.chat", "--sampler.max_length"):  # fmt: skip
        assert said.count(f"  {option} ") == 1, option


def test_length_cap_is_the_longest_prompt_and_room_for_a_solution(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PolicyConfig(str(tiny_model("llama", "chat")), prompt=Prompt(chat=True))
    policy = load_policy(config, Tape().step_rule)
    problems = [Problem(str(i), "x" * i) for i in range(0, 60, 7)]
    longest = len(policy.encode(problems[-1]))
    monkeypatch.setattr(Gsm8k, "max_solution_tokens", 100)
    task = Gsm8k(data="x.jsonl")
    sampler, said = settle_cap(Sampler(temperature=0.5), task, [policy], problems)
    assert sampler == Sampler(temperature=0.5, max_length=longest + 100)
    assert said == (
        f"length cap: {longest + 100} tokens (by default) = prompt (longest {longest}) + solution "
        "100"
    )
    # The longest prompt is any policy's.
    wordy = load_policy(like(PolicyConfig(config.model), PolicyConfig(prompt=Prompt(
        "Please: {question}", chat=True))), Tape().step_rule)  # fmt: skip
    both, _ = settle_cap(Sampler(), task, [policy, wordy], problems)
    assert both.max_length == len(wordy.encode(problems[-1])) + 100 > longest + 100
    # A model reads no more than it has positions; what is given is what holds.
    monkeypatch.setattr(Gsm8k, "max_solution_tokens", 1000)
    assert settle_cap(Sampler(), task, [policy], problems)[0].max_length == 256
    assert settle_cap(Sampler(max_length=90), task, [policy], problems)[0].max_length == 90
    with pytest.raises(UserError, match=r"leave no room for a solution: the model .* reads 256"):
        settle_cap(Sampler(), task, [policy], [Problem("long", "x" * 300)])


def test_opening_shows_how_every_policy_is_asked_and_obeys_no_escape(
    tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model("llama", "chat"))
    rule = Tape().step_rule
    base = load_policy(PolicyConfig(model, prompt=Prompt(chat=True)), rule)
    raw = load_policy(PolicyConfig(model, name="raw", prompt=Prompt("Q {question}")), rule)
    first = Problem("p", "How\n\x1b]0;owned\x07 many?")
    print_opening(Tape(n_ops=3), "5 train problems", [("policy", base), ("prover", base),
                  ("prover", raw)], first, Sampler(max_length=99), "length cap: 99")  # fmt: skip
    said = capsys.readouterr().out
    assert said.splitlines()[0] == 'task: tape {"n_ops": 3}; 5 train problems'
    assert f"policy: {model} (chat prompt), float32\n" in said
    assert f"prover: {model} (raw prompt, another than the policy's), float32\n" in said
    assert said.count("first prompt of") == 2
    assert "  | <|im_start|>user\n  | How\n  | \\x1b]0;owned\\x07 many?\n  | <|im_end|>\n" in said
    assert "  | Q How\n" in said
    assert "\x1b" not in said and "\x07" not in said


@given(st.text())
def test_block_shows_every_line_and_obeys_none(text: str) -> None:
    shown = block(text, most=None).split("\n")
    assert [line.removeprefix("  | ") for line in shown] == printable(text).split("\n")


def test_task_option_names_a_task_and_its_settings_again() -> None:
    assert task_option(task_spec(Tape(n_ops=3))) == ""
    assert task_option(task_spec(Tape()), always=True) == " --task Tape"
    import shlex

    words = shlex.split(task_option(task_spec(Tape(n_ops=3, sft_keys="+ '")), always=True))
    assert configured("--policy", "./mine", *words).task == Tape(n_ops=3, sft_keys="+ '")
    assert task_option({"class_path": "my.Own", "init_args": {}}) == " --task my.Own"


def test_hub_that_does_not_answer_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    import datasets
    from huggingface_hub import constants

    # Nothing listens on the port of "discard"; the hub's client would try six times.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.offline_if_unreachable.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(UserError) as refused:
                Gsm8k().fingerprint  # noqa: B018
        assert model_path("owner/name") == "owner/name"
        with pytest.raises(UserError, match="cannot load a tokenizer from 'owner/name'"):
            load_policy(PolicyConfig("owner/name"), Tape().step_rule)
    hub.offline_if_unreachable.cache_clear()
    said = str(refused.value)
    assert "task.data 'openai/gsm8k' (config main, split train) is not in the cache" in said
    assert "--task.data problems.jsonl" in said and "HF_DATASETS_CACHE" in said
    assert capsys.readouterr().out.count("does not answer: only what is cached of it is used") == 1
    assert "Retrying" not in caplog.text
