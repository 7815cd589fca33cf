"""Trunk modes, heads, recipes and loggers of ``pav.train``, and what serves or refuses them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from transformers import AutoModelForCausalLM

import pav.train.command
from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.steps import scoring_position
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.vllm import VllmEngine
from pav.export.vllm import ensure_export
from pav.labels.examples import Example, hardened, pav_examples
from pav.labels.tables import read_labels
from pav.policy.inference import SCORE_SCALE, Read
from pav.policy.policy import PolicyConfig, load_policy
from pav.train.batches import MAX_WASTE, TraceLoader
from pav.train.checkpoints import WholeCheckpoints
from pav.train.command import train
from pav.train.config import TrainConfig
from pav.train.fit import prepare, trainer_of
from pav.verifier.checkpoint import VerifierMeta, load_model, load_verifier, trunk_path
from pav.verifier.forward import batches, padding_waste
from pav.verifier.lora import Lora
from pav.verifier.trunk import HeadedTrunk, load_trunk
from tests.pav.label_runs import HEADS, TASK, write_labels

CONFIGS = Path(__file__).parents[2] / "configs" / "math_gemma2"


@pytest.fixture(scope="module")
def trunk(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def labels(trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("modes") / "labels"
    return write_labels(directory, trunk, train_problems=20, validation_problems=12, seeds=2)


@pytest.fixture
def config(labels: str, trunk: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        [labels], str(tmp_path / "pav.ckpt"), trunk=str(trunk), accelerator="cpu", max_epochs=2
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out calibration and report, which these tests do not look at."""

    def unreported(card: VerifierMeta, *_: Any) -> VerifierMeta:
        return card

    monkeypatch.setattr(pav.train.command, "fit_and_report", unreported)
    monkeypatch.setattr(pav.train.command, "print_report", lambda *_: None)


@pytest.mark.usefixtures("quick")
def test_adapters_alone_are_kept_and_vllm_serves_them_merged(
    config: TrainConfig, trunk: Path
) -> None:
    lora = Lora(rank=4, alpha=16.0, targets=["q_proj", "down_proj"])
    train(replace(config, trunk_mode="lora", lora=lora, lr=2e-2, head_lr=2e-2))
    verifier = load_verifier(config.output)
    held = torch.load(config.output, weights_only=True)["state_dict"]
    assert len(held) == 2 + 2 * 2 * 2  # heads; A and B of two layers of two blocks
    assert all(min(v.shape) in (1, 3, 4) or v.ndim == 1 for v in held.values())
    assert not verifier.card.frozen
    assert verifier.card.lora == {"rank": 4, "alpha": 16.0}

    model = load_model(verifier, trunk_path(verifier))
    before = load_trunk(str(trunk)).state_dict()
    moved = {k for k, v in model.trunk.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.split(".")[-2] for k in moved} == {"q_proj", "down_proj"}
    assert max(float((model.trunk.state_dict()[k] - before[k]).abs().max()) for k in moved) > 0.01

    directory, score_ids = ensure_export(verifier, str(trunk))
    policy = load_policy(PolicyConfig(str(trunk)), TASK.step_rule)
    found = read_labels(config.labels)
    examples = pav_examples(found, "validation", HEADS, policy, 64)[:6]
    engine = VllmEngine(str(directory), "float32", 64, score_ids, EngineConfig(kv_gib=0.05))
    places = [(e.ids, int(p)) for e in examples for p in e.positions_P]
    reads: dict[int, Read] = {}

    async def read(i: int, ids: list[int]) -> tuple[int, Read]:
        return i, await engine.read(ids)

    jobs = [partial(read, i, ids[: at + 1]) for i, (ids, at) in enumerate(places)]
    drive([engine], jobs, lambda pair: reads.update([pair]), len(jobs))
    engine.shutdown()
    with torch.inference_mode():
        for i, (ids, at) in enumerate(places):
            logits = model.head_logits(model.hidden(torch.tensor([ids])))[0, at]
            own = (logits - model.head.bias).numpy()
            np.testing.assert_allclose(reads[i].heads, own, atol=1e-4)


