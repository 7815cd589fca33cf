"""Public data sets of labelled steps become label runs; searches become seeds; cards say so."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_gen.importers.command import ImportConfig, encode, import_labels
from data_gen.importers.formats import ImportedSolution as Solution
from data_gen.importers.formats import ImportedStep as Step
from data_gen.importers.formats import read_solutions
from data_gen.importers.traces import given_rounds
from data_gen.merge import MergeConfig, merge
from data_gen.regrade import RegradeConfig, regrade
from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.steps import StepRule, compile_rule
from pav.evaluate.processbench import encode as bench_encode
from pav.evaluate.processbench_data import AnnotatedSolution as Bench
from pav.labels.examples import orm_examples, pav_examples
from pav.labels.tables import prefix_key, read_labels
from pav.policy.encoding import encode_after_step, encode_steps
from pav.policy.policy import Policy, PolicyConfig, Prompt, Sampler, load_policy
from pav.tasks.base import Problem, problem_id, split_of
from pav.tasks.jsonl import Jsonl
from pav.tasks.tape import Tape, tape_tokenizer
from pav.train.command import TrainConfig, train
from pav.verifier.forced_answer import answer_ids
from pav.verifier.pick import Candidate
from search.run.records import Record, append

SHEPHERD = {
    "input": "Ann has 3 pens and buys 4. How many? Step 1: 3 + 4 = <<3+4=7>>7 ки\n"
    "Step 2: She gives none away. ки\nStep 3: She has 7 pens. The answer is: 7 ки",
    "label": "Ann has 3 pens and buys 4. How many? Step 1: 3 + 4 = <<3+4=7>>7 +\n"
    "Step 2: She gives none away. -\nStep 3: She has 7 pens. The answer is: 7 +",
    "task": "GSM8K",
}
PRM800K = {
    "labeler": "x", "timestamp": "2022-07-17", "generation": None,
    "is_quality_control_question": False, "is_initial_screening_question": False,
    "question": {"problem": "What is 2 + 3?", "ground_truth_answer": "5"},
    "label": {
        "steps": [
            {"completions": [{"text": "Add them.", "rating": 0, "flagged": None},
                             {"text": "Multiply them.", "rating": -1, "flagged": None}],
             "human_completion": None, "chosen_completion": 0},
            {"completions": [{"text": "I forget.", "rating": -1, "flagged": False}],
             "human_completion": {"text": "2 + 3 is 5.", "rating": None, "flagged": None},
             "chosen_completion": None},
            {"completions": [{"text": "So it is 5.\n\n# Answer\n\n5", "rating": 1}],
             "human_completion": None, "chosen_completion": 0},
        ],
        "total_time": 1000, "finish_reason": "solution",
    },
}  # fmt: skip
TRL = {
    "prompt": "Which is larger, 9.8 or 9.11?",
    "completions": ["Compare .80 and .11.", "9.8 is larger."],
    "labels": [True, False],
}


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> PolicyConfig:
    return PolicyConfig(str(tiny_model("llama", "chat")), prompt=Prompt(chat=True))


@pytest.fixture(scope="module")
def policy(model: PolicyConfig) -> Policy:
    return load_policy(model, StepRule())


def test_math_shepherd_is_read_step_by_step(tmp_path: Path) -> None:
    found = list(read_solutions(written(tmp_path / "x.jsonl", SHEPHERD), "math_shepherd", None))
    assert found == [
        [
            Solution(
                "Ann has 3 pens and buys 4. How many?",
                "7",
                [
                    Step("Step 1: 3 + 4 = <<3+4=7>>7", True),
                    Step("Step 2: She gives none away.", False),
                    Step("Step 3: She has 7 pens. The answer is: 7", True),
                ],
                True,
            )
        ]
    ]


def test_prm800k_is_the_chosen_path_and_every_rated_alternative(tmp_path: Path) -> None:
    given_up = {**PRM800K, "label": {"steps": [], "finish_reason": "give_up"}}
    file = tmp_path / "x.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, [PRM800K, given_up])).encode()))
    first, second = read_solutions(str(file), "prm800k", None)
    assert second == []
    question = ("What is 2 + 3?", "5")
    assert first == [
        Solution(*question, [Step("Add them.", True), Step("2 + 3 is 5.", None),
                             Step("So it is 5.\n\n# Answer\n\n5", True)], True),
        Solution(*question, [Step("Multiply them.", False)], False),
        Solution(*question, [Step("Add them.", None), Step("I forget.", False)], False),
    ]  # fmt: skip
    found_error = json.loads(json.dumps(PRM800K))
    found_error["label"]["finish_reason"] = "found_error"
    found_error["label"]["steps"] = found_error["label"]["steps"][:2]
    found_error["label"]["steps"][1]["human_completion"] = None
    [rows] = read_solutions(written(tmp_path / "y.jsonl", found_error), "prm800k", None)
    assert [s.complete for s in rows] == [False, False, False]
    assert [s.steps[-1].label for s in rows] == [True, False, False]


def test_trl_layout_is_read_from_json_lines_and_from_parquet(tmp_path: Path) -> None:
    wanted = [
        [
            Solution(
                "Which is larger, 9.8 or 9.11?",
                None,
                [Step("Compare .80 and .11.", True), Step("9.8 is larger.", False)],
                True,
            )
        ]
    ] * 2
    assert list(read_solutions(written(tmp_path / "x.jsonl", TRL, TRL), "trl", None)) == wanted
    pq.write_table(pa.Table.from_pylist([TRL, TRL, TRL]), tmp_path / "x.parquet")
    assert list(read_solutions(str(tmp_path / "x.parquet"), "trl", 2)) == wanted


def changed(row: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a row with another value at a dotted path."""
    copy = json.loads(json.dumps(row))
    at: Any = copy
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in way:
        at = at[key]
    at[last] = value
    return copy


