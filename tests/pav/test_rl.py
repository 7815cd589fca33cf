"""Online RL end to end on the shipped policy: pav.rl as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pav.cli.run import run
from pav.core.errors import UserError
from pav.policy.policy import Sampler
from pav.rl.command import opened, rl
from pav.rl.config import RlConfig
from pav.rl.reward import gains

HERE = Path(__file__).parent
PAV_RL = [sys.executable, "-m", "pav.rl"]
SMALL = [
    "--verifier", "pav:reference", "--iterations", "4", "--batch", "4", "--group", "2",
    "--problems", "12", "--lr", "1e-3", "--eval_problems", "6", "--eval_samples", "2",
    "--eval_every", "2", "--checkpoint_every", "1", "--samples_every", "2",
    "--logger", "tensorboard", "--refresh_labels_every", "2", "--prover", "bo4",
]  # fmt: skip


def start(command: list[str], output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *SMALL, "--output", str(output), *options],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


def weights(output: Path) -> dict[str, Tensor]:
    found: dict[str, Any] = torch.load(output / "last.ckpt", weights_only=True)
    return {**found["learner"], **_flat(found["optimizer"]["state"])}


def _flat(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"optimizer.{i}.{k}": v for i, values in state.items() for k, v in values.items()}


def rows(output: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def apart(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.startswith("seconds")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rl") / "unbroken"
    done = start(PAV_RL, output)
    assert done.returncode == 0, done.stderr
    assert f"next: search.beam --verifier pav:reference --policy {output / 'best'}" in done.stdout
    return output


def test_a_run_changes_the_policy_and_the_engine_serves_what_the_trainer_has(
    unbroken: Path,
) -> None:
    found = rows(unbroken)
    assert [row["iteration"] for row in found] == [0, 1, 2, 3, 4]
    assert "accuracy" in found[0] and "accuracy" in found[2] and "accuracy" not in found[3]
    # Samples of every version carry the log-probabilities that the trainer finds for them.
    assert all(row["mismatch/mean"] < 1e-5 for row in found[1:])
    before = torch.load(unbroken / "last.ckpt", weights_only=True)["learner"]
    from pav.rl.learner import Learner

    start_of = Learner("pav/assets/base", 1.0, False).state_dict()
    assert any((start_of[k] != v).any() for k, v in before.items())


def test_the_result_is_a_directory_that_others_load(unbroken: Path) -> None:
    from transformers import AutoModelForCausalLM

    from pav.policy.policy import PolicyConfig, load_policy
    from pav.tasks.tape import Tape

    load_policy(PolicyConfig(str(unbroken / "best")), Tape().step_rule)
    served = AutoModelForCausalLM.from_pretrained(unbroken / "last").state_dict()
    trained = weights(unbroken)
    for name, value in served.items():
        assert torch.equal(value, trained[f"policy.{name}"]), name


def test_the_loggers_get_what_metrics_jsonl_gets(unbroken: Path) -> None:
    (events,) = (unbroken / "logs").glob("events.out.tfevents.*")
    written = events.read_bytes()
    for name in ("train/tokens", "accuracy", "mismatch/mean", "seconds/update"):
        assert name.encode() in written


def test_samples_carry_the_reward_of_every_step(unbroken: Path) -> None:
    found = rows(unbroken, "samples.jsonl")
    assert {row["iteration"] for row in found} == {2, 4}
    for row in found:
        bo4_P = 1 - (1 - np.array(row["q"]["q/base"])) ** 4
        assert len(bo4_P) == len(row["steps"]) + 1
        np.testing.assert_allclose(row["gain"], np.diff(bo4_P), atol=1e-4)
        np.testing.assert_allclose(row["credit"], 3 * np.diff(bo4_P), atol=3e-4)


def test_a_run_shows_itself(unbroken: Path) -> None:
    assert (unbroken / "rl.png").stat().st_size > 50_000
    page = (unbroken / "rl.html").read_text()
    last = rows(unbroken, "samples.jsonl")[-1]
    assert last["iteration"] == 4
    assert f'<div class="question text">{last["question"]}</div>' in page
    assert all(0 <= row["verifier/out_of_range"] < 0.1 for row in rows(unbroken)[1:])


def test_a_run_whose_traces_are_cut_ends_itself_and_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = ["--output", str(tmp_path), "--sampler.max_length", "48", "--eval_problems", "0"]
    with pytest.raises(SystemExit) as ended:
        run(rl, RlConfig, "pav.rl", [*SMALL, *cut])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the run ends after iteration 1, truncated: the length cap cuts" in said
    assert "raise --sampler.max_length" in said
    (alarm,) = rows(tmp_path, "warnings.jsonl")
    assert (alarm["iteration"], alarm["name"], alarm["stops"]) == (1, "truncated", True)
    assert "ends the run" in (tmp_path / "rl.html").read_text()
    assert [row["iteration"] for row in rows(tmp_path)] == [1]
    # What it learned is kept: the same command without guards goes on from there.
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state"]
    assert kept["iteration"] == 1
    # With held-out problems it is found before the first update.
    with pytest.raises(SystemExit) as ended:
        run(rl, RlConfig, "pav.rl", [*SMALL, *cut[2:4], "--output", str(tmp_path / "refused")])
    assert ended.value.code == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "max_length cuts" in line)
    assert "of the start's solutions" in said and "raise --sampler.max_length" in said
    assert not (tmp_path / "refused" / "last.ckpt").exists()


def test_kill_minus_nine_anywhere_and_resume_give_the_weights_of_an_unbroken_run(
    unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    # Each counts in its own process: updates and checkpoints since the start of that one.
    for phase, number in (("sample", 1), ("update", 0), ("save", 1)):
        killed = start([sys.executable, str(HERE / "rl_killed.py"), phase, str(number)], output)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = start(PAV_RL, output)
    assert again.returncode == 0, again.stderr
    assert "resuming after iteration 2" in again.stdout
    ours, theirs = weights(output), weights(unbroken)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    assert list(map(apart, rows(output))) == list(map(apart, rows(unbroken)))


def test_two_processes_with_two_engine_workers_make_the_update_of_one(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    two = [*torchrun, "-m", "pav.rl", "--devices", "2", "--workers", "1"]
    short = ("--iterations", "1", "--eval_problems", "0", "--refresh_labels_every", "null")
    # Sharded training is held against one process in test_rl_shares.
    for name, command in (("one", PAV_RL), ("two", two)):
        done = start(command, tmp_path / name, *short)
        assert done.returncode == 0, done.stderr
    one, a = weights(tmp_path / "one"), rows(tmp_path / "one")[0]
    # Adam's first moment is a tenth of the gradient; what it makes of a gradient of nothing but
    # rounding is as large as any other step.
    moments = [name for name in one if name.endswith("exp_avg")]
    assert moments
    found, b = weights(tmp_path / "two"), rows(tmp_path / "two")[0]
    assert found.keys() == one.keys()
    for name in moments:
        torch.testing.assert_close(found[name], one[name], atol=1e-6, rtol=1e-4)
    for key in ("train/accuracy", "train/tokens", "train/dead_groups", "train/steps"):
        assert a[key] == b[key], key
    for key in ("update/loss", "update/gradient_norm"):
        np.testing.assert_allclose(a[key], b[key], rtol=1e-5)


def test_refreshed_labels_follow_the_policy(unbroken: Path) -> None:
    found = rows(unbroken)
    assert [row.get("verifier/version") for row in found] == [None, None, None, 2, None]
    assert 0 < found[3]["verifier/brier"] < 1
    versions = {
        row["iteration"]: row["verifier_version"] for row in rows(unbroken, "samples.jsonl")
    }
    assert versions == {2: None, 4: 2}


def test_refreshed_labels_of_another_prover_are_refused() -> None:
    with pytest.raises(UserError, match="give --prover bo4 or q/base"):
        opened(RlConfig("pav:reference", refresh_labels_every=2))


def test_another_setting_on_resume_is_refused(
    unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*SMALL, "--output", str(unbroken), "--alpha", "1"]
    with pytest.raises(SystemExit) as ended:
        run(rl, RlConfig, "pav.rl", small)
    assert ended.value.code == 2
    assert "made with another alpha" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"group": 1}, "group is 1"),
        ({"alpha": -1.0}, "alpha is -1"),
        ({"updates_per_batch": 2}, "clip"),
        ({"batch": 64, "problems": 32}, "fewer than a batch"),
        ({"batch": 5, "devices": 2}, "give a multiple"),
        ({"credit_lambda": 1.5}, "credit_lambda"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_fix(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        RlConfig("pav:reference", **settings)


@pytest.mark.parametrize("name", ["rl_2b", "rl_9b"])
def test_the_papers_settings_run_on_a_tiny_gemma_2(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path: Path, name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trunk = tiny_model("gemma2")
    verifier = tmp_path / "pav.ckpt"
    heads = ("q/gemma2_9b", "q/gemma2_2b", "orm")
    make_verifier(trunk, verifier, heads=heads, sampler=Sampler(max_length=48))
    run(rl, RlConfig, "pav.rl",
        ["--config", f"configs/math_gemma2/{name}.yaml", "--verifier", str(verifier), "--init",
         str(trunk), "--output", str(tmp_path / "rl"), "--batch", "4", "--eval_problems", "2",
         "--precision", "32-true", "--dry_run"])  # fmt: skip
    assert "dry run: one iteration of 4 x 1 traces" in capsys.readouterr().out
    assert not (tmp_path / "rl").exists()


def test_record_reward_pays_for_news_alone_and_no_filler() -> None:
    q = {"q/base": np.zeros(6), "q/prover": np.array([0.3, 0.5, 0.5, 0.2, 0.4, 0.6])}
    record_S = gains(q, "record", "q/base", "q/prover")
    np.testing.assert_allclose(record_S, [0.2, 0, 0, 0, 0.1], atol=1e-12)
    np.testing.assert_allclose(
        gains(q, "pav", "q/base", "q/prover"), [0.2, 0, -0.3, 0.2, 0.2], atol=1e-12
    )


def test_discounted_reward_pays_a_prover_that_is_always_right_for_nearing_the_end() -> None:
    q = {"q/base": np.zeros(4), "q/prover": np.array([0.8, 0.8, 0.8, 0.4])}
    found_S = gains(q, "discounted", "q/base", "q/prover", 0.5)
    np.testing.assert_allclose(found_S, [0.2 - 0.1, 0.4 - 0.2, 0.4 - 0.4], atol=1e-12)
    pav_S = gains(q, "pav", "q/base", "q/prover")
    np.testing.assert_allclose(gains(q, "discounted", "q/base", "q/prover", 1.0), pav_S)
    assert not pav_S[:2].any()