def test_adapters_of_a_sharded_trunk_change_their_shards_alone(
    config: TrainConfig, trunk: Path, tmp_path: Path, make_verifier: Any
) -> None:
    source = tmp_path / "sharded"
    load_trunk(str(trunk)).save_pretrained(source, max_shard_size="20KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((trunk / file).read_bytes())
    where = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    model = make_verifier(source, tmp_path / "pav.ckpt", frozen=False)
    name = "model.layers.1.self_attn.q_proj"
    low, high = torch.randn(2, 64), torch.randn(64, 2)
    card = replace(load_verifier(config.output).card, lora={"rank": 2, "alpha": 3.0})
    adapters = {f"{name}.lora_A.weight": low, f"{name}.lora_B.weight": high}
    pav.train.command.save(card, model, tmp_path / "lora.ckpt", adapters)
    verifier = load_verifier(str(tmp_path / "lora.ckpt"))
    directory, _ = ensure_export(verifier, str(source))
    touched = {where[k] for k in (f"{name}.weight", "model.embed_tokens.weight", "lm_head.weight")}
    for file in set(where.values()):
        assert (directory / file).is_symlink() == (file not in touched)
    served = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    own = load_trunk(str(source)).state_dict()
    torch.testing.assert_close(served[f"{name}.weight"], own[f"{name}.weight"] + 1.5 * (high @ low))
    assert torch.equal(served["model.layers.0.mlp.up_proj.weight"],
                       own["model.layers.0.mlp.up_proj.weight"])  # fmt: skip
    # An adapter of a layer that the files do not hold is not left out in silence.
    lost = {k.replace("layers.1", "layers.7"): v for k, v in adapters.items()}
    pav.train.command.save(card, model, tmp_path / "lost.ckpt", lost)
    with pytest.raises(UserError, match=r"holds no 'model.layers.7.self_attn.q_proj.weight'"):
        ensure_export(load_verifier(str(tmp_path / "lost.ckpt")), str(source))


def test_adapter_of_a_layer_that_the_trunk_lacks_is_refused_before_the_trunk_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pav.train.command, "load_trunk", lambda *_: pytest.fail("loaded"))
    wrong = replace(config, trunk_mode="lora", lora=Lora(targets=["query"]))
    with pytest.raises(UserError, match=r"names 'query', which is no linear .* q_proj, up_proj"):
        train(wrong)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("loss", ["hard", "mse"])
def test_every_loss_trains_heads_that_tell_good_from_bad(
    loss: Any, config: TrainConfig, trunk: Path
) -> None:
    card = train(replace(config, loss=loss, max_epochs=12))
    assert card is not None
    assert card.loss == loss
    model = load_model(load_verifier(config.output), str(trunk))
    policy = load_policy(PolicyConfig(str(trunk)), TASK.step_rule)
    said, target = [], []
    for e in pav_examples(read_labels(config.labels), "validation", HEADS, policy, 64):
        with torch.inference_mode():
            hidden = model.hidden(torch.tensor([e.ids]))[0, e.positions_P]
            said += model.head_logits(hidden)[:, 0].tolist()
        target += (e.k_PH[:, 0] / np.maximum(e.n_PH[:, 0], 1e-9)).tolist()
    good, bad = (np.array(said)[np.array(target) == t] for t in (1.0, 0.0))
    assert good.mean() > bad.mean() + 0.5


def test_hard_labels_call_a_prefix_good_if_any_rollout_was_right() -> None:
    k, n, share = ([[0.5], [0.0], [1.0]], [[2.0], [2.0], [1.0]], [[0.5], [0.5], [1.0]])
    arrays = [np.array(a, dtype=np.float32) for a in (k, n, share)]
    example = Example("p", [1, 2, 3], 1, [1, 2], np.arange(3), *arrays)
    (hard,) = hardened([example])
    assert (hard.k_PH / hard.n_PH)[:, 0].tolist() == [1, 0, 1]
    assert hard.n_PH[:, 0].tolist() == [0.5, 0.5, 1]


