"""Half a character is no text: refused where it enters, by line and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.config import RolloutsConfig
from data_gen.importers.formats import read_solutions
from data_gen.importers.traces import given_rounds
from data_gen.rollouts import rollouts
from data_gen.store import Store
from pav.core.errors import UserError
from pav.core.text import check_text, no_text
from pav.evaluate.processbench_data import read_subsets
from pav.labels.tables import AGREE, Trace, read_labels
from pav.policy.policy import PolicyConfig, Prompt, Sampler, load_policy
from pav.tasks.base import Problem, problem_id
from pav.tasks.jsonl import Jsonl
from pav.tasks.tape import Tape
from search.serve.chat import ApiError, parse_chat

HALF = "\ud83d"
WHOLE = "\U0001f600"

plain = st.recursive(
    st.none() | st.integers() | st.text() | st.text(st.characters(categories=["Cs", "Lu"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(st.characters(categories=["Cs", "Lu"]), max_size=2), inner)
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(plain)
def test_what_passes_can_be_written_and_what_does_not_cannot(value: Any) -> None:
    # Reading joins the two halves that JSON spells a character in.
    value = json.loads(json.dumps(value))
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        with pytest.raises(
            UserError, match=r"^x: .+ holds the lone surrogate U\+D[8-F].."
        ) as error:
            check_text(value, "x")
        str(error.value).encode()
    else:
        check_text(value, "x")
        assert no_text(value) is None


def lines(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def swapped(row: dict[str, Any], field: str) -> dict[str, Any]:
    """A copy of a row with half a character at the end of a text in it."""
    copy = json.loads(json.dumps(row))
    at: Any = copy
    *way, last = [int(k) if k.isdigit() else k for k in field.replace("]", "").replace("[", ".").split(".")]  # noqa: E501  # fmt: skip
    for key in way:
        at = at[key]
    at[last] += HALF
    return copy


TASK_ROW = {"question": "What is 1 + 1?", "answer": "2"}
BENCH = {"id": "a", "problem": "1+1", "steps": ["1+1=2", "A2"], "label": -1}
TRL = {"prompt": "Why?", "completions": ["One.", "Two."], "labels": [True, False]}
SHEPHERD = {"input": "Why? Step 1: x ки", "label": "Why? Step 1: x +"}
PRM = {
    "question": {"problem": "Why?", "ground_truth_answer": "5"},
    "label": {
        "steps": [{"completions": [{"text": "x", "rating": 1}], "chosen_completion": 0}],
        "finish_reason": "solution",
    },
}
READERS: dict[str, Callable[[str], Any]] = {
    "task": lambda file: list(Jsonl(data=file).problems("train")),
    "bench": lambda file: read_subsets("data", file),
    "trl": lambda file: list(read_solutions(file, "trl", None)),
    "math_shepherd": lambda file: list(read_solutions(file, "math_shepherd", None)),
    "prm800k": lambda file: list(read_solutions(file, "prm800k", None)),
}


@pytest.mark.parametrize(
    ("reader", "row", "field"),
    [
        ("task", TASK_ROW, "question"),
        ("task", TASK_ROW, "answer"),
        ("bench", BENCH, "id"),
        ("bench", BENCH, "problem"),
        ("bench", BENCH, "steps[1]"),
        ("trl", TRL, "prompt"),
        ("trl", TRL, "completions[0]"),
        ("math_shepherd", SHEPHERD, "input"),
        ("math_shepherd", SHEPHERD, "label"),
        ("prm800k", PRM, "question.problem"),
        ("prm800k", PRM, "question.ground_truth_answer"),
        ("prm800k", PRM, "label.steps[0].completions[0].text"),
    ],
)
def test_half_a_character_in_a_file_is_named_by_line_and_field(
    reader: str, row: dict[str, Any], field: str, tmp_path: Path
) -> None:
    file = lines(tmp_path / "x.jsonl", row, swapped(row, field))
    with pytest.raises(UserError, match=r"x.jsonl line 2: ") as error:
        READERS[reader](file)
    assert f"line 2: {field} holds the lone surrogate U+D83D, half a character" in str(error.value)
    assert "\n" not in str(error.value)
    # A character that JSON spells in two halves is whole.
    whole = json.dumps(row).replace("Why?", "Why? \\ud83d\\ude00").replace("What", "\\ud83d\\ude00")
    (tmp_path / "y.jsonl").write_text("\n".join([whole] * 40))
    if reader != "task":  # which asks for more than one problem
        READERS[reader](str(tmp_path / "y.jsonl"))


def test_half_a_character_in_seeds_is_named_by_line_and_field(tmp_path: Path) -> None:
    policy = load_policy(PolicyConfig("pav:base"), Tape().step_rule)
    problem = next(Tape().problems("train"))
    good = {"problem_id": problem.id, "text": "1+1=2\nA2", "policy": "me"}
    for field in good:
        file = lines(tmp_path / "x.jsonl", good, swapped(good, field))
        with pytest.raises(UserError, match=rf"line 2: {field} holds the lone surrogate U\+D83D"):
            given_rounds(file, [("train", problem)], policy, 99)


def test_nothing_is_sampled_for_a_row_that_could_not_be_written(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(60)]
    rows[40]["question"] = f"What is {HALF}?"
    data = lines(tmp_path / "x.jsonl", *rows)
    config = RolloutsConfig(str(tmp_path / "run"), Jsonl(data=data), problems=1)
    with pytest.raises(UserError, match=r"line 41: question holds the lone surrogate"):
        rollouts(config)
    assert not (tmp_path / "run").exists()
    # A task of one's own is not read from a file.
    with pytest.raises(UserError, match=r"question 'What is \\ud83d\?': text holds the lone"):
        problem_id(f"What is {HALF}?")
    with pytest.raises(UserError, match="problem 'p': gold holds the lone surrogate"):
        Problem("p", "What?", HALF)


@pytest.mark.parametrize(
    "prompt",
    [
        {"template": f"{{question}}{HALF}"},
        {"system": HALF},
        {"few_shot": [("q", HALF)]},
        {"assistant_prefix": HALF},
        {"chat_template_kwargs": {"date": HALF}},
    ],
)
def test_half_a_character_in_a_prompt_is_refused(prompt: dict[str, Any]) -> None:
    [field] = prompt
    with pytest.raises(UserError, match=rf"^prompt: {field}.* holds the lone surrogate"):
        Prompt(**prompt)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [{"role": "user", "content": f"1+1{HALF}"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, "messages"),
        ({"model": HALF}, "model"),
        ({"user": HALF}, "user"),
        ({"stop": [HALF]}, "stop"),
        ({HALF: 1}, None),
    ],
)
def test_a_request_with_half_a_character_is_a_bad_request(
    change: dict[str, Any], param: str | None
) -> None:
    body = {"model": "pav-beam-4", "messages": [{"role": "user", "content": f"1+1{WHOLE}"}]}
    assert parse_chat(body, Sampler()).question == f"1+1{WHOLE}"
    with pytest.raises(ApiError, match="holds the lone surrogate U\\+D83D") as error:
        parse_chat(body | change, Sampler())
    assert (error.value.status, error.value.param) == (400, param)
    json.dumps(error.value.body, ensure_ascii=False).encode()


def test_zero_characters_and_others_that_look_odd_are_text(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    odd = "1\0+1 \ufffe\ufeff\u2028\x1b[31m\x85?"
    data = lines(tmp_path / "x.jsonl", *[{"question": f"{odd}{i}", "answer": i} for i in range(60)])
    problem = next(Jsonl(data=data).problems("train"))
    model = PolicyConfig(str(tiny_model("llama", "chat")), prompt=Prompt(chat=True))
    policy = load_policy(model, Jsonl.step_rule)
    assert problem.question in policy.text(policy.encode(problem))
    manifest = dict.fromkeys(AGREE, "x") | {"rollout_policies": {}}
    with Store(tmp_path / "run", manifest) as store:
        store.add(Trace("t", problem.id, problem.question, problem.gold, "train", "me", 0, [5, 6],
                        [2], odd, True, False))  # fmt: skip
        store.seal({})
    [trace] = read_labels([str(tmp_path / "run")]).traces
    assert (trace.question, trace.answer) == (problem.question, odd)
