"""A third-party PRM as dense reward of online RL."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification

from pav.cli.run import run
from pav.core.errors import UserError
from pav.policy.policy import PolicyConfig, load_policy
from pav.reward_models.reward_model import NEUTRAL, RewardModel
from pav.reward_models.text import RewardModelConfig
from pav.rl.command import opened, rl
from pav.rl.config import RlConfig
from pav.tasks.base import Problem
from pav.tasks.tape import Tape
from tests.reward_models import built


def test_steps_earn_the_change_of_a_third_party_prm(
    chat_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prm, output = built(tmp_path / "prm", "token", chat_tokenizer), tmp_path / "rl"
    command = [
        "--verifier", "pav:reference", "--reward_model", prm, "--reward_model.batch", "3",
        "--output", str(output), "--iterations", "2", "--batch", "4", "--group", "2",
        "--problems", "8", "--eval_problems", "0", "--samples_every", "1",
    ]  # fmt: skip
    run(rl, RlConfig, "pav.rl", command)
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert {row["iteration"] for row in rows} == {1, 2}
    plain = AutoModelForTokenClassification.from_pretrained(prm)

    def ids(text: str) -> list[int]:
        return list(chat_tokenizer.encode(text, add_special_tokens=False))

    for row in rows:
        whole, marks = [chat_tokenizer.bos_token_id, *ids(row["question"])], []
        for step in row["steps"]:
            whole += ids(step.strip()) + ids("\n")
            marks.append(len(whole) - 1)
        with torch.no_grad():
            q_S = plain(torch.tensor([whole])).logits[0, marks].softmax(-1)[:, 1].numpy()
        assert list(row["q"]) == ["prm"]
        np.testing.assert_allclose(row["q"]["prm"], [NEUTRAL, *q_S], atol=2e-5)
        np.testing.assert_allclose(row["gain"], np.diff([NEUTRAL, *q_S]), atol=4e-5)
        np.testing.assert_allclose(row["credit"], 3 * np.diff([NEUTRAL, *q_S]), atol=1e-4)
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(m["train/dense_spread"] > 0 and "verifier/out_of_range" not in m for m in metrics)
    # Another model at the same place is another reward.
    built(tmp_path / "prm", "token", chat_tokenizer, labels=1)
    with pytest.raises(SystemExit):
        run(rl, RlConfig, "pav.rl", command)
    assert "made with another reward_model_digest" in capsys.readouterr().err


def test_steps_beyond_what_a_prm_reads_earn_nothing(chat_tokenizer: Any, tmp_path: Path) -> None:
    policy = load_policy(PolicyConfig("pav:base"), Tape().step_rule)
    config = RewardModelConfig(built(tmp_path, "token", chat_tokenizer))
    model, problem = RewardModel(config, policy), Problem("p", "37+8*3")
    solutions = []
    for text in ("37+8=45\n" * 100, "37+8=45\n45*3=135\nA135\n", ""):
        ids = policy.tokenizer.encode(text, add_special_tokens=False)
        solutions.append((problem, ids, policy.stepper.step_ends(ids)))
    long_P, short_P, bare_P = model.states(solutions)
    assert [len(long_P), len(short_P), bare_P.tolist()] == [101, 4, [NEUTRAL]]
    assert np.ptp(long_P[-20:]) == 0 and all(a != b for a, b in pairwise(long_P[:30]))
    (alone_P,) = RewardModel(replace(config, batch=1), policy).states(solutions[1:2])
    np.testing.assert_allclose(alone_P, short_P, atol=1e-6)


def test_a_reward_model_that_no_step_is_rewarded_by_is_refused(
    chat_tokenizer: Any, tmp_path: Path
) -> None:
    orm = RewardModelConfig(built(tmp_path, "sequence", chat_tokenizer, 1))
    with pytest.raises(UserError, match="scores whole solutions"):
        opened(RlConfig("pav:reference", reward_model=orm))
    for other, said in (
        ({"dense": "none"}, "use --dense pav"),
        ({"dense": "q_base"}, "use --dense pav"),
        ({"prover": "bo4"}, "prover is about heads"),
        ({"refresh_labels_every": 2}, "refresh_labels_every is about heads"),
    ):
        with pytest.raises(UserError, match=said):
            RlConfig("pav:reference", reward_model=orm, **other)  # type: ignore[arg-type]