@pytest.mark.parametrize(
    ("layout", "row", "said"),
    [
        ("trl", "{", "line 2: not JSON"),
        ("trl", "[]", "line 2: not a JSON object"),
        ("trl", changed(TRL, "prompt", [{"role": "user"}]), "prompt is .* it must be text"),
        ("trl", changed(TRL, "prompt", " "), "prompt is empty"),
        ("trl", changed(TRL, "labels", [True]), "completions has 2 entries, labels 1; give one"),
        ("trl", changed(TRL, "labels", "yes"), "labels is 'yes'; it must be a list"),
        ("trl", changed(TRL, "labels.1", 0.5), r"labels\[1\] is 0.5; it must be true or false"),
        ("trl", changed(TRL, "completions.0", None), r"completions\[0\] is None; it must be text"),
        ("math_shepherd", {"input": "x"}, "line 2: label is None; it must be text"),
        ("math_shepherd", changed(SHEPHERD, "input", "Q Step 1: x"), "does not end with the tag"),
        ("math_shepherd", changed(SHEPHERD, "label", "Ann"), "does not follow input at step 1"),
        ("math_shepherd", {"input": "x ки", "label": "x +"}, "no problem before 'Step 1:'"),
        ("math_shepherd", {"input": "", "label": ""}, "no problem before 'Step 1:'"),
        ("prm800k", {"question": {}}, "question.problem is None; it must be text"),
        ("prm800k", changed(PRM800K, "label", []), "label.finish_reason is None"),
        ("prm800k", changed(PRM800K, "label.steps", None), "label.steps is None; it must be a"),
        ("prm800k", changed(PRM800K, "label.steps.1", 7), r"label.steps\[1\] is 7; it must be an"),
        ("prm800k", changed(PRM800K, "label.steps.0.completions.1.text", None),
         r"label.steps\[0\].completions\[1\].text is None; it must be text"),
        ("prm800k", changed(PRM800K, "label.steps.0.completions.1.rating", 2),
         r"completions\[1\].rating is 2; it must be -1, 0, 1 or null"),
        ("prm800k", changed(PRM800K, "label.steps.0.chosen_completion", 2),
         r"label.steps\[0\].chosen_completion is 2; it must be null or a number below 2"),
    ],
)  # fmt: skip
def test_malformed_rows_are_named_by_line_and_field(
    layout: Any, row: Any, said: str, tmp_path: Path
) -> None:
    good = {"trl": TRL, "math_shepherd": SHEPHERD, "prm800k": PRM800K}[layout]
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(good) + "\n" + (row if isinstance(row, str) else json.dumps(row)))
    with pytest.raises(UserError, match=said) as error:
        list(read_solutions(str(file), layout, None))
    assert "line 2: " in str(error.value)
    assert "\n" not in str(error.value)
    # What was asked for ends before it.
    assert len(list(read_solutions(str(file), layout, 1))) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(
        st.sampled_from(
            ["prompt", "completions", "labels", "input", "label", "question", "problem", "steps",
             "finish_reason", "text", "rating", "chosen_completion", "human_completion"]
        ),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.sampled_from(["trl", "math_shepherd", "prm800k"]), json_values)