def test_pqv_has_no_prover_and_no_weight_for_an_advantage(config: TrainConfig) -> None:
    card = train(replace(config, recipe="pqv", loss="hard"))
    assert card is not None
    assert card.heads == ["q/base", "orm"]
    assert (card.recipe, card.base_head, card.prover_head) == ("pav", "q/base", "q/base")
    assert card.alpha == 0


def example_of(length: int, number: int) -> Example:
    one = np.ones((1, 1), dtype=np.float32)
    return Example(str(number), [1] * length, 1, [length - 1], np.array([0]), one, one, one)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 400), min_size=1, max_size=60),
    tokens=st.integers(32, 2000), accumulate=st.integers(1, 3), world=st.integers(1, 4),
    epochs=st.integers(1, 2),
)  # fmt: skip
def test_every_trace_is_seen_once_an_epoch_whatever_the_number_of_processes(
    lengths: list[int], tokens: int, accumulate: int, world: int, epochs: int
) -> None:
    examples = [example_of(length, i) for i, length in enumerate(lengths)]
    parts = list(batches(examples, 0, tokens, MAX_WASTE))
    assert padding_waste(parts) <= MAX_WASTE
    for part in parts:
        assert len(part) == 1 or len(part) * max(len(e.ids) for e in part) <= tokens

    def loaders(ranks: int, steps: int) -> list[TraceLoader]:
        make = partial(TraceLoader, examples, np.ones((2, 1), np.float32), 3, tokens, steps)
        return [make(rank, ranks) for rank in range(ranks)]

    def labels_of(batch: Any) -> list[int]:
        return sorted(batch.ids_BT.ne(0).sum(1)[batch.row_N].tolist())

    shared, (alone,) = loaders(world, accumulate), loaders(1, accumulate * world)
    for _ in range(epochs):
        rows = list(zip(*(list(loader) for loader in shared), strict=True))
        seen = [length for row in rows for batch in row for length in labels_of(batch)]
        assert sorted(seen) == sorted(lengths)
        # An optimiser step holds the same labels, and is divided by the same weight.
        own = list(alone)
        for i in range(0, len(rows), accumulate):
            window = [batch for row in rows[i : i + accumulate] for batch in row]
            same = own[i * world : (i + accumulate) * world]
            assert sorted(x for b in window for x in labels_of(b)) == sorted(
                x for b in same for x in labels_of(b)
            )
            assert {float(b.total) for b in window} == {float(b.total) for b in same}
    # From the middle of an epoch the rest comes as it would have.
    first, second = loaders(1, 1) + loaders(1, 1)
    whole = [b.ids_BT.shape for b in first] + [b.ids_BT.shape for b in first]
    iterator = iter(second)
    cut = 1 + len(whole) // 4
    part = [next(iterator).ids_BT.shape for _ in range(min(cut, len(second)))]
    third = loaders(1, 1)[0]
    third.load_state_dict(second.state_dict())
    rest = [b.ids_BT.shape for b in third] + [b.ids_BT.shape for b in third]
    assert part + rest == (whole if len(part) < len(second) else [*whole, *rest[-len(second) :]])


