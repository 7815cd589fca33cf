"""First wrong steps on a hand-made file, by a tiny verifier, with an F1 computed by hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.steps import StepRule, scoring_position
from pav.evaluate.processbench import ProcessBenchConfig, encode, processbench
from pav.evaluate.processbench_data import AnnotatedSolution, read_subsets
from pav.evaluate.processbench_f1 import Scores, f1_row, first_wrong, pick_threshold
from pav.policy.policy import PolicyConfig, Prompt, load_policy
from pav.tasks.base import Problem
from pav.tasks.tape import Tape
from pav.verifier.checkpoint import load_model, load_verifier

SOLUTIONS = [
    ("37+8*3", ["37+8=45", "45*3=35", "A35"]),
    ("12+5-4", ["12+5=17", "=17", "17-4=13", "A13"]),
    ("50*2+7", ["50*2+7=8", "A8"]),
    ("9*9-12", ["9*9=81", "81-12=69", "A69"]),
    ("60-29+3", ["60-29=21", "21+3=24", "A24"]),
]


def rows(labels: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"tape-{i}",
            "generator": "by hand",
            "problem": problem,
            "steps": steps,
            "final_answer_correct": label == -1,
            "label": label,
        }
        for i, ((problem, steps), label) in enumerate(zip(SOLUTIONS, labels, strict=True))
    ]


@pytest.fixture(scope="module")
def verifier(
    tiny_model: Callable[..., Path],
    make_verifier: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    path = tmp_path_factory.mktemp("verifier") / "pav.ckpt"
    make_verifier(tiny_model("llama"), path, heads=("q/base", "q/prover", "orm"))
    return str(path)


def q_by_prefix(name: str, head: int) -> list[list[float]]:
    """Q at the problem and after every step: one forward pass per prefix, nothing shared."""
    verifier = load_verifier(name)
    policy = load_policy(PolicyConfig(verifier.card.trunk), Tape().step_rule)
    model = load_model(verifier, verifier.card.trunk)
    calibrate = verifier.card.calibrator(verifier.card.heads[head], False)
    found = []
    for problem, steps in SOLUTIONS:
        prompt = policy.encode(Problem("", problem))
        values = []
        for n in range(len(steps) + 1):
            text = "\n".join(steps[:n])
            ids = prompt + policy.tokenizer.encode(text, add_special_tokens=False)
            with torch.inference_mode():
                logits = model.head_logits(model.hidden(torch.tensor([ids])))[0, -1]
            values.append(float(calibrate(logits.numpy()[head], None)))
        found.append(values)
    return found


def test_f1_is_the_one_computed_by_hand(verifier: str, tmp_path: Path) -> None:
    q = q_by_prefix(verifier, 1)
    after = [values[1:] for values in q]
    # Between two neighbouring scores, so that a last digit decides nothing.
    for low, high in pairwise(sorted(v for values in after for v in values)):
        threshold = (low + high) / 2
        found = [next((i for i, v in enumerate(v) if v < threshold), -1) for v in after]
        silent = [i for i, f in enumerate(found) if f == -1]
        loud = [i for i, f in enumerate(found) if f != -1]
        if silent and len(loud) >= 3 and high - low > 1e-4:
            break
    else:
        pytest.fail("this verifier needs other solutions")
    # Three solutions with an error, of which two are found, two without, of which one is called
    # right: whatever the verifier says, labels can be chosen so.
    labels = [0] * 5
    labels[silent[0]], labels[loud[2]] = -1, -1
    for i in loud[:2]:
        labels[i] = found[i]
    (missed,) = set(range(5)) - {silent[0], *loud[:3]}
    labels[missed] = 1 if found[missed] != 1 else 0
    data = tmp_path / "tape.json"
    data.write_text(json.dumps(rows(labels), indent=2))
    config = ProcessBenchConfig(
        verifier, str(data), threshold=threshold, surprise=False, output=str(tmp_path / "o.json")
    )
    result = processbench(config)
    row = result["subsets"][0]
    assert (row["subset"], row["n_error"], row["n_correct"]) == ("tape", 3, 2)
    assert row["error_accuracy"] == pytest.approx(2 / 3)
    assert row["correct_accuracy"] == pytest.approx(1 / 2)
    assert row["f1"] == pytest.approx(4 / 7) == pytest.approx(result["average_f1"])
    assert result["head"] == "q/prover"
    for told, values in zip(result["predictions"]["tape"], after, strict=True):
        assert told["scores"] == pytest.approx(values, abs=1e-5)
    assert json.loads((tmp_path / "o.json").read_text())["subsets"] == result["subsets"]


def test_the_advantage_of_a_step_is_the_change_of_q(verifier: str, tmp_path: Path) -> None:
    data = tmp_path / "tape.jsonl.gz"
    lines = "\n".join(json.dumps(row) for row in rows([0, 1, -1, -1, 0]))
    data.write_bytes(gzip.compress(lines.encode()))
    config = ProcessBenchConfig(
        verifier,
        str(data),
        threshold=0.0,
        head="q/base",
        score="advantage",
        surprise=False,
        output=str(tmp_path / "o.json"),
    )
    told = processbench(config)["predictions"]["tape"]
    for said, values in zip(told, q_by_prefix(verifier, 0), strict=True):
        assert said["scores"] == pytest.approx(np.diff(values).tolist(), abs=1e-5)


def test_the_command_prints_a_row_per_file_and_marks_where_the_threshold_was_picked(
    verifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sets").mkdir()
    for name, labels in [("easy", [0, 1, -1, -1, 0]), ("hard", [1, -1, 0, 2, -1])]:
        made = rows(labels)
        if name == "hard":
            made = [row | {"problem": row["problem"] + "+2"} for row in made]
        (tmp_path / "sets" / f"{name}.json").write_text(json.dumps(made))
    picked = tmp_path / "sets" / "easy.json"
    output = tmp_path / "out.json"
    argv = ["--verifier", verifier, "--data", str(tmp_path / "sets"), "--pick_on", str(picked)]
    run(processbench, ProcessBenchConfig, "pav.processbench", [*argv, "--output", str(output)])
    told = capsys.readouterr().out
    assert "easy (threshold picked here)" in told and "hard" in told and "average" in told
    result = json.loads(output.read_text())
    assert [row["threshold_picked_here"] for row in result["subsets"]] == [True, False]
    f1s = [row["f1"] for row in result["subsets"]]
    assert result["average_f1"] == pytest.approx(sum(f1s) / 2)
    # No other threshold does better on the file that it was picked on.
    scores = [Scores(np.array(p["scores"])) for p in result["predictions"]["easy"]]
    best = max(
        f1_row([0, 1, -1, -1, 0], [first_wrong(s, t) for s in scores])["f1"]
        for t in np.linspace(-0.1, 1.1, 2001)
    )
    assert f1s[0] == pytest.approx(best)


def test_a_solution_too_long_for_the_trunk_counts_as_wrong(
    verifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rows([0, 1, -1, -1, 0])
    made[2]["steps"] = ["50*2+7=8"] * 200
    data = tmp_path / "long.json"
    data.write_text(json.dumps(made))
    output = str(tmp_path / "o.json")
    row = processbench(ProcessBenchConfig(verifier, str(data), threshold=-1.0, output=output))[
        "subsets"
    ][0]
    assert (row["n_correct"], row["correct_accuracy"], row["unreadable"]) == (2, 0.5, 1)
    assert "1 solutions are longer than the trunk can read" in capsys.readouterr().err


def test_steps_end_at_the_token_that_holds_the_delimiter(tiny_model: Callable[..., Path]) -> None:
    """Tokens are those of the whole text: ``.\\n`` is one token, and a paragraph has its lines."""
    config = PolicyConfig(str(tiny_model("llama", "chat")), prompt=Prompt(chat=True))
    policy = load_policy(config, StepRule())
    steps = ["One line.\nA second line.", "  Then this.  ", "The end"]
    solution = AnnotatedSolution("a", "Why?", steps, -1)
    for separator in ("\n", "\n\n"):
        example, own, is_changed = encode(policy, solution, separator)
        assert not is_changed
        ids = example.ids[example.prompt_length :]
        texts = [policy.text(ids[: example.ends[i]]) for i in own]
        assert texts[0].rstrip("\n") == steps[0]
        assert texts[1].rstrip("\n") == f"{steps[0]}{separator}Then this."
        assert texts[2] == f"{steps[0]}{separator}Then this.{separator}The end"
        assert ids[-1] in policy.stepper.eos_ids
        assert example.ends == policy.stepper.step_ends(ids)
        assert len(example.ends) == 4
        assert list(example.positions_P) == [
            scoring_position(example.prompt_length, end) for end in (0, *example.ends)
        ]


GOOD = rows([0, 1, -1, -1, 0])[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, r"line 2: label is None; give the index of the first wrong step, or -1"),
        ({"label": 3}, r"line 2: label is 3 with 3 steps; give the index .* \(0 to 2\), or -1"),
        ({"label": -2}, r"line 2: label is -2 with 3 steps"),
        ({"label": True}, r"line 2: label is True"),
        ({"label": 1.0}, r"line 2: label is 1.0"),
        ({"steps": []}, r"line 2: steps is empty; give at least one step"),
        ({"steps": "37+8=45"}, r"line 2: steps is '37\+8=45'; give a list of texts"),
        ({"steps": ["1", 2]}, r"line 2: steps\[1\] is 2; give text"),
        ({"steps": [" ", "\n"]}, r"line 2: steps are all blank"),
        ({"problem": 7}, r"line 2: problem is 7; give the question as text"),
        ({"problem": " "}, r"line 2: problem is blank"),
        ({"id": 7}, r"line 2: id is 7; give text"),
        ({"final_answer_correct": 1}, r"line 2: final_answer_correct is 1; give true or false"),
    ],
)
@pytest.mark.parametrize("is_array", [True, False])
def test_a_malformed_row_is_named_by_line_and_field(
    tmp_path: Path, change: dict[str, Any], message: str, is_array: bool
) -> None:
    texts = [json.dumps(row) for row in (GOOD, GOOD | change)]
    data = tmp_path / "a.json"
    data.write_text("[" + ",\n".join(texts) + "]" if is_array else "\n".join(texts))
    with pytest.raises(UserError, match=message) as error:
        read_subsets("data", str(data))
    assert str(error.value).startswith(str(data)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no solutions"),
        ("[]", "holds no solutions"),
        ("[[]]", "line 1: a list, not an object"),
        (json.dumps(GOOD) + '\n{"id": "x"', "line 2: not JSON"),
        ("[" + json.dumps(GOOD), "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "steps"}), "no field 'steps'; add it"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_subsets("data", str(data))
    assert "\n" not in str(error.value)


def test_settings_that_cannot_work_are_refused(verifier: str, tmp_path: Path) -> None:
    data = tmp_path / "a.json"
    data.write_text(json.dumps(rows([0, 1, -1, -1, 0])))
    for settings, message in [
        ({}, "threshold and pick_on: give one of them"),
        ({"threshold": 0.5, "pick_on": str(data)}, "threshold and pick_on: give one of them"),
        ({"threshold": 0.5, "head": "q/none"}, "head is 'q/none'; give one of .* q/base, q/prover"),
        ({"threshold": 0.5, "separator": " "}, "separator is ' ', without the delimiter"),
        ({"threshold": 0.5, "output": "x.txt"}, "output is 'x.txt'; give a file name ending in"),
        ({"pick_on": "no.json"}, "pick_on 'no.json' does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            processbench(ProcessBenchConfig(verifier, str(data), **settings))
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "out.json")
    with pytest.MonkeyPatch.context() as patch:  # before the model is loaded
        patch.setattr("pav.evaluate.processbench.load_on_device", lambda *_: pytest.fail("loaded"))
        with pytest.raises(UserError, match=r"cannot be written .*; choose another"):
            processbench(ProcessBenchConfig(verifier, str(data), 0.5, output=nowhere))
    data.write_text(json.dumps(rows([0, 0, 0, 0, 0])))
    with pytest.raises(UserError, match="pick_on needs solutions with an error"):
        processbench(ProcessBenchConfig(verifier, str(data), pick_on=str(data)))


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 8).map(lambda i: i / 8), min_size=1, max_size=4),
            st.integers(-1, 3),
        ),
        min_size=2,
        max_size=8,
    )
)
def test_no_threshold_is_better_than_the_picked_one(pairs: list[tuple[list[float], int]]) -> None:
    labels = [min(label, len(steps) - 1) for steps, label in pairs]
    labels[0], labels[1] = -1, 0
    scores = [Scores(np.array(steps)) for steps, _ in pairs]

    def f1(threshold: float) -> float:
        return float(f1_row(labels, [first_wrong(s, threshold) for s in scores])["f1"])

    best = max(f1(i / 16) for i in range(-1, 20))
    assert f1(pick_threshold(labels, scores)) == pytest.approx(best)


def test_a_subset_without_errors_has_no_f1() -> None:
    assert f1_row([-1, -1], [-1, 0])["f1"] is None
    assert f1_row([-1, 0], [0, 1])["f1"] == 0.0
