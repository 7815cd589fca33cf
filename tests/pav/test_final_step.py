"""``step_rule.final``: a solution ends with the step that gives the answer, EOS or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.config import RolloutsConfig
from data_gen.importers.traces import given_rounds
from data_gen.rollouts import rollouts
from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.seeds import seed_of
from pav.core.steps import Stepper, StepRule, compile_rule
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.vllm import VllmEngine
from pav.export.vllm import export_verifier
from pav.policy.inference import Sampled
from pav.policy.policy import PolicyConfig, Sampler, load_policy
from pav.tasks.base import task_spec
from pav.tasks.gsm8k import Gsm8k
from pav.tasks.math import Math
from pav.tasks.tape import Tape, tape_tokenizer
from pav.verifier.checkpoint import load_verifier
from search.beam import BeamConfig, beam
from search.best_of_n import BestOfNConfig, best_of_n
from search.run.records import read

# A random model writes a 7 in every other step or so.
RULE = StepRule(final="7")
LENGTH = 64
SMALL = EngineConfig(kv_gib=0.02, max_num_seqs=32)
TOKENIZER = tape_tokenizer()
EOS = TOKENIZER.eos_token_id
STEPPER = compile_rule(RULE, TOKENIZER, [EOS])
PLAIN = compile_rule(StepRule(), TOKENIZER, [EOS])


def cut(ids: list[int]) -> list[int]:
    """What is left of a solution that was sampled without the rule."""
    start = 0
    for end in PLAIN.step_ends(ids):
        if "7" in TOKENIZER.decode(ids[start:end]):
            return ids[:end]
        start = end
    return ids


@given(st.lists(st.sampled_from([EOS, *TOKENIZER.encode("37+\nA\n", add_special_tokens=False)])))
def test_steps_end_with_the_final_one_and_a_solution_is_told_by_its_end(ids: list[int]) -> None:
    ids = ids[: ids.index(EOS) + 1] if EOS in ids else ids
    ends, plain = STEPPER.step_ends(ids), PLAIN.step_ends(cut(ids))
    assert ends == plain
    for start, end in pairwise([0, *ends]):
        is_last = "7" in TOKENIZER.decode(ids[start:end]) or ids[end - 1] == EOS
        assert STEPPER.is_solution(ids[:end]) == is_last
        # From any step on it is told alike.
        assert STEPPER.is_solution(ids[start:end]) == is_last
        assert not is_last or end == ends[-1]
        assert not any(STEPPER.is_solution(ids[:i]) for i in range(start, end))


def test_whole_samples_with_the_rule_are_those_without_it_cut_after_the_final_step(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path: Path
) -> None:
    trunk, checkpoint = tiny_model("llama"), tmp_path / "pav.ckpt"
    make_verifier(trunk, checkpoint)
    ids = export_verifier(load_verifier(str(checkpoint)), str(trunk), tmp_path / "served")
    policy = load_policy(PolicyConfig(str(trunk)), RULE)
    engine = VllmEngine(str(tmp_path / "served"), "float32", LENGTH, ids, SMALL)
    prompts = [policy.encode(p) for p in islice(Tape().problems("test"), 24)]

    def sampled(until: Stepper | None, scores: bool) -> list[Sampled]:
        found: dict[int, Sampled] = {}

        async def one(i: int) -> None:
            found[i] = await engine.sample(
                prompts[i], Sampler(max_length=LENGTH), stop_ids=[EOS], seed=seed_of(i),
                max_tokens=LENGTH - len(prompts[i]), scores=scores, until=until,
            )  # fmt: skip

        drive([engine], [partial(one, i) for i in range(len(prompts))], lambda _: None, 24)
        return [found[i] for i in range(len(prompts))]

    for scores in (False, True):
        shorter = 0
        pairs = zip(sampled(None, scores), sampled(policy.stepper, scores), strict=True)
        for whole, out in pairs:
            assert out.ids == cut(whole.ids)
            assert out.stopped == (whole.stopped or len(out.ids) < len(whole.ids))
            shorter += len(out.ids) < len(whole.ids)
            if scores and whole.heads is not None and out.heads is not None:
                assert out.heads.shape == (len(out.ids), whole.heads.shape[1])
                np.testing.assert_allclose(out.heads, whole.heads[: len(out.ids)], atol=1e-4)
                np.testing.assert_allclose(out.logprobs, whole.logprobs[: len(out.ids)], atol=1e-4)
        assert shorter > 5
        # What was cut is out of the batch.
        assert not engine.busy and not engine._engine.has_unfinished_requests()
    engine.shutdown()


def test_labels_and_their_workers_stop_at_the_final_step(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = RolloutsConfig(
        task=Tape(step_rule=RULE),
        ignore_warnings=True,
        output=str(tmp_path / "one"),
        policy=PolicyConfig(str(tiny_model("llama")), name="base"),
        sampler=Sampler(max_length=48),
        problems=12,
        validation_problems=2,
        n_mc=2,
        engine=SMALL,
    )
    rollouts(config)
    rollouts(replace(config, output=str(tmp_path / "two"), workers=2))
    made = {
        name: [
            sorted((row["prefix_ids"], row["ids"], row["truncated"]) for row in completions)
            for completions in [pq.read_table(tmp_path / name / "completions").to_pylist()]
        ]
        for name in ("one", "two")
    }
    assert made["one"] == made["two"]
    ended_by_answer = 0
    for prefix, ids, truncated in made["one"][0]:
        whole = prefix + ids
        assert cut(whole) == whole
        assert not STEPPER.is_solution(prefix)
        assert STEPPER.is_solution(whole) != truncated
        ended_by_answer += not truncated and whole[-1] != EOS
    assert ended_by_answer > 10


def test_given_solutions_end_with_their_final_step(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    policy = load_policy(PolicyConfig(str(tiny_model("llama"))), RULE)
    (problem,) = islice(Tape().problems("train"), 1)
    path = tmp_path / "given.jsonl"

    def ids_of(**row: Any) -> list[int]:
        path.write_text(json.dumps({"problem_id": problem.id, **row}))
        ((seed,),) = given_rounds(str(path), [("train", problem)], policy, 112)
        assert seed.given is not None and seed.given[1] == row.get("truncated", False)
        return seed.given[0]

    def encoded(text: str) -> list[int]:
        return list(policy.tokenizer.encode(text, add_special_tokens=False))

    assert ids_of(text="3+3=6\n=17\nA3\n") == encoded("3+3=6\n=17\n")
    assert ids_of(text="3+3=6\n=17") == [*encoded("3+3=6\n=17"), EOS]
    assert ids_of(text="3+3=6\n", truncated=True) == encoded("3+3=6\n")
    with pytest.raises(UserError, match="truncated is true, but the solution has its final step"):
        ids_of(text="3+3=6\n=17\n", truncated=True)


def test_searches_finish_a_candidate_with_its_final_step(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path: Path
) -> None:
    checkpoint = str(tmp_path / "pav.ckpt")
    make_verifier(tiny_model("llama"), Path(checkpoint), heads=("q/base", "q/prover", "orm"),
                  task=Tape(step_rule=RULE), sampler=Sampler(max_length=112))  # fmt: skip
    beam(BeamConfig(checkpoint, n=3, problems=6, output=str(tmp_path / "beam"), engine=SMALL))
    best_of_n(
        BestOfNConfig(checkpoint, n=6, problems=6, output=str(tmp_path / "best"), engine=SMALL)
    )
    for path in (tmp_path / "beam" / "beam.jsonl", tmp_path / "best" / "best_of_n.jsonl"):
        candidates = [c for record in read(path) for c in record.candidates]
        assert all(cut(c.ids) == c.ids for c in candidates)
        assert all(STEPPER.is_solution(c.ids) for c in candidates if c.finished)
        assert sum(c.finished and c.ids[-1] != EOS for c in candidates) > 3


@pytest.mark.parametrize("task", [Gsm8k(), Math()], ids=["gsm8k", "math"])
def test_command_line_takes_a_task_with_its_step_rule(task: Any, tmp_path: Path) -> None:
    found: list[RolloutsConfig] = []
    line = ["--task", type(task).__name__, "--output", str(tmp_path)]
    run(found.append, RolloutsConfig, "data_gen.rollouts", line)
    run(found.append, RolloutsConfig, "data_gen.rollouts", [*line, "--task.step_rule.final="])
    assert [c.task.step_rule.final for c in found] == [task.step_rule.final, ""]
    assert found[0].task == task


def test_tasks_name_the_step_with_the_answer_and_a_rule_without_one_keeps_its_fingerprint() -> None:
    for task, right, wrong in (
        (Gsm8k(), ["#### 42\n", "####-7\n", "#### $1,200\n"], ["#### Step 1\n", "# 4 apples\n"]),
        (Math(), ["so $\\boxed{\\frac12}$.\n"], ["in \\boxed{}\n", "\\fbox{3}\n", "boxed{3}\n"]),
    ):
        rule = task.step_rule
        text = Text(rule)
        assert all(text.is_final(line) for line in right)
        assert not any(text.is_final(line) for line in wrong)
        assert task_spec(task)["init_args"]["step_rule"]["final"] == rule.final
    assert "final" not in task_spec(Tape())["init_args"]["step_rule"]


class Text:
    """Steps of a byte-level tokenizer, given as text."""

    def __init__(self, rule: StepRule) -> None:
        from tests.conftest import build_chat_tokenizer

        self.tokenizer = build_chat_tokenizer()
        self.stepper = compile_rule(rule, self.tokenizer, [self.tokenizer.eos_token_id])

    def is_final(self, line: str) -> bool:
        ids = list(self.tokenizer.encode(line, add_special_tokens=False))
        return self.stepper.is_final(ids)


@pytest.mark.parametrize(
    ("final", "message"),
    [("(", "step_rule.final '\\(' is no regular expression"), ("7*", "is found in every text")],
)
def test_a_rule_that_cannot_be_meant_is_refused(final: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        StepRule(final=final)