def test_no_row_whatever_does_anything_but_parse_or_raise_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, layout: Any, row: Any
) -> None:
    file = tmp_path_factory.mktemp("rows") / "x.jsonl"
    file.write_text(json.dumps(row))
    try:
        found = list(read_solutions(str(file), layout, None))
    except UserError:
        return
    assert all(s.steps for solutions in found for s in solutions)


@pytest.mark.parametrize("name", ["gone.jsonl", "torn.jsonl.gz", "torn.parquet"])
def test_files_that_cannot_be_read_are_named(name: str, tmp_path: Path) -> None:
    if "torn" in name:
        (tmp_path / name).write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=rf"data .*{name}' cannot be read .*; give a .jsonl"):
        list(read_solutions(str(tmp_path / name), "trl", None))


def test_a_label_is_one_of_one_at_the_prefix_that_ends_with_its_step(policy: Policy) -> None:
    a = Solution("Q1?", None, [Step("One.", True), Step("Two.", False), Step("Six.", True)], True)
    b = Solution("Q1?", None, [Step("One.", False), Step("Other.", True)], False)
    question = next(q for q in map("Q{}?".format, range(99)) if split_of(problem_id(q)) == "test")
    test = Solution(question, None, [Step("One.", True)], True)
    long = replace(a, steps=[Step("word " * 80, True)])
    closed = replace(a, steps=[Step("Two <|im_end|> of them.", True)])
    traces, labels, left = encode([a, b, a, test, long, closed], policy, "them", 60)
    assert left == {"repeated": 1, "of the test split": 1, "longer than sampler.max_length": 1,
                    "that the tokenizer changes": 1}  # fmt: skip
    pid = problem_id("Q1?")
    whole, part = traces
    assert policy.text(whole.ids) == "One.\nTwo.\nSix."
    assert whole.ids[-1] == policy.tokenizer.eos_token_id
    assert (whole.correct, whole.truncated) == (True, False)
    assert policy.text(part.ids) == "One.\nOther.\n"
    assert (part.correct, part.truncated) == (False, True)
    assert [whole.step_ends, part.step_ends] == [
        policy.stepper.step_ends(t.ids) for t in (whole, part)
    ]
    told = [(policy.text(c.prefix_ids), c.correct, c.index) for c in labels]
    # Of the complete solution the last step is an outcome; the shared prefix has two labels.
    assert told == [("One.\n", True, 0), ("One.\nTwo.\n", False, 0), ("One.\n", False, 1),
                    ("One.\nOther.\n", True, 0)]  # fmt: skip
    assert {c.prefix_key for c in labels if c.prefix_ids == whole.ids[: whole.step_ends[0]]} == {
        prefix_key(pid, whole.ids[: whole.step_ends[0]])
    }


