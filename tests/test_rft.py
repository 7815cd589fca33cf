"""Fine-tuning on a label run's correct traces: what is learned, kept, resumed and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pav.core.errors import UserError
from pav.labels.tables import read_labels
from pav.policy.policy import Prompt, load_tokenizer
from pav.sft import sft
from pav.tasks.tape import Tape
from pav.train import rft_fit
from pav.train.rft import correct, solutions_of
from pav.train.rft_fit import IGNORE, RftModule, Steps, collate, schedule
from pav.train.sft_config import PolicyShape, RftConfig, SftConfig
from pav.verifier.lora import Lora
from pav.verifier.trunk import load_trunk
from tests.following import follow, printed
from tests.pav.label_runs import write_labels


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def labels(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labels(tmp_path_factory.mktemp("rft") / "labels", model)


def config(labels: str, output: Path, **rft: Any) -> SftConfig:
    settings = RftConfig(**{"lr": 1e-3, "max_epochs": 3, "tokens_per_batch": 300, **rft})
    return SftConfig(str(output), from_traces=labels, rft=settings, batch=16)


def held_out_loss(labels: str, model: Any) -> float:
    """Nats per solution token of correct validation traces."""
    tokenizer = load_tokenizer(labels_policy(labels))
    solutions = solutions_of(correct(read_labels([labels]), "validation"), tokenizer, Prompt())
    ids, labelled = collate(solutions)
    with torch.no_grad():
        logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    kept = labelled[:, 1:] != IGNORE
    return -float(logp.gather(-1, ids[:, 1:, None])[..., 0][kept].mean())


def labels_policy(labels: str) -> str:
    return str(read_labels([labels]).manifest["policy"]["model"])


def test_loss_on_held_out_correct_traces_falls_and_the_policy_is_sampled_from(
    labels: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    follow(["pav.sft", "--from_traces", labels, "--output", "my start", "--rft.lr", "1e-3",
            "--rft.max_epochs", "3", "--batch", "16"])  # fmt: skip
    said = capsys.readouterr().out
    before = held_out_loss(labels, load_trunk(str(model)))
    after = held_out_loss(labels, load_trunk("my start"))
    assert after < before - 0.3
    assert f"held-out loss {before:.4f} -> {after:.4f} nats per token" in said
    assert not list(Path("my start").glob("*.ckpt"))
    (following,) = printed(said)
    assert following[:3] == ["data_gen.rollouts", "--policy", "my start"]
    # What a random model samples is often cut.
    follow(following, "--problems", "2", "--validation_problems", "2", "--n_traces", "2", "--n_mc",
           "1", "--ignore_warnings", "true", "--engine.kv_gib", "0.02",
           "--sampler.max_length", "64")  # fmt: skip
    traces = read_labels(["runs/labels_rft"]).traces
    assert len({t.problem_id for t in traces}) == 4


def test_adapters_merged_are_those_that_peft_loads(
    labels: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = Lora(rank=4, dropout=0.1, targets=["q_proj", "up_proj"])
    sft(config(labels, tmp_path / "out", mode="lora", lora=lora, lr=5e-3))
    merged, plain = load_trunk(str(tmp_path / "out")), load_trunk(str(model))
    assert held_out_loss(labels, merged) < held_out_loss(labels, plain) - 0.1
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "out" / "adapter"))
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    changed = {
        name for name, w in load_file(tmp_path / "out" / "model.safetensors").items()
        if not torch.equal(w, load_file(model / "model.safetensors")[name])
    }  # fmt: skip
    assert changed and all("q_proj" in name or "up_proj" in name for name in changed)


def test_correct_traces_of_training_problems_are_learned_once_and_only_what_they_say(
    labels: str, model: Path
) -> None:
    found = read_labels([labels])
    twice = replace(found, traces=[*found.traces, *found.traces])
    tokenizer = load_tokenizer(str(model))
    for split in ("train", "validation"):
        chosen = correct(twice, split)
        wanted = {(t.problem_id, *t.ids) for t in found.traces if t.correct and t.split == split}
        assert len(chosen) == len(wanted) and {(t.problem_id, *t.ids) for t in chosen} == wanted
        assert 0 < len(wanted) < sum(t.split == split for t in found.traces)
        ids, labelled = collate(solutions_of(chosen, tokenizer, Prompt(template="Q: {question}\n")))
        for row, kept, trace in zip(ids.tolist(), labelled.tolist(), chosen, strict=True):
            prompt = tokenizer.encode(f"Q: {trace.question}\n")
            end = len(prompt) + len(trace.ids)
            assert row[: len(prompt)] == prompt and row[len(prompt) : end] == trace.ids
            assert kept[len(prompt) : end] == trace.ids
            assert {*kept[: len(prompt)], *kept[end:]} <= {IGNORE}


def test_batches_of_a_step_change_its_gradient_by_rounding_alone(
    labels: str, model: Path, tmp_path: Path
) -> None:
    outputs = [tmp_path / "whole", tmp_path / "cut"]
    for output, tokens in zip(outputs, (100_000, 1), strict=True):
        sft(config(labels, output, tokens_per_batch=tokens, max_epochs=1))
    whole, cut = (load_file(output / "model.safetensors") for output in outputs)
    assert all((whole[k] - cut[k]).abs().max() < 1e-4 for k in whole)


class Died(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_resumed_fine_tuning_equals_an_unbroken_one(
    mode: str, labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = Lora(rank=2, dropout=0.2)
    unbroken, broken = (
        config(labels, tmp_path / name, mode=mode, lora=lora) for name in ("unbroken", "broken")
    )
    sft(unbroken)
    step, seen = RftModule.training_step, []

    def dying(self: RftModule, *batch: Any) -> None:
        seen.append(self.global_step)
        if len(seen) in (4, 9):
            raise Died
        step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(rft_fit, "CHECKPOINT_MINUTES", 0.0)
        patch.setattr(RftModule, "training_step", dying)
        for _ in range(2):
            with pytest.raises(Died):
                sft(broken)
        with pytest.raises(UserError, match=r"unfinished run .* with another rft"):
            sft(replace(broken, rft=replace(broken.rft, lr=0.5)))
        sft(broken)
    # The second death was in another epoch than the first.
    assert seen[3] == 3 and 5 <= seen[8] < 10
    a, b = (load_file(Path(c.output) / "model.safetensors") for c in (unbroken, broken))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_stops_by_the_held_out_loss_and_keeps_the_best_epoch(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # So few traces are soon known by heart.
    labels = write_labels(tmp_path / "labels", model, train_problems=8, validation_problems=8)
    sft(config(labels, tmp_path / "out", lr=0.01, max_epochs=40, patience=1))
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("held-out loss"))
    kept, done = line.rpartition("epoch ")[2].split(" of ")
    assert int(done) == int(kept) + 1 < 40
    loss = held_out_loss(labels, load_trunk(str(tmp_path / "out")))
    assert f"-> {loss:.4f} nats" in line
    worse = config(labels, tmp_path / "worse", lr=0.3, warmup=0, max_epochs=1)
    sft(replace(worse, init=str(tmp_path / "out")))
    said = "no epoch is better on held-out traces than the start; lower rft.lr (now 0.3)"
    assert said in capsys.readouterr().err


def test_label_runs_that_cannot_be_learned_from_are_refused(
    labels: str, model: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    def said(of: str, **change: Any) -> str:
        with pytest.raises(UserError) as error:
            sft(replace(config(of, tmp_path / "out"), **change))
        return str(error.value)

    found = said(labels, init=str(tiny_model("llama", "chat")))
    assert "has another tokenizer than the policy" in found and "\n" not in found
    never = write_labels(tmp_path / "never", model, truncated=True)
    assert "hold no correct trace of its 60 training problems, and correct" in said(never)
    alone = write_labels(tmp_path / "alone", model, validation_problems=0)
    assert "hold no validation problems, and correct traces of some are needed to know" in (
        said(alone)
    )
    other = Path(shutil.copytree(labels, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["prompts"] = {"base": {"ids": "0", "text": "another"}}
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert "is asked otherwise than the label run" in said(str(other))
    assert "config.json" not in {p.name for p in (tmp_path / "out").iterdir()}


def test_settings_of_the_other_way_are_refused() -> None:
    for setting, value in {
        "task": Tape(n_ops=2), "shape": PolicyShape(8), "prompt": Prompt("{question}?"), "steps": 7,
        "lr_rest": 0.1, "warmup": 3, "decay": 0.1, "compile": True, "eval_problems": 0,
        "max_length": 9,
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"{setting} means nothing with from_traces, .* out"):
            SftConfig("out", from_traces="labels", **{setting: value})
    with pytest.raises(UserError, match=r"lr means nothing .*; the learning rate is rft\.lr"):
        SftConfig("out", from_traces="labels", lr=1e-5)
    with pytest.raises(UserError, match="rft is set, which is about from_traces, and that is not"):
        SftConfig("out", rft=RftConfig(patience=5))
    with pytest.raises(UserError, match="precision is 16-mixed"):
        SftConfig("out", from_traces="labels", precision="16-mixed")
    with pytest.raises(UserError, match=r"rft\.patience is 0; give 1 or more"):
        RftConfig(patience=0)


def test_steps_depend_on_seed_epoch_and_place_alone(labels: str, model: Path) -> None:
    found = correct(read_labels([labels]), "train")
    solutions = solutions_of(found, load_tokenizer(str(model)), Prompt())
    steps = Steps(solutions, 16, 300, 0)
    first, second = list(steps), list(steps)
    assert len(first) == len(second) == len(steps)
    again = Steps(solutions, 16, 300, 0)
    again.load_state_dict({"epoch": 1, "done": 2})
    for a, b in zip(second[2:], again, strict=True):
        assert all(torch.equal(x[0], y[0]) for x, y in zip(a, b, strict=True))
    rows = [row for step in first for ids, _ in step for row in ids]
    assert len(rows) == len(solutions)
    assert all(ids.numel() <= 300 for step in first for ids, _ in step)
    assert not all(torch.equal(a[0][0], b[0][0]) for a, b in zip(first, second, strict=True))


def test_rate_warms_up_and_falls_to_zero() -> None:
    rates = [schedule(step, 4, 40) for step in range(41)]
    assert rates[4] == 1.0 and rates[40] == pytest.approx(0)
    assert rates[:5] == sorted(rates[:5]) and rates[4:] == sorted(rates[4:], reverse=True)
    assert all(0 < rate <= 1 for rate in rates[:40])
