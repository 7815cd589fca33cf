"""Supervised fine-tuning: it learns, it resumes where it was, it overwrites nothing."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pav.cli.run import run as command
from pav.core.errors import UserError
from pav.policy.policy import load_tokenizer
from pav.tasks.tape import Tape, tape_tokenizer
from pav.train import sft as sft_module
from pav.train.checkpoints import LastCheckpoint
from pav.train.sft import IGNORE, SftModule, Solutions, schedule, sft
from pav.train.sft_config import PolicyShape, SftConfig
from tests.full_disk import full_disk

TINY = SftConfig(
    output="",
    task=Tape(sft_ops=(1, 3)),
    shape=PolicyShape(hidden=32, layers=1, heads=1, mlp=32),
    steps=40,
    batch=16,
    warmup=4,
    eval_problems=0,
)


class Recorder(L.Callback):
    """Loss of every step, in order."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["loss"]))


class Died(Exception):
    """Stands for whatever ends a process."""


def run(config: SftConfig, monkeypatch: pytest.MonkeyPatch, save_every: int = 1000,
        stop_after: int | None = None) -> list[float]:  # fmt: skip
    """Train and return the losses; ``stop_after`` ends it after so many steps."""
    recorder = Recorder()
    original = sft_module.LightningProgress

    class Interrupting(original):  # type: ignore[misc, valid-type]
        def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
            recorder.on_train_batch_end(trainer)
            if len(recorder.losses) == stop_after:
                raise Died
            super().on_train_batch_end(trainer, *rest)

    class Often(LastCheckpoint):
        def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
            self.seconds = 0 if trainer.global_step // 2 % save_every == 0 else 1000
            super().on_train_batch_end(trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sft_module, "LightningProgress", Interrupting)
        patch.setattr(sft_module, "LastCheckpoint", Often)
        if stop_after is None:
            sft(config)
        else:
            with pytest.raises(Died):
                sft(config)
    return recorder.losses


def weights(directory: str) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


def test_a_few_steps_lower_the_loss_and_a_policy_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, output=str(tmp_path / "policy"), eval_problems=20, max_length=40)
    losses = run(config, monkeypatch)
    assert len(losses) == 40
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    tokenizer = load_tokenizer(config.output)
    assert tokenizer.encode("1+2\n=3") == tape_tokenizer().encode("1+2\n=3")
    assert not list(Path(config.output).glob("*.ckpt"))
    # A policy is a place to go on from: the second starts where the first ended.
    on = replace(config, output=str(tmp_path / "on"), init=config.output, steps=4, warmup=0)
    assert run(on, monkeypatch)[0] < 1.2 * losses[-1]


