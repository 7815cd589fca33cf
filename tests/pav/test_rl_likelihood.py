"""Likelihood rewards end to end: pav.rl without a verifier, with and without a grader."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pav.cli.run import run
from pav.core.errors import UserError
from pav.policy.policy import PolicyConfig, load_policy
from pav.rl.chain import Tags
from pav.rl.command import rl
from pav.rl.config import RlConfig
from pav.rl.diagnose import DiagnoseConfig, diagnose, within
from pav.rl.learner import Learner
from pav.rl.progress import log_likelihoods
from pav.rl.read import floor_slope, read_after, with_best_reference
from pav.rl.references import References
from pav.rl.trace import Trace
from pav.tasks.ledger import Ledger
from pav.tasks.tape import Tape

SMALL = [
    "--dense", "none", "--batch", "4", "--group", "2", "--problems", "12", "--kl", "0",
    "--lr", "1e-3", "--eval_problems", "4", "--eval_samples", "2", "--iterations", "3",
    "--eval_every", "2", "--checkpoint_every", "1", "--samples_every", "2",
]  # fmt: skip
ON_TAPE = ["--task", "Tape", "--policy.model", "pav:base"]


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(output / "last.ckpt", weights_only=True)["learner"]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("likelihood") / "logprob"
    run(rl, RlConfig, "pav.rl", [*SMALL, *ON_TAPE, "--reward", "logprob", "--output", str(output)])
    return output


def test_no_answer_is_sampled_and_the_reference_is_read(whole: Path) -> None:
    found = rows(whole)
    assert [row["iteration"] for row in found] == [0, 1, 2, 3]
    for row in found[1:]:
        assert "train/accuracy" not in row and row["train/outcome"] == row["likelihood/answer"] < 0
        assert row["mismatch/mean"] < 1e-5 and row["likelihood/untagged"] == 0
    for row in (found[0], found[2]):
        assert {"accuracy", "greedy", "reference/perplexity", "reference/perplexity_mc2"} <= set(
            row
        )
        assert row["reference/perplexity"] >= row["reference/perplexity_mc2"] >= 1
    lines = (whole / "samples.jsonl").read_text().splitlines()
    # A chain ends with its tag: the answer is not there.
    assert all(json.loads(line)["tail"] == "A" for line in lines)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    again = [*SMALL, *ON_TAPE, "--reward", "logprob", "--output", str(tmp_path / "rl")]
    with pytest.MonkeyPatch.context() as patch:
        saved = 0

        def stop(*arguments: Any) -> None:
            nonlocal saved
            real(*arguments)
            saved += 1
            if saved == 2:
                raise KeyboardInterrupt

        from pav.rl import loop

        real = loop.save
        patch.setattr(loop, "save", stop)
        with pytest.raises(SystemExit):
            run(rl, RlConfig, "pav.rl", again)
    run(rl, RlConfig, "pav.rl", again)
    one, other = weights(whole), weights(tmp_path / "rl")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "figure"),
    [
        (["--reward", "sft", "--group", "1"], "likelihood/answer"),
        (["--reward", "sft", "--sft_chain", "own", "--kl", "0.1"], "likelihood/answer"),
        (["--reward", "jepo", "--dense", "likelihood", "--chain_floor", "40", "--chain_slope", "1"],
         "train/dense"),
        (["--reward", "base", "--task.n_ops", "3", "--batch", "12"], "train/accuracy"),
    ],
)  # fmt: skip
def test_every_kind_of_run_trains(options: list[str], figure: str, tmp_path: Path) -> None:
    output = tmp_path / "rl"
    short = ["--iterations", "1", "--eval_problems", "0"]
    run(rl, RlConfig, "pav.rl", [*SMALL, *ON_TAPE, *options, *short, "--output", str(output)])
    (row,) = rows(output)
    assert np.isfinite(row[figure]) and row["update/gradient_norm"] > 0
    if "--group" in options:
        assert row["train/tokens"] == 0  # no chain


def test_a_task_without_a_grader_is_trained_and_what_needs_grades_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "proofs.jsonl"
    problems = [{"question": f"{n}+{n}", "answer": [str(2 * n), f"={2 * n}"]} for n in range(60)]
    data.write_text("".join(json.dumps(p) + "\n" for p in problems))
    policy = tiny_model("llama")
    options = [
        *SMALL, "--task", "Jsonl", "--task.data", str(data), "--task.grader", "none",
        "--policy.model", str(policy), "--answer_tags", "['A', '']", "--sampler.max_length", "40",
        "--output", str(tmp_path / "rl"), "--eval_problems", "2", "--truncation_limit", "1",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        run(rl, RlConfig, "pav.rl", options)
    assert ended.value.code == 2 and "has no grader" in capsys.readouterr().err
    run(rl, RlConfig, "pav.rl", [*options, "--reward", "avg_logprob", "--references", "best"])
    found = rows(tmp_path / "rl")
    assert "accuracy" not in found[0] and found[0]["reference/perplexity"] > 1
    assert "best held-out probability of a token" in capsys.readouterr().out
    assert (tmp_path / "rl" / "best" / "config.json").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "no verifier is given"),
        ({"policy": PolicyConfig(), "dense": "pav"}, "a verifier's reward"),
        ({"verifier": "pav:reference", "policy": PolicyConfig()}, "leave policy out"),
        ({"policy": PolicyConfig(), "reward": "jepo", "estimator": "value"}, "estimator rloo"),
        ({"policy": PolicyConfig(), "reward": "jepo", "group": 1}, "group is 1"),
        ({"policy": PolicyConfig(), "reward": "sft", "group": 4}, "--group 1"),
        ({"policy": PolicyConfig(), "reward": "logprob", "chain_floor": 0}, "chain_floor is 0"),
        ({"policy": PolicyConfig(), "reward": "logprob", "chain_slope": 1.0}, "with a floor"),
        ({"policy": PolicyConfig(), "reward": "logprob", "sft_chain": "own"}, "add --reward sft"),
        ({"policy": PolicyConfig(), "reference_term": False}, "give a likelihood reward"),
        ({"policy": PolicyConfig(), "answer_tags": ("", "B")}, "without an opening tag"),
        ({"policy": PolicyConfig(), "orm": "orm.ckpt"}, "orm is 'orm.ckpt' and no verifier"),
        ({"policy": PolicyConfig(), "refresh_labels_every": 2}, "refresh_labels_every is 2"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_fix(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        RlConfig(**({"dense": "none"} | settings))


TAPE = load_policy(PolicyConfig("pav:base"), Tape().step_rule)
TEXTS = ("12+3=15\n15*2=30\nA30", "12+3=15\n=15\n15*2=31\nA31")


def traces() -> list[Trace]:
    problem = next(iter(Tape(n_ops=2).problems("train")))
    found = []
    for text in TEXTS:
        ids = [*TAPE.tokenizer.encode(text, add_special_tokens=False), TAPE.tokenizer.eos_token_id]
        found.append(
            Trace(problem, 0, TAPE.encode(problem), ids, np.zeros(len(ids), np.float32),
                  TAPE.stepper.step_ends(ids), False, None, False, 0)
        )  # fmt: skip
    return found


def references() -> References:
    task = Tape()
    return References(TAPE, task, Tags(*task.answer_tags), 0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_all_steps_are_read_in_one_pass_as_if_each_were_alone(
    tiny_model: Callable[..., Path], architecture: str
) -> None:
    learner = Learner(str(tiny_model(architecture)), 0.7, with_value=False)
    given, refs = traces(), references()
    answers = [refs.forced(t.problem, 0) for t in given]
    found = log_likelihoods(learner, given, answers, tokens=60)
    for trace, answer, row_P in zip(given, answers, found, strict=True):
        cut = [replace(trace, ids=trace.ids[:end], reference=answer) for end in (0, *trace.ends)]
        alone = [float(row.sum()) for row in read_after(learner, cut, 8192)]
        np.testing.assert_allclose(row_P, alone, rtol=1e-4, atol=1e-4)


def test_of_several_references_one_is_drawn_for_a_group_or_the_likeliest_is_taken() -> None:
    learner = Learner(TAPE.path, 1.0, with_value=False)
    trace, refs = traces()[0], references()
    problem = replace(trace.problem, gold="7", others=("30", "9"))
    drawn = [refs.drawn(problem, version) for version in range(300)]
    assert all(70 < drawn.count(answer) < 130 for answer in ("7", "30", "9"))
    assert drawn == [refs.drawn(problem, version) for version in range(300)]
    config = RlConfig(policy=PolicyConfig(), dense="none", reward="logprob", references="best")
    given = refs.after(replace(trace, problem=problem), "7")
    (best,) = with_best_reference(learner, refs, [given], config)
    assert TAPE.text(best.reference) == "30"


def test_the_floors_slope_is_fitted_on_forty_iterations() -> None:
    config = RlConfig(policy=PolicyConfig(), dense="none", reward="logprob", chain_floor=100)
    history = [{"train/tokens": 200.0 - n, "train/outcome": -10 + 0.05 * n} for n in range(60)]
    assert floor_slope(history[:39], config) == 0
    assert floor_slope(history, config) == pytest.approx(0.05)
    assert floor_slope(history, replace(config, chain_slope=0.2)) == 0.2
    assert floor_slope(history, replace(config, chain_floor=None)) == 0


def test_correlation_is_that_within_problems_not_over_them() -> None:
    # Longer problems are harder; among the chains of one, longer ones are better.
    length_PG = np.array([[1.0, 2, 3], [11, 12, 13], [5, 5, 5]])
    log_PG = np.array([[-1.0, -0.5, 0], [-11, -10.5, -10], [-1, -2, -3]])
    assert np.corrcoef(length_PG.ravel(), log_PG.ravel())[0, 1] < 0
    np.testing.assert_allclose(within(length_PG, log_PG)[:2], 1)
    assert np.isnan(within(length_PG, log_PG)[2])


def test_diagnosis_reads_the_reference_after_every_chain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diagnose(DiagnoseConfig(output=str(tmp_path), problems=4, chains=4))
    assert "correlation of chain length and log-probability within problems" in (
        capsys.readouterr().out
    )
    figures = json.loads((tmp_path / "diagnose.json").read_text())
    lines = (tmp_path / "chains.csv").read_text().splitlines()
    assert figures["chains"] == 4 and figures["mean_logprob"] < 0 and len(lines) == 17
    assert -1 <= figures["low"] <= figures["correlation_within_problems"] <= figures["high"] <= 1
    assert (tmp_path / "diagnose.png").stat().st_size > 10_000


def test_the_ledgers_reference_stands_after_its_own_chain_and_after_none() -> None:
    task = Ledger()
    policy = load_policy(PolicyConfig("pav:ledger"), task.step_rule)
    refs = References(policy, task, Tags(*task.answer_tags), 0)
    problem = next(islice(task.problems("train"), 1))
    nothing = refs.empty(problem, policy.encode(problem), 0)
    assert nothing.ids == [] and policy.text(nothing.reference) == f"A{problem.gold}"
    chain = policy.tokenizer.encode("1+1=2\nAelse", add_special_tokens=False)
    given = replace(nothing, ids=chain, sampled_T=np.zeros(len(chain), np.float32))
    found = refs.after(given, problem.gold or "")
    assert found.is_tagged and policy.text(found.ids) == "1+1=2\nA"
    assert policy.text(found.reference) == problem.gold
    assert found.reference[-1] in policy.stepper.eos_ids
    assert len(found.sampled_T) == len(found.ids)
