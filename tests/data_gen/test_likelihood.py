"""Likelihood of the reference answer after every step: packed as one by one, stored on its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from data_gen.config import RolloutsConfig
from data_gen.inspect.show import ShowConfig, show
from data_gen.likelihood import command as likelihood_module
from data_gen.likelihood.command import LikelihoodConfig, likelihood, read_likelihood
from data_gen.rollouts import _manifest, rollouts
from data_gen.store import Store
from pav.core.errors import UserError
from pav.labels.tables import Trace, prefix_key, prefixes, read_labels
from pav.policy import policy as policy_module
from pav.policy.policy import PolicyConfig, Sampler, load_policy
from pav.tasks.base import Grade, Problem
from pav.tasks.jsonl import Jsonl
from pav.tasks.tape import Tape
from pav.verifier.forced_answer import answer_ids, one_by_one, packed, scorer_for
from pav.verifier.trunk import load_trunk

SOLUTION = "37+8=45\n45*3=35\n35-15=20\n=20\n20+4=24\nA24"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3-tied", "gemma2"])
def test_packed_pass_equals_a_pass_per_boundary(
    architecture: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(PolicyConfig(str(tiny_model("llama"))), Tape().step_rule)
    model = load_trunk(str(tiny_model(architecture))).eval()
    prompt = policy.encode(Problem("p", "37+8*3-15+4"))
    ids = policy.tokenizer.encode(SOLUTION, add_special_tokens=False)
    cuts = [len(prompt) + end for end in (0, *policy.stepper.step_ends(ids))]
    assert len(cuts) == 6
    # Longer than Gemma's window of 24 tokens, and a long answer, too.
    assert cuts[-1] > 40
    for text in ("A24", "A24=11+8=19\n19"):
        answer = [*policy.tokenizer.encode(text, add_special_tokens=False), 2]
        slow = one_by_one(model, prompt + ids, cuts, answer)
        assert np.ptp(slow) > 0.01
        np.testing.assert_allclose(packed(model, prompt + ids, cuts, answer), slow, atol=1e-4)
        assert scorer_for(model, prompt + ids, cuts, answer) is packed
        with monkeypatch.context() as patch:  # several passes where answers are long
            patch.setattr("pav.verifier.forced_answer.TOKENS", 2 * len(answer))
            np.testing.assert_allclose(packed(model, prompt + ids, cuts, answer), slow, atol=1e-4)
    # By hand, for one boundary: the sum over the answer's tokens of what predicts them.
    whole = torch.tensor([prompt + ids[: cuts[2] - len(prompt)] + answer])
    with torch.inference_mode():
        logprobs = model(whole).logits.float().log_softmax(-1)[0]
    by_hand = sum(float(logprobs[cuts[2] - 1 + i, token]) for i, token in enumerate(answer))
    assert slow[2] == pytest.approx(by_hand, abs=1e-4)


def test_model_that_cannot_be_packed_is_read_one_by_one(tiny_model: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    ids, cuts, answer = list(range(3, 15)), [4, 8, 12], [5, 6, 2]
    plain = model.forward

    def deaf_to_masks(*, input_ids: torch.Tensor, **rest: object) -> object:
        rest.pop("attention_mask", None)
        return plain(input_ids=input_ids, **rest)

    assert scorer_for(model, ids, cuts, answer) is packed
    model.forward = deaf_to_masks
    assert scorer_for(model, ids, cuts, answer) is one_by_one


@pytest.mark.parametrize(
    ("task", "gold", "text"),
    [
        (Tape(), "20", "A20"),
        (Jsonl(grader="number"), "18", "#### 18"),
        (Jsonl(grader="boxed"), "\\frac{1}{2}", "\\boxed{\\frac{1}{2}}"),
        (Jsonl(grader="exact"), "Paris", "Paris"),
    ],
)
def test_forced_answer_is_right_by_the_tasks_own_grader(task: Tape, gold: str, text: str) -> None:
    problem = Problem("p", "1+1", gold)
    assert task.forced_answer(problem) == text
    assert task.grade(task.forced_answer(problem), problem) == Grade(gold, True)
    assert Jsonl(grader="none").forced_answer(Problem("p", "1", "A proof.")) == "A proof."
    assert Jsonl(grader="math").forced_answer(Problem("p", "1", "x^2")) == "\\boxed{x^2}"


@pytest.fixture
def run(tiny_model: Callable[..., Path], tmp_path: Path) -> RolloutsConfig:
    """Solutions alone, as ``--n_mc 0 --traces_from`` leaves them, with two that share prefixes."""
    problems = list(islice(Tape().problems("train"), 3))
    rows = [
        {"problem_id": p.id, "text": f"1+1=2\n2+{i}=9\nA{p.gold if i else 5}"}
        for p in problems
        for i in range(2)
    ]
    rows.append({"problem_id": problems[0].id, "text": "4*4=16\n1", "truncated": True})
    file = tmp_path / "traces.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return RolloutsConfig(
        str(tmp_path / "run"), Tape(), PolicyConfig(str(tiny_model("llama")), name="base"),
        sampler=Sampler(max_length=64), problems=3, validation_problems=0, n_mc=0,
        traces_from=str(file),
    )  # fmt: skip


def stored(directory: str) -> list[str]:
    return sorted(p.name for p in (Path(directory) / "likelihood").iterdir())


def rows_of(directory: str) -> list[dict[str, Any]]:
    tables = [pq.read_table(Path(directory) / "likelihood" / name) for name in stored(directory)]
    return [row for table in tables for row in table.to_pylist()]


def test_likelihoods_of_every_boundary_stand_in_a_table_of_their_own(
    run: RolloutsConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_traces(run)
    monkeypatch.setattr(likelihood_module, "PART", 2)
    likelihood(LikelihoodConfig(run.output))
    labels = read_labels([run.output])
    assert (len(labels.traces), labels.counts, labels.completions) == (7, {}, [])
    found = read_likelihood(Path(run.output))
    wanted = {(prefix_key(t.problem_id, ids), "base") for t in labels.traces for ids in prefixes(t)}
    assert found.keys() == wanted
    assert len(wanted) < sum(len(prefixes(t)) for t in labels.traces)  # shared ones are read once
    rows = rows_of(run.output)
    assert len(rows) == len(wanted)
    with monkeypatch.context() as patch:  # found before the model is loaded
        patch.setattr(likelihood_module, "_load", pytest.fail)
        patch.setattr(likelihood_module, "_boundaries", lambda _: iter([("key", 250)]))
        with pytest.raises(UserError, match=r"are 2\d\d tokens, the model knows 256 positions"):
            likelihood(LikelihoodConfig(run.output))
    policy = load_policy(run.policy, run.task.step_rule)
    assert {r["policy_fingerprint"] for r in rows} == {policy.fingerprint}
    trace = labels.traces[0]
    answer = answer_ids(run.task, policy, Problem(trace.problem_id, trace.question, trace.gold))
    assert policy.text(answer) == f"A{trace.gold}" == rows[0]["answer"]
    assert answer[-1] == 2 and rows[0]["answer_tokens"] == len(answer)
    prompt = policy.encode(Problem(trace.problem_id, trace.question))
    for ids in prefixes(trace):
        slow = one_by_one(load_trunk(policy.path).eval(), prompt + ids, [len(prompt + ids)], answer)
        assert found[prefix_key(trace.problem_id, ids), "base"] == pytest.approx(slow[0], abs=1e-4)

    capsys.readouterr()
    show(ShowConfig(run.output))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    head = next(i for i, line in enumerate(lines) if line[:1] == ["step"])
    assert lines[head][-2:] == ["lik/base", "progress"]
    values = [found[prefix_key(trace.problem_id, ids), "base"] for ids in prefixes(trace)]
    assert float(lines[head + 1][-1]) == pytest.approx(values[0], abs=0.006)
    assert float(lines[head + 2][-2]) == pytest.approx(values[1], abs=0.006)
    assert float(lines[head + 2][-1]) == pytest.approx(values[1] - values[0], abs=0.006)


def test_contrastive_labels_are_the_references_share_among_the_wrong_answers_given(
    run: RolloutsConfig,
) -> None:
    make_traces(run)
    likelihood(LikelihoodConfig(run.output))
    likelihood(LikelihoodConfig(run.output, contrast=2))
    found = read_likelihood(Path(run.output))
    labels = read_labels([run.output])
    policy = load_policy(run.policy, run.task.step_rule)
    model = load_trunk(policy.path).eval()
    wrong = [t for t in labels.traces if t.answer is not None and not t.correct]
    assert {t.answer for t in wrong} == {"5"}
    for trace in wrong:
        problem = Problem(trace.problem_id, trace.question, trace.gold)
        prompt = policy.encode(problem)
        rival = answer_ids(run.task, policy, replace(problem, gold="5"))
        for ids in prefixes(trace):
            key = prefix_key(trace.problem_id, ids)
            other = one_by_one(model, prompt + trace.ids, [len(prompt) + len(ids)], rival)[0]
            share = found[key, "base"] - np.logaddexp(found[key, "base"], other)
            assert found[key, "base-vs2"] == pytest.approx(share, abs=1e-4)
            assert found[key, "base-vs2"] < 0
    asked = {t.problem_id for t in wrong}
    known = {key for key, name in found if name == "base-vs2"}
    assert known == {prefix_key(t.problem_id, i) for t in labels.traces
                     if t.problem_id in asked for i in prefixes(t)}  # fmt: skip


def test_a_policy_is_fingerprinted_once_however_many_rows_it_writes(
    run: RolloutsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_traces(run)
    hashed = 0
    digest = policy_module.weights_digest

    def counting(path: str) -> str:
        nonlocal hashed
        hashed += 1
        return digest(path)

    monkeypatch.setattr(policy_module, "weights_digest", counting)
    monkeypatch.setattr(likelihood_module, "PART", 1)
    likelihood(LikelihoodConfig(run.output))
    assert (len(rows_of(run.output)) > 10, hashed) == (True, 1)


def make_traces(run: RolloutsConfig) -> None:
    """The label run itself, which needs no engine: it samples nothing."""
    policy = load_policy(run.policy, run.task.step_rule)
    from data_gen.rollouts import _rounds

    with Store(Path(run.output), _manifest(run, [policy])) as store:
        store.announce(7)
        for seeds in _rounds(run, [policy]):
            for seed in seeds:
                assert seed.given is not None
                ids, cut = seed.given
                grade = run.task.grade(policy.text(ids), seed.problem)
                store.add(Trace(seed.trace_id, seed.problem.id, seed.problem.question,
                                seed.problem.gold, seed.split, seed.writer, seed.index, ids,
                                policy.stepper.step_ends(ids), grade.answer, grade.correct and
                                not cut, cut))  # fmt: skip
        store.seal({"base": policy.fingerprint})


def test_likelihood_run_that_dies_goes_on_where_it_was(
    run: RolloutsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_traces(run)
    monkeypatch.setattr(likelihood_module, "PART", 2)
    replaced = likelihood_module.replace_file
    parts = 0

    def dying(path: Path, content: bytes) -> None:
        nonlocal parts
        if parts == 2:
            raise KeyboardInterrupt
        parts += 1
        replaced(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(likelihood_module, "replace_file", dying)
        with pytest.raises(KeyboardInterrupt):
            likelihood(LikelihoodConfig(run.output))
    before = {name: (Path(run.output) / "likelihood" / name).read_bytes()
              for name in stored(run.output)}  # fmt: skip
    assert len(before) == 2
    likelihood(LikelihoodConfig(run.output))
    for name, content in before.items():
        assert (Path(run.output) / "likelihood" / name).read_bytes() == content
    rows = rows_of(run.output)
    assert len(rows) == len(read_likelihood(Path(run.output)))
    # Nothing is owed any more: no model is loaded.
    monkeypatch.setattr(likelihood_module, "_load", pytest.fail)
    likelihood(LikelihoodConfig(run.output))


def test_likelihoods_that_would_mislead_are_refused(
    run: RolloutsConfig, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_traces(run)
    for change in (1, 1000):  # another answer, and no answer
        with (
            monkeypatch.context() as patch,
            pytest.raises(
                UserError, match=r"the forced answer 'A\d+' of problem .+ is wrong by the grader"
            ),
        ):
            patch.setattr(Tape, "forced_answer", lambda _, p, by=change: f"A{int(p.gold) + by}")
            likelihood(LikelihoodConfig(run.output))
    other = PolicyConfig(str(tiny_model("gemma2")), name="base")
    likelihood(LikelihoodConfig(run.output))
    with pytest.raises(UserError, match="likelihoods of another policy called 'base'"):
        likelihood(LikelihoodConfig(run.output, policy=other))
    likelihood(LikelihoodConfig(run.output, policy=replace(other, name="strong")))
    assert {name for _, name in read_likelihood(Path(run.output))} == {"base", "strong"}
    with pytest.raises(UserError, match="has another tokenizer than labels"):
        likelihood(LikelihoodConfig(run.output, policy=PolicyConfig(str(tiny_model("llama", "chat"))
                                                                    )))  # fmt: skip
    policy = load_policy(run.policy, run.task.step_rule)
    with pytest.raises(UserError, match="has no reference answer"):
        answer_ids(run.task, policy, Problem("p", "1+1"))
    with pytest.raises(
        UserError, match=r"turns the forced answer 'Aye' into .+; change forced_ans"
    ):
        answer_ids(run.task, policy, Problem("p", "1+1", "ye"))
    manifest = json.loads((Path(run.output) / "manifest.json").read_text())
    with Store(Path(run.output), manifest), pytest.raises(UserError, match="is being written by"):
        likelihood(LikelihoodConfig(run.output))


def test_rollouts_without_rollouts_are_solutions_alone(
    run: RolloutsConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts(replace(run, traces_from=None, n_traces=2, problems=2))
    labels = read_labels([run.output])
    assert (len(labels.traces), labels.counts) == (4, {})
    said = capsys.readouterr().out
    assert "4 traces, 0 rollouts" in said
    assert f"next: data_gen.likelihood {run.output}" in said
    likelihood(LikelihoodConfig(run.output))
    assert len(read_likelihood(Path(run.output))) > 4