def test_resumed_training_equals_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = replace(TINY, output=str(tmp_path / "unbroken"))
    losses = run(unbroken, monkeypatch)
    # A repeat is the same, bit by bit.
    again = replace(TINY, output=str(tmp_path / "again"))
    assert run(again, monkeypatch) == losses
    broken = replace(TINY, output=str(tmp_path / "broken"))
    # Saved every 9 steps, so not at the edge of a bucket of batches.
    first = run(broken, monkeypatch, save_every=9, stop_after=30)
    assert first == losses[:30]
    assert not (tmp_path / "broken" / "config.json").exists()
    assert run(broken, monkeypatch, save_every=9) == losses[27:]
    for one, other in ((unbroken, broken), (unbroken, again)):
        a, b = weights(one.output), weights(other.output)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_says_so_and_the_same_command_goes_on(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = replace(TINY, output=str(tmp_path / "policy"))
    losses = run(replace(config, output=str(tmp_path / "unbroken")), monkeypatch)
    before = signal.getsignal(number)
    step = SftModule.training_step
    seen: list[int] = []

    def signalled(self: SftModule, *batch: Any) -> None:
        seen.append(self.global_step // 2)
        if len(seen) == 12:
            signal.raise_signal(number)
        step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(SftModule, "training_step", signalled)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command(lambda _: sft(config), SftConfig, "pav.sft", ["--output", config.output])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "pav.sft: interrupted; the same command resumes\n"
    assert signal.getsignal(number) == before
    assert sorted(p.name for p in Path(config.output).iterdir()) == ["last.ckpt", "sft.json"]
    assert run(config, monkeypatch) == losses[12:]
    a, b = weights(config.output), weights(str(tmp_path / "unbroken"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_damaged_checkpoint_costs_the_steps_after_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = run(replace(TINY, output=str(tmp_path / "unbroken")), monkeypatch)
    broken = replace(TINY, output=str(tmp_path / "broken"))
    run(broken, monkeypatch, save_every=9, stop_after=30)
    os.truncate(tmp_path / "broken" / "last.ckpt", 2000)
    assert run(broken, monkeypatch, save_every=9) == losses[18:]
    assert "last.ckpt' is damaged (File is not a zip file); it is passed" in capsys.readouterr().err
    assert not list((tmp_path / "broken").glob("*.ckpt"))


@pytest.mark.parametrize("save_every", [9, 1000], ids=["checkpoint", "policy"])
def test_full_disk_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    config = replace(TINY, output=str(tmp_path / "policy"))
    with full_disk(10_000), pytest.raises(UserError, match=r"cannot be written .*File too large"):
        run(config, monkeypatch, save_every=save_every)
    assert {p.name for p in (tmp_path / "policy").iterdir()} == {"sft.json"}
    assert len(run(config, monkeypatch)) == TINY.steps
    assert load_tokenizer(config.output)


def test_another_configuration_does_not_resume_an_unfinished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, output=str(tmp_path / "policy"))
    run(config, monkeypatch, save_every=9, stop_after=20)
    with pytest.raises(UserError, match=r"another lr .*0\.01 there, 0\.5 now"):
        sft(replace(config, lr=0.5))


def test_compiled_training_follows_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler on this machine")
    config = replace(TINY, steps=6)
    plain = run(replace(config, output=str(tmp_path / "plain")), monkeypatch)
    compiled = run(replace(config, output=str(tmp_path / "c"), compile=True), monkeypatch)
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_output_that_holds_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"already holds a model; choose another directory"):
        sft(replace(TINY, output=str(tmp_path)))


def test_task_without_solutions_is_refused(tmp_path: Path) -> None:
    class Silent(Tape):
        solutions = None  # type: ignore[assignment]

    with pytest.raises(UserError, match=r"task 'silent' has no solutions to learn from; give it"):
        sft(replace(TINY, output=str(tmp_path), task=Silent()))


def test_only_solution_and_end_carry_loss() -> None:
    tokenizer, task = tape_tokenizer(), Tape(sft_ops=(1, 3))
    data = Solutions(task, tokenizer, replace(TINY, batch=4, steps=16), 0)
    pairs = {s: q for q, s in islice(task.solutions(0), 64)}
    rows = 0
    for ids, labels in data:
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            target = [t for t in label if t != IGNORE]
            assert target[-1] == tokenizer.eos_token_id
            solution = tokenizer.decode(target[:-1])
            prompt = tokenizer.encode(pairs[solution] + "\n")
            assert row[: len(prompt)] == prompt and set(label[: len(prompt)]) == {IGNORE}
            end = len(prompt) + len(target)
            assert row[len(prompt) : end] == label[len(prompt) : end] == target
            assert set(row[end:]) <= {tokenizer.pad_token_id}
            assert set(label[end:]) <= {IGNORE}
            rows += 1
    assert rows == 64


@settings(deadline=None)
@given(st.integers(0, 47))
def test_batches_depend_on_seed_and_step_alone(start: int) -> None:
    config = replace(TINY, steps=48, batch=2)
    tokenizer = tape_tokenizer()
    whole = list(islice(Solutions(config.task, tokenizer, config, 0), 48))
    rest = list(Solutions(config.task, tokenizer, config, start))
    for (a, b), (c, d) in zip(whole[start:], rest, strict=False):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert len(rest) >= 48 - start


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 60), st.floats(0.01, 1.0))
def test_rate_warms_up_stays_and_falls_to_zero(steps: int, warmup: int, decay: float) -> None:
    config = replace(TINY, steps=steps, warmup=warmup, decay=decay)
    rates = [schedule(step, config) for step in range(steps + 1)]
    assert all(0.0 <= rate <= 1.0 for rate in rates)
    assert rates[-1] == 0.0
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    falling = rates[peak:]
    assert falling == sorted(falling, reverse=True)


def test_matrices_inside_layers_are_muons_and_the_rest_adamws() -> None:
    from transformers import LlamaForCausalLM

    config = replace(TINY, shape=PolicyShape(32, 2, 1, 32))
    model = LlamaForCausalLM(sft_module.llama_config(config, 19))
    muon, adamw = SftModule(config, model).configure_optimizers()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (muon, adamw)
    ]
    assert groups[0] | groups[1] == set(names.values()) and not groups[0] & groups[1]
    assert all("layers." in name and "norm" not in name for name in groups[0])
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= groups[1]