def test_padding_is_printed_and_small(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, trunk_mode="full", tokens_per_batch=512, dry_run=True))
    line = next(x for x in capsys.readouterr().out.splitlines() if "padding" in x)
    assert float(line.split("%")[0].split()[-1]) <= 10


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_recomputed_activations_give_the_same_gradients(mode: Any, trunk: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = HeadedTrunk(load_trunk(str(trunk)), 2)
        torch.nn.init.normal_(model.head.weight)
        prepare(TrainConfig([], trunk_mode=mode, gradient_checkpointing=checkpointing), model)
        for p in model.parameters():
            if p.requires_grad and not p.any():
                torch.nn.init.normal_(p, std=0.1)  # adapters start as nothing
        ids = torch.randint(3, 19, (3, 20), generator=torch.Generator().manual_seed(1))
        model(ids, torch.tensor([0, 1, 2]), torch.tensor([4, 9, 19])).sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        gradients.append([p.grad for p in trained])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.usefixtures("quick")
def test_warm_up_rises_and_the_cosine_ends_at_max_steps(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def note(self: Any, *_: Any) -> None:
        rates.append(self.optimizers().param_groups[1]["lr"])

    monkeypatch.setattr("pav.train.fit.VerifierModule.on_train_batch_end", note, raising=False)
    train(replace(config, trunk_mode="full", lr=0.01, warmup=4, max_steps=12, max_epochs=50,
                  patience=50, tokens_per_batch=512, precision="bf16-mixed"))  # fmt: skip
    assert len(rates) == 12
    # The first step had a fifth of the peak; what is noted is the rate of the next step.
    assert rates[:4] == pytest.approx([0.004, 0.006, 0.008, 0.01])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 1e-3


@pytest.mark.usefixtures("quick")
def test_one_device_trains_inside_a_slurm_job_of_many_tasks(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = {"JOB_ID": "17", "JOB_NAME": "labels", "NTASKS": "4", "NTASKS_PER_NODE": "4",
             "PROCID": "2", "LOCALID": "2", "NODEID": "0", "NODELIST": "node[1-2]",
             "JOB_NUM_NODES": "2"}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(rank_zero_only, "rank", 2)
    train(replace(config, trunk_mode="full", max_epochs=1))
    assert load_verifier(config.output).trunk_state is not None


@pytest.mark.usefixtures("quick")
def test_tensorboard_gets_losses_and_metrics(config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    train(replace(config, logger="tensorboard", max_epochs=1))
    (events,) = (tmp_path / "pav.logs").glob("events.out.tfevents.*")
    assert b"val_loss" in events.read_bytes()


@pytest.mark.usefixtures("quick")
def test_wandb_works_offline(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(replace(config, logger="wandb", max_epochs=1))
    wandb.finish()
    (record,) = (tmp_path / "pav.logs").glob("wandb/offline-run-*/*.wandb")
    # A process of wandb's own writes it.
    for _ in range(600):
        if b"val_loss" in record.read_bytes():
            return
        time.sleep(0.1)
    raise AssertionError("no loss was written")


@pytest.mark.parametrize(("logger", "package"), [("tensorboard", "tensorboardX"), ("wandb",) * 2])
def test_logger_without_its_package_is_an_error_that_names_it(
    logger: Any, package: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flag in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{flag}", False)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    monkeypatch.setattr(pav.train.command, "load_trunk", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=f"needs the package {package}.*pip install {package}"):
        train(replace(config, logger=logger))


@pytest.mark.usefixtures("quick")
def test_fewer_steps_than_an_epoch_are_refused(config: TrainConfig) -> None:
    short = replace(config, trunk_mode="full", max_steps=1, warmup=0, tokens_per_batch=512)
    with pytest.raises(UserError, match=r"max_steps is 1, less than the \d+ steps of an epoch"):
        train(short)


def test_slurm_writes_no_checkpoint_of_its_own(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "NTASKS": "2",
        "NTASKS_PER_NODE": "2",
        "JOB_NAME": "labels",
        "NODEID": "0",
        "PROCID": "0",
        "LOCALID": "0",
        "NNODES": "1",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    two = replace(config, trunk_mode="full", devices=2, accelerator="cpu")
    trainer = trainer_of(two, [], WholeCheckpoints())
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue


def test_settings_that_contradict_each_other_are_refused(config: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"devices x num_nodes is 2, but heads on a frozen trunk"):
        replace(config, devices=2)
    with pytest.raises(UserError, match=r"strategy fsdp shards .* trunk_mode is lora; use --strat"):
        replace(config, strategy="fsdp", trunk_mode="lora", devices=2)
    with pytest.raises(UserError, match=r"max_steps is 5; give more than warmup \(10\)"):
        replace(config, max_steps=5, warmup=10)
    with pytest.raises(UserError, match=r"accumulate is 0; give 1 or more"):
        replace(config, accumulate=0)


def test_plan_that_does_not_fit_is_refused_before_anything_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pav.train.command, "load_trunk", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"needs about 1\.\d GiB \(weights .* has 0.5 GiB"):
        train(replace(config, trunk_mode="full", memory_gib=0.5))
    assert not Path(config.output).with_suffix(".training").exists()


@pytest.fixture(scope="module")
def gemma_labels(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Labels by a tiny Gemma 2, and that model."""
    model = tiny_model("gemma2")
    directory = tmp_path_factory.mktemp("gemma") / "labels"
    write_labels(directory, model, train_problems=6, validation_problems=4, seeds=2)
    return str(directory), model


@pytest.mark.parametrize("name", ["pav", "orm", "pqv_hard", "pqv_soft", "pav_lora"])
def test_paper_settings_of_gemma_2_are_whole_and_run_dry(
    name: str, gemma_labels: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = CONFIGS / f"{name}.yaml"
    with pytest.raises(SystemExit) as done:
        run(train, TrainConfig, "pav.train", ["--config", str(path), "--print_config"])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trunk"] == "google/gemma-2-9b"
    assert printed["warmup"] / printed["max_steps"] == 0.1
    labels, model = gemma_labels
    output = tmp_path / "pav.ckpt"
    run(train, TrainConfig, "pav.train", [
        "--config", str(path), "--labels", f"[{labels}]", "--trunk", str(model),
        "--output", str(output), "--accelerator", "cpu", "--devices", "1", "--strategy", "auto",
        "--memory_gib", "8", "--dry_run", "true",
    ])  # fmt: skip
    said = capsys.readouterr().out
    assert "memory: about" in said
    assert "dry run: planned, loaded, one batch trained and one validated" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["rollouts", "rollouts_pqv"])
def test_label_runs_of_the_paper_are_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from data_gen.config import RolloutsConfig
    from data_gen.rollouts import rollouts

    path = CONFIGS / f"{name}.yaml"
    with pytest.raises(SystemExit) as done:
        run(rollouts, RolloutsConfig, "rollouts", ["--config", str(path), "--print_config"])
    assert done.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["n_mc"] == 20


def test_exported_directory_holds_no_code_and_names_none(
    trunk: Path, make_verifier: Any, tmp_path: Path
) -> None:
    source, mark = tmp_path / "trunk", tmp_path / "ran"
    load_trunk(str(trunk)).save_pretrained(source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((trunk / file).read_bytes())
    (source / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    for file in ("config.json", "tokenizer_config.json"):
        plain = json.loads((source / file).read_text()) | {"auto_map": names}
        (source / file).write_text(json.dumps(plain))
    make_verifier(source, tmp_path / "pav.ckpt")
    directory, _ = ensure_export(load_verifier(str(tmp_path / "pav.ckpt")), str(source))
    assert not list(directory.rglob("*.py"))
    assert all("auto_map" not in f.read_text() for f in directory.glob("*.json"))
    logits = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)(
        torch.tensor([[1, 2, 3]])
    ).logits
    assert logits.isfinite().all()
    assert not mark.exists()
    assert json.loads((directory / "pav.json").read_text())["scale"] == SCORE_SCALE


def test_scored_positions_are_the_last_content_tokens(labels: str, trunk: Path) -> None:
    policy = load_policy(PolicyConfig(str(trunk)), TASK.step_rule)
    for e in pav_examples(read_labels([labels]), "train", HEADS, policy, 64)[:20]:
        ends = (0, *e.ends)
        assert e.positions_P.tolist() == [scoring_position(e.prompt_length, end) for end in ends]
        # The token that comes after a scored position is the delimiter, or the end.
        for position in e.positions_P[1:]:
            text = policy.tokenizer.decode([e.ids[position + 1]])
            assert "\n" in text or e.ids[position + 1] == policy.tokenizer.eos_token_id