def test_lines_inside_a_step_are_steps_without_labels(policy: Policy) -> None:
    first = Step("It is\nas follows.", True)
    [trace], labels, left = encode(
        [Solution("Q1?", None, [first, Step("So.", True)], True)], policy, "them", 60
    )
    assert [policy.text(trace.ids[:end]) for end in trace.step_ends] == [
        "It is\n", "It is\nas follows.\n", "It is\nas follows.\nSo."
    ]  # fmt: skip
    assert [policy.text(c.prefix_ids) for c in labels] == ["It is\nas follows.\n"]
    assert not left


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a text begins with "▁", spaces are "▁", other characters fall to bytes."""
    letters = [chr(c) for c in range(33, 127)]
    pieces = ["▁", *letters, "▁T", "▁S", "▁a", "An", "d."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    core = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(tokens)},
            [("▁", "T"), ("▁", "S"), ("▁", "a"), ("A", "n"), ("d", ".")],
            unk_token="<unk>", byte_fallback=True,
        )
    )  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def policy_of(tokenizer: Any) -> Policy:
    rule = compile_rule(StepRule(), tokenizer, [tokenizer.eos_token_id])
    return Policy(PolicyConfig("m"), "m", tokenizer, rule)


KINDS = {"sentencepiece": policy_of(sentencepiece_like()), "tape": policy_of(tape_tokenizer())}
# Any text that the tokenizer gives back; a step has no space around it.
steps_of = {
    "tape": st.lists(st.text("0123456789+-=A", min_size=1, max_size=6), min_size=1, max_size=5),
    "chat": st.lists(
        st.text("And S. ä\n", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=5
    ),
}
steps_of["sentencepiece"] = steps_of["chat"]


@pytest.mark.parametrize("kind", ["tape", "chat", "sentencepiece"])
@settings(deadline=None)
@given(data=st.data())
def test_given_solutions_have_the_tokens_of_the_whole_text(
    kind: str, data: st.DataObject, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    """As a policy that was trained on whole solutions writes them: a step is cut, never encoded."""
    policy = KINDS.setdefault(kind, policy_of(chat_tokenizer))
    steps = data.draw(steps_of[kind])
    complete = data.draw(st.booleans())
    found = encode_steps(policy, steps, "\n", complete)
    text = "\n".join(steps) + ("" if complete else "\n")
    own = policy.tokenizer.encode(text, add_special_tokens=False)
    assert found.ids == own + [policy.tokenizer.eos_token_id] * complete
    assert not found.is_changed
    assert found.ends[-1] == len(found.ids)
    # A step ends with the delimiter, where the step rule ends one unless it is too short.
    for i, end in enumerate(found.ends, 1):
        last = complete and i == len(steps)
        assert policy.text(found.ids[:end]) == "\n".join(steps[:i]) + ("" if last else "\n")
    if all(len(step) > 1 and "\n" not in step for step in steps):
        assert found.ends == policy.stepper.step_ends(found.ids)


def test_imported_steps_do_not_begin_as_a_text_does(tmp_path: Path) -> None:
    policy = KINDS["sentencepiece"]
    steps = [Step("Take 3.", True), Step("And 4.", False), Step("So 7.", True)]
    [trace], labels, _ = encode([Solution("Q1?", None, steps, True)], policy, "them", 60)
    tokens = policy.tokenizer.convert_ids_to_tokens(trace.ids)
    starts = [tokens[i] for i in (0, *trace.step_ends[:-1])]
    assert starts == ["▁T", "An", "S"]
    assert tokens[-1] == "</s>"
    assert [c.correct for c in labels] == [True, False]
    assert policy.text(labels[1].prefix_ids) == "Take 3.\nAnd 4.\n"
    # The two readers of steps agree, and so does the answer that is appended to a step.
    bench, own, is_changed = bench_encode(
        policy, Bench("a", "Q1?", [s.text for s in steps], -1), "\n"
    )
    assert (bench.ids[bench.prompt_length :], is_changed) == (trace.ids, False)
    assert [bench.ends[i] for i in own] == trace.step_ends
    assert encode_after_step(policy, "So 7.") == trace.ids[trace.step_ends[1] : -1]
    answer = answer_ids(Jsonl(grader="none"), policy, Problem("p", "Q1?", "So 7."))
    assert answer == trace.ids[trace.step_ends[1] :]


def test_a_math_shepherd_problem_with_steps_of_its_own_is_not_cut_there(tmp_path: Path) -> None:
    question = "Follow this. Step 1: Take 3. Step 2: Double it. What is left?"
    text = f"{question} Step 1: It is 3. @@\nStep 2: 2 * 3 = 6. The answer is: 6 @@"
    row = {"input": text.replace("@@", "ки"), "label": text.replace("@@", "+")}
    [[found]] = read_solutions(written(tmp_path / "x.jsonl", row), "math_shepherd", None)
    assert found.question == question
    assert [s.text for s in found.steps] == [
        "Step 1: It is 3.", "Step 2: 2 * 3 = 6. The answer is: 6"
    ]  # fmt: skip


def test_a_bad_row_is_named_or_skipped_and_counted(
    model: PolicyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = shepherd_rows(20)
    empty = {"input": "Why? Step 1: x ки\n ки", "label": "Why? Step 1: x +\n +"}
    rows[4:4] = [empty]
    rows[9:9] = [[], {"input": 3}, {"input": "\ud83d", "label": ""}]
    file = Path(written(tmp_path / "x.jsonl", *rows))
    file.write_text(file.read_text() + "{")
    argv = ["--format", "math_shepherd", "--data", str(file), "--policy.model", model.model,
            "--policy.prompt.chat", "true", "--grader", "number"]  # fmt: skip
    with pytest.raises(SystemExit):
        run(import_labels, ImportConfig, "data_gen.import_labels",
            [*argv, "--output", str(tmp_path / "a")])  # fmt: skip
    told = capsys.readouterr().err
    assert "x.jsonl line 5: input has an empty step 2; mend or drop the line" in told
    assert "--skip_bad_rows" in told and told.count("\n") == 1
    assert not (tmp_path / "a").exists()
    run(import_labels, ImportConfig, "data_gen.import_labels",
        [*argv, "--output", str(tmp_path / "a"), "--skip_bad_rows"])  # fmt: skip
    said = capsys.readouterr()
    assert "5 bad rows are skipped; the first: data" in said.err
    assert "5 bad rows" in said.out.partition("left out: ")[2].splitlines()[0]
    clean = written(tmp_path / "y.jsonl", *shepherd_rows(20))
    import_labels(ImportConfig("math_shepherd", clean, str(tmp_path / "b"), model, grader="number"))
    skipped, whole = (read_labels([str(tmp_path / name)]) for name in "ab")
    assert skipped.traces == whole.traces and skipped.counts == whole.counts
    bad = written(tmp_path / "z.jsonl", empty)
    with pytest.raises(
        UserError, match=r"holds no solutions \(1 bad rows, the first: data .* line 1"
    ):
        import_labels(ImportConfig("math_shepherd", bad, str(tmp_path / "c"), model,
                                   skip_bad_rows=True))  # fmt: skip


def shepherd_rows(count: int) -> list[dict[str, Any]]:
    """Rows about sums; every third one goes wrong in its last step."""
    rows = []
    for i in range(count):
        sign = "-" if i % 3 == 0 else "+"
        text = f"What is {i} plus 1? Step 1: Take {i}. @@\nStep 2: The answer is: {i + 1} @@"
        marked = text.replace("@@", "+", 1).replace("@@", sign)
        rows.append({"input": text.replace("@@", "ки"), "label": marked, "task": "GSM8K"})
    return rows


def test_pav_train_reads_imported_labels_and_nothing_else_is_lost(
    model: PolicyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "x.jsonl", *shepherd_rows(120))
    output = str(tmp_path / "labels")
    config = ImportConfig("math_shepherd", file, output, model, sampler=Sampler(max_length=120),
                          grader="number")  # fmt: skip
    import_labels(config)
    assert "of the test split" in capsys.readouterr().out
    labels = read_labels([output])
    assert {t.split for t in labels.traces} == {"train", "validation"}
    assert set(labels.counts.values()) == {(1, 1)}
    assert labels.policies == ["math_shepherd"]
    policy = load_policy(model, StepRule())
    heads = ["q/math_shepherd", "orm"]
    example = pav_examples(labels, "train", heads, policy, 120)[0]
    # Step 0 has no label, the first step one, the last is an outcome of both heads.
    assert example.n_PH.tolist() == [[0, 0], [1, 0], [1, 1]]
    # An imported label is no solution that an ORM could learn from.
    outcomes = orm_examples(labels, "train", policy, 120)
    assert len(outcomes) == len({tuple(t.ids) for t in labels.traces if t.split == "train"})

    card = train(TrainConfig([output], str(tmp_path / "pav.ckpt"), trunk=model.model, max_epochs=1))
    assert card.heads == heads
    assert card.base_head == "q/math_shepherd"
    # A search can go on from there: the checkpoint's task has the problems with known answers.
    from pav.verifier.checkpoint import resolve_task

    task = resolve_task(card.task, None, "verifier")
    problem = next(iter(task.problems("train")))
    number = problem.question.split()[2]
    assert problem.gold == str(int(number) + 1)

    with pytest.raises(UserError, match="is not empty; choose another directory"):
        import_labels(config)
    with pytest.raises(UserError, match="were imported: there are no rollouts to grade"):
        regrade(RegradeConfig(output))


def test_import_that_leaves_nothing_says_why(model: PolicyConfig, tmp_path: Path) -> None:
    file = written(tmp_path / "x.jsonl", *shepherd_rows(3))
    config = ImportConfig("math_shepherd", file, str(tmp_path / "labels"), model,
                          sampler=Sampler(max_length=8))  # fmt: skip
    with pytest.raises(UserError, match=r"no solution can be used \(3 longer than sampler.max_l"):
        import_labels(config)
    assert not (tmp_path / "labels").exists()
    wrong = written(tmp_path / "y.jsonl", {**TRL, "labels": [False, False]})
    with pytest.raises(UserError, match="tells no answer that grader 'none' can read; set grader"):
        import_labels(replace(config, format="trl", data=wrong, sampler=Sampler(max_length=200)))


def test_label_run_carries_a_data_card_by_which_datasets_finds_its_tables(
    model: PolicyConfig, tmp_path: Path
) -> None:
    file = written(tmp_path / "x.jsonl", *shepherd_rows(20))
    run = tmp_path / "labels"
    import_labels(ImportConfig("math_shepherd", file, str(run), model, grader="number"))
    merge(MergeConfig(str(tmp_path / "merged"), [str(run)]))
    for directory in (run, tmp_path / "merged"):
        card = DatasetCard.load(directory / "README.md")
        front = yaml.safe_load((directory / "README.md").read_text().split("---")[1])
        assert [c["config_name"] for c in front["configs"]] == ["labels", "traces", "completions"]
        assert front["size_categories"] == ["n<1K"]
        assert str(tmp_path) not in (directory / "README.md").read_text()
        assert 'load_dataset("parquet", data_files="DIRECTORY/labels/*.parquet")' in card.text
        cache = str(tmp_path / "cache")
        by_name = load_dataset(str(directory), "labels", split="train", cache_dir=cache)
        plain = load_dataset(
            "parquet", data_files=f"{directory}/labels/*.parquet", split="train", cache_dir=cache
        )
        assert by_name.to_list() == plain.to_list()
        assert len(plain) == len(read_labels([str(directory)]).counts)
    assert "imported from a file of the layout `math_shepherd`" in (run / "README.md").read_text()


def test_final_set_of_a_search_becomes_seeds(tmp_path: Path, tiny_model: Any) -> None:
    task = Tape(n_ops=3)
    policy = load_policy(PolicyConfig(str(tiny_model("llama"))), task.step_rule)
    problems = list(islice(task.problems("validation"), 3))

    def candidate(text: str, finished: bool = True) -> Candidate:
        ids = policy.tokenizer.encode(text, add_special_tokens=False)
        ids += [policy.tokenizer.eos_token_id] if finished else []
        ends = policy.stepper.step_ends(ids)
        return Candidate(ids, ends, {"q/base": [0.5]}, 0.5, finished, not finished)

    file = tmp_path / "beam.jsonl"
    sets = [[candidate("=1\nA1"), candidate("=2\nA2")], [candidate("=3\n", False)], []]
    for problem, found in zip(problems, sets, strict=True):
        append(file, Record(problem.id, problem.question, problem.gold, "beam", 16, 0, {},
                            candidates=found))  # fmt: skip
    known = [("validation", p) for p in problems]
    rounds = given_rounds(str(file), known, policy, 64)  # type: ignore[arg-type]
    assert [[(s.problem.id, s.writer, s.index) for s in seeds] for seeds in rounds] == [
        [(problems[0].id, "beam-16", 0), (problems[1].id, "beam-16", 0)],
        [(problems[0].id, "beam-16", 1)],
    ]
    assert rounds[0][1].given == (sets[1][0].ids, True)
    assert rounds[1][0].given == (sets[0][1].ids, False)
    # Other solutions may stand in the same file.
    with file.open("a") as stream:
        stream.write(json.dumps({"problem_id": problems[2].id, "text": "A1"}) + "\n")
    rounds = given_rounds(str(file), known, policy, 64)  # type: ignore[arg-type]
    assert rounds[0][2].writer == "given"
    with pytest.raises(UserError, match=r"beam.jsonl line 1 candidate 0: no problem .* among the"):
        given_rounds(str(file), known[2:], policy, 64)  # type: ignore[arg-type]
    broken = asdict(Record(problems[0].id, "", None, "beam", 2, 0, {})) | {"candidates": [{}]}
    with pytest.raises(UserError, match=r"line 1: candidates\[0\] has no ids"):
        given_rounds(written(file, broken), known, policy, 64)  # type: ignore[arg-type]
