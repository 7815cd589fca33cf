"""A user's own file is a task: splits, disjointness, fingerprint, and errors that name the line."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pav.cli.run import run
from pav.core.errors import UserError
from pav.tasks.base import Grade, Split, Task, split_of, task_spec
from pav.tasks.jsonl import Jsonl
from pav.tasks.tape import Tape

SHARED = Path(__file__).parents[3] / "shared" / "data"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def write(path: Path, rows: list[Any]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def sums(start: int, end: int) -> list[dict[str, Any]]:
    return [
        {"question": f"What is {i}+{i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"}
        for i in range(start, end)
    ]


def ids(task: Jsonl, split: Split) -> set[str]:
    return {p.id for p in task.problems(split)}


def test_one_file_is_split_by_hash_of_the_problem(tmp_path: Path) -> None:
    task = Jsonl(data=write(tmp_path / "a.jsonl", sums(0, 400)))
    problems = {split: list(task.problems(split)) for split in SPLITS}
    assert sum(map(len, problems.values())) == 400
    assert len(problems["train"]) > 300
    for split, part in problems.items():
        assert all(split_of(p.id) == split for p in part)
        assert [p.id for p in part] == sorted(p.id for p in part)
    first = problems["train"][0]
    assert task.grade(f"It is #### {first.gold}.0", first) == Grade(first.gold, True)


def test_problems_of_the_test_file_are_in_no_other_split(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl.gz", sums(0, 400))
    # The same problem in other letters and spacing is the same problem.
    shouted = [row | {"question": row["question"].upper() + " "} for row in sums(380, 400)]
    test = write(tmp_path / "test.jsonl", shouted + sums(400, 410))
    task = Jsonl(data=data, test=test)
    assert len(ids(task, "test")) == 30
    assert len(ids(task, "train") | ids(task, "validation")) == 380
    assert not ids(task, "test") & (ids(task, "train") | ids(task, "validation"))
    assert not ids(task, "train") & ids(task, "validation")
    assert all(split_of(pid) == "validation" for pid in ids(task, "validation"))


def test_repeated_problems_count_once(tmp_path: Path) -> None:
    once = Jsonl(data=write(tmp_path / "a.jsonl", sums(0, 100)))
    twice = Jsonl(data=write(tmp_path / "b.jsonl", sums(0, 100) + sums(0, 100)))
    assert [list(once.problems(s)) for s in SPLITS] == [list(twice.problems(s)) for s in SPLITS]


def test_fingerprint_follows_the_content_not_the_path(tmp_path: Path) -> None:
    task = Jsonl(data=write(tmp_path / "a.jsonl", sums(0, 100)))
    moved = Jsonl(data=write(tmp_path / "moved.jsonl.gz", sums(0, 100)))
    changed = Jsonl(data=write(tmp_path / "c.jsonl", [*sums(0, 99), *sums(100, 101)]))
    tested = replace(task, test=write(tmp_path / "test.jsonl", sums(200, 210)))
    assert task.fingerprint == moved.fingerprint
    assert len({t.fingerprint for t in (task, changed, tested, replace(task, grader="math"))}) == 4


def test_task_is_made_again_from_its_spec(tmp_path: Path) -> None:
    task = Jsonl(data=write(tmp_path / "a.jsonl", sums(0, 100)), grader="exact")
    list(task.problems("train"))
    spec = json.loads(json.dumps(task_spec(task)))
    assert spec["class_path"] == "pav.tasks.jsonl.Jsonl"
    spec["init_args"]["step_rule"] = task.step_rule
    assert Jsonl(**spec["init_args"]) == task


def test_reference_text_alone_is_a_task_where_nothing_is_graded(tmp_path: Path) -> None:
    rows = [{"question": f"Prove {i}.", "answer": f"Clear.\nQED {i}"} for i in range(100)]
    task = Jsonl(data=write(tmp_path / "a.jsonl", rows), grader="none")
    problem = next(task.problems("train"))
    assert problem.gold is not None and problem.gold.startswith("Clear.\nQED")
    assert task.grade("Clear.", problem) == Grade(None, False)


def test_a_number_is_an_answer(tmp_path: Path) -> None:
    rows = [{"q": f"{i}?", "a": float(i)} for i in range(50)]
    task = Jsonl(data=write(tmp_path / "a.jsonl", rows), question_key="q", answer_key="a")
    assert {int(p.gold or -1) for s in ("train",) for p in task.problems(s)} <= set(range(50))


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("", {}, r"task.data '.*a.jsonl' holds no problems; give another file"),
        ("\n \n", {}, "holds no problems"),
        (
            '{"problem": "1+1?", "answer": "2"}\n',
            {},
            r"line 1: no key 'question'; there are 'problem', 'answer': set task.question_key to",
        ),
        (
            '{"question": "1+1?", "solution": "2"}\n',
            {},
            r"no key 'answer'; there are 'question', 'solution': set task.answer_key to",
        ),
        ('{"question": "1", "answer": "1"}\n{"question', {}, r"line 2: not JSON \(.*\); write one"),
        ("[" * 100_000 + "\n", {}, "line 1: not JSON"),
        ("\ufffd\x00\n", {}, "line 1: not JSON"),
        ("[1, 2]\n", {}, "line 1: not a JSON object; write one object a line"),
        ('{"question": "1", "answer": null}\n', {}, "'answer' is NoneType; it must be text"),
        ('{"question": "1", "answer": true}\n', {}, "'answer' is bool; it must be text"),
        (
            '{"question": "1", "answer": "two"}\n',
            {},
            r"line 1: 'answer' holds no number: 'two'; mend it, or choose another task.grader",
        ),
        ('{"question": "1", "answer": " "}\n', {"grader": "math"}, "'answer' holds no answer"),
        ('{"question": "1", "answer": ""}\n', {"grader": "none"}, "'answer' holds no text"),
    ],
)
def test_bad_data_is_one_line_that_names_the_place_and_the_fix(
    tmp_path: Path, content: str, settings: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        Jsonl(data=str(path), **settings).problems("train")
    assert "\n" not in str(error.value)


def test_missing_broken_and_unnamed_files_are_errors(tmp_path: Path) -> None:
    broken = tmp_path / "a.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"question": "1", "answer": "1"}\n' * 1000)[:-20])
    for data, message in [
        (str(tmp_path / "no.jsonl"), "is no file; give the path of a .jsonl or .jsonl.gz file"),
        ("", "task.data is empty; give a .jsonl file"),
        (str(broken), "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            Jsonl(data=data).problems("train")
    with pytest.raises(UserError, match=r"task.test '.*' is no file"):
        Jsonl(data=write(tmp_path / "b.jsonl", sums(0, 9)), test="no.jsonl").problems("train")


def test_split_without_problems_is_an_error(tmp_path: Path) -> None:
    task = Jsonl(data=write(tmp_path / "a.jsonl", sums(0, 2)))
    empty = next(s for s in SPLITS if not any(split_of(p.id) == s for p in task._loaded.splits[s]))
    with pytest.raises(UserError, match=rf"no problem for the {empty} split \(2 problems in all"):
        task.problems(empty)


def test_data_sets_are_loaded_by_owner_name_config_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # datasets treats a directory owner/name like the repository of that name on the hub.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "acme" / "sums"
    repository.mkdir(parents=True)
    write(repository / "train.jsonl", sums(0, 100))
    write(repository / "test.jsonl", sums(100, 110))
    task = Jsonl(data="acme/sums", test="acme/sums")
    assert len(ids(task, "test")) == 10
    assert len(ids(task, "train") | ids(task, "validation")) == 100
    assert len(ids(Jsonl(data="acme/sums:default:test", test="acme/sums"), "test")) == 10
    with pytest.raises(UserError, match=r"'acme/sums' \(config None, split dev\) cannot be loaded"):
        Jsonl(data="acme/sums::dev").problems("train")


@dataclass(frozen=True)
class TaskConfig:
    """A command with a task.

    Args:
        task: the task.
    """

    task: Task = field(default_factory=Tape)


def test_data_alone_on_the_command_line_means_this_task(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "1?", "a": "1"}])
    seen: list[TaskConfig] = []
    argv = ["--task.data", path, "--task.question_key", "q", "--task.answer_key", "a"]
    run(seen.append, TaskConfig, "test", [*argv, "--task.step_rule.min_tokens", "2"])
    task = seen[0].task
    assert isinstance(task, Jsonl)
    assert (task.data, task.question_key, task.step_rule.min_tokens) == (path, "q", 2)


def test_error_in_the_data_ends_a_command_with_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(config: TaskConfig) -> None:
        config.task.problems("train")

    with pytest.raises(SystemExit) as exit_info:
        run(command, TaskConfig, "data_gen.rollouts", ["--task.data", str(tmp_path / "no.jsonl")])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("data_gen.rollouts: error: task.data '")


@pytest.mark.skipif(not SHARED.exists(), reason="needs GSM8K and MATH-500 in ../shared/data")
def test_gsm8k_and_math_load_with_a_gold_answer_for_every_problem() -> None:
    gsm8k = Jsonl(
        data=str(SHARED / "gsm8k_train.jsonl.gz"), test=str(SHARED / "gsm8k_test.jsonl.gz")
    )
    sizes = {split: len(ids(gsm8k, split)) for split in SPLITS}
    assert sizes["test"] == 1319
    assert sizes["train"] + sizes["validation"] == 7473
    math = Jsonl(
        data=str(SHARED / "math500.jsonl.gz"),
        question_key="problem",
        answer_key="answer",
        grader="boxed",
    )
    whole = replace(math, answer_key="solution")
    for bare, boxed in zip(math.problems("train"), whole.problems("train"), strict=True):
        assert bare.gold == boxed.gold
