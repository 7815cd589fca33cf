"""Checkpoints and exports: nothing foreign runs, what moved is named, shards are linked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_gen.store import Store
from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.export.vllm import ensure_export
from pav.labels.tables import Trace
from pav.policy.inference import SCORE_SCALE
from pav.policy.policy import PolicyConfig, Sampler, load_policy, tokenizer_fingerprint
from pav.tasks.base import task_spec
from pav.tasks.tape import Tape
from pav.train.command import TrainConfig, save, train
from pav.verifier.checkpoint import Verifier, load_verifier, resolve_task, trunk_path
from pav.verifier.trunk import HeadedTrunk, load_trunk
from search.run.opening import open_session


@pytest.fixture
def trunk(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def checkpoint(trunk: Path, make_verifier: Any, tmp_path: Path) -> Path:
    """A checkpoint with a frozen trunk and two heads."""
    path = tmp_path / "pav.ckpt"
    make_verifier(trunk, path)
    return path


def rewritten(checkpoint: Path, **changes: Any) -> str:
    """The checkpoint with other fields on its card."""
    held = torch.load(checkpoint, weights_only=True)
    held["verifier"] = json.dumps(json.loads(held["verifier"]) | changes)
    torch.save(held, checkpoint)
    return str(checkpoint)


def test_a_checkpoint_of_another_format_is_refused_by_number(checkpoint: Path) -> None:
    held = torch.load(checkpoint, weights_only=True)
    del held["format"]
    torch.save(held, checkpoint)
    with pytest.raises(UserError, match=r"has checkpoint format 1, this version reads 2; train it"):
        load_verifier(str(checkpoint))


# A module on the path that leaves a mark when it is imported.
MODULE = """
from dataclasses import dataclass
from pathlib import Path
from pav.core.steps import StepRule
from pav.tasks.tape import Tape

Path({mark!r}).touch()

@dataclass(frozen=True)
class Mine(Tape):
    pass

@dataclass(frozen=True)
class Rule(StepRule):
    pass
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """Name of an importable module that is not ours, and the file that importing it makes."""
    mark, name = tmp_path / "imported", f"foreign_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    return name, mark


def test_task_class_named_in_a_checkpoint_is_imported_only_if_the_user_names_it(
    checkpoint: Path, foreign: tuple[str, Path]
) -> None:
    module, mark = foreign
    spec = {**task_spec(Tape()), "class_path": f"{module}.Mine"}
    verifier = load_verifier(rewritten(checkpoint, task=spec))
    refusal = f"names the task '{module}.Mine', which is not built in .* add --task {module}.Mine"
    with pytest.raises(UserError, match=refusal):
        resolve_task(verifier.card.task, None, "verifier 'pav.ckpt'")
    with pytest.raises(UserError, match=refusal):
        open_session(verifier, None, None, None, EngineConfig())
    with pytest.raises(
        UserError, match=rf"is about task '{module}.Mine', not 'pav.tasks.tape.Tape'"
    ):
        resolve_task(verifier.card.task, Tape(), "verifier 'pav.ckpt'")
    assert not mark.exists()
    mine = __import__(module).Mine()
    assert resolve_task(verifier.card.task, mine, "verifier 'pav.ckpt'") is mine
    assert mark.exists()


@pytest.mark.parametrize("form", ["class_path", "text"])
def test_class_named_among_a_built_in_tasks_settings_is_not_imported(
    form: str, checkpoint: Path, foreign: tuple[str, Path]
) -> None:
    module, mark = foreign
    spec = task_spec(Tape())
    name = f"{module}.Rule"
    spec["init_args"]["step_rule"] = {"class_path": name} if form == "class_path" else name
    verifier = load_verifier(rewritten(checkpoint, task=spec))
    with pytest.raises(UserError, match="settings that this version does not know"):
        open_session(verifier, None, None, None, EngineConfig())
    assert not mark.exists()


def test_task_class_named_in_labels_is_not_imported(
    trunk: Path, foreign: tuple[str, Path], tmp_path: Path
) -> None:
    module, mark = foreign
    policy = PolicyConfig(str(trunk), "base")
    loaded = load_policy(policy, Tape().step_rule)
    manifest = {
        "task": "any",
        "task_spec": {**task_spec(Tape()), "class_path": f"{module}.Mine"},
        "tokenizer": tokenizer_fingerprint(loaded.tokenizer),
        "policy": asdict(policy),
        "policy_fingerprint": loaded.fingerprint,
        "sampler": asdict(Sampler()),
    }
    with Store(tmp_path / "labels", manifest) as store:
        store.add(
            Trace("t", "p", "1+2", "3", "train", "base", 0, [17, 6, 2], [3], "3", True, False)
        )
        store.seal({})
    config = TrainConfig([str(tmp_path / "labels")], str(tmp_path / "new.ckpt"), trunk=str(trunk))
    with pytest.raises(UserError, match=f"labels .* names the task '{module}.Mine'.* add --task"):
        train(config)
    assert not mark.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"class_path": "pav.tasks.nowhere.Tape"},
        {"class_path": "pav.tasks.tape.parse"},
        {"class_path": "pav.tasks.tape.Task"},
        {"init_args": {"n_ops": 6, "of_a_later_version": 1}},
    ],
)
def test_unknown_built_in_task_is_an_error_that_says_so(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="that this version does not know"):
        resolve_task({**task_spec(Tape()), **settings}, None, "verifier 'pav.ckpt'")


def test_task_is_restored_with_its_settings() -> None:
    task = Tape(step_rule=replace(Tape().step_rule, max_tokens=9), n_ops=7)
    spec = json.loads(json.dumps(task_spec(task)))
    assert resolve_task(spec, None, "verifier 'pav.ckpt'") == task


class Bomb:
    """Creates a file when it is unpickled by anything that obeys ``__reduce__``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_bomb_is_refused_and_does_not_go_off(
    zipped: bool, checkpoint: Path, tmp_path: Path
) -> None:
    held = torch.load(checkpoint, weights_only=True)
    mark = tmp_path / "exploded"
    torch.save({**held, "callbacks": Bomb(mark)}, checkpoint, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="is not a verifier checkpoint") as error:
        load_verifier(str(checkpoint))
    assert "\n" not in str(error.value)
    assert not mark.exists()
    # The bomb is live: a loader that trusts the file sets it off.
    torch.load(checkpoint, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"heads: none\n"])
def test_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"notes.ckpt' is not a verifier checkpoint \(.+\); give"):
        load_verifier(str(path))


def test_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "epoch": 3}, path)
    with pytest.raises(UserError, match=r"other.ckpt' is not a verifier checkpoint .* pav.train"):
        load_verifier(str(path))


def test_missing_checkpoint_is_an_error_that_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no verifier checkpoint at .*gone.ckpt'; train one with"):
        load_verifier(str(tmp_path / "gone.ckpt"))
    with pytest.raises(UserError, match=r"no shipped verifier 'pav:gone'; there are "):
        load_verifier("pav:gone")


def test_moved_trunk_is_found_again_by_the_users_word(
    trunk: Path, make_verifier: Any, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(trunk, here)
    make_verifier(here, tmp_path / "pav.ckpt")
    here.rename(there)
    verifier = load_verifier(str(tmp_path / "pav.ckpt"))
    with pytest.raises(
        UserError, match=r"trunk of .*pav.ckpt' is not at .*here' any more.*--trunk"
    ):
        trunk_path(verifier)
    assert trunk_path(verifier, str(there)) == str(there)


def test_swapped_trunk_is_refused_by_its_digest(
    trunk: Path, make_verifier: Any, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    shutil.copytree(trunk, here)
    make_verifier(here, tmp_path / "pav.ckpt")
    other = load_trunk(str(here))
    with torch.no_grad():
        other.get_output_embeddings().weight[0, 0] += 1e-3
    other.save_pretrained(here)
    verifier = load_verifier(str(tmp_path / "pav.ckpt"))
    with pytest.raises(
        UserError, match=r"at .*here' is not the trunk that .* was trained on \(digest"
    ):
        trunk_path(verifier)
    assert trunk_path(verifier, str(trunk)) == str(trunk)


def test_policy_of_another_tokenizer_is_refused(checkpoint: Path, tiny_model: Any) -> None:
    other = PolicyConfig(str(tiny_model("llama", "chat")))
    with pytest.raises(
        UserError, match=r"has another tokenizer than verifier .*train a verifier for"
    ):
        open_session(load_verifier(str(checkpoint)), None, other, None, EngineConfig())


def test_frozen_checkpoint_is_small_and_holds_no_trunk_weights(
    trunk: Path, make_verifier: Any, tmp_path: Path
) -> None:
    sizes = {}
    for frozen in (True, False):
        path = tmp_path / f"{frozen}.ckpt"
        model = make_verifier(trunk, path, frozen=frozen)
        sizes[frozen] = path.stat().st_size
        held = torch.load(path, weights_only=True)["state_dict"]
        assert {k for k in held if "trunk" not in k} == {"model.head.weight", "model.head.bias"}
        state = load_verifier(str(path)).trunk_state
        if frozen:
            assert len(held) == 2
            assert state is None
        else:
            assert state is not None
            assert state.keys() == model.trunk.state_dict().keys()
    weights = (trunk / "model.safetensors").stat().st_size
    assert sizes[True] < 20_000 < weights < sizes[False]


def test_export_is_made_once_and_again_when_missing_or_stale(
    checkpoint: Path, trunk: Path, make_verifier: Any
) -> None:
    verifier = load_verifier(str(checkpoint))
    directory, score_ids = ensure_export(verifier, str(trunk))
    assert directory == checkpoint.with_suffix(".export")
    assert score_ids == [19, 20, 21]
    made = inode(directory)
    assert ensure_export(verifier, str(trunk)) == (directory, score_ids)
    assert inode(directory) == made
    # Another checkpoint under the same name.
    make_verifier(trunk, checkpoint, heads=("q/base", "q/prover", "orm"))
    changed = load_verifier(str(checkpoint))
    assert changed.digest != verifier.digest
    _, score_ids = ensure_export(changed, str(trunk))
    assert score_ids == [19, 20, 21, 22]
    assert json.loads((directory / "pav.json").read_text())["checkpoint"] == changed.digest
    # A directory that was never finished, then none at all.
    (directory / "pav.json").unlink()
    ensure_export(changed, str(trunk))
    shutil.rmtree(directory)
    ensure_export(changed, str(trunk))
    assert_serves(changed, trunk, directory)


def inode(directory: Path) -> int:
    return (directory / "model.safetensors").stat().st_ino


def test_export_of_a_checkpoint_that_cannot_be_written_beside_goes_to_the_cache(
    checkpoint: Path, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shipped = tmp_path / "assets" / "verifiers"
    shipped.mkdir(parents=True)
    shutil.copy(checkpoint, shipped)
    verifier = load_verifier(str(shipped / checkpoint.name))
    directory, _ = ensure_export(verifier, str(trunk))
    assert directory.is_relative_to(tmp_path / "cache")
    assert os.listdir(shipped) == [checkpoint.name]
    assert_serves(verifier, trunk, directory)


@pytest.mark.parametrize("architecture", ["llama", "qwen3-tied"])
def test_untouched_shards_of_a_large_trunk_are_linked_not_copied(
    architecture: str, tiny_model: Any, make_verifier: Any, tmp_path: Path
) -> None:
    source, checkpoint = tmp_path / "sharded", tmp_path / "pav.ckpt"
    shutil.copytree(tiny_model(architecture), source)
    (source / "model.safetensors").unlink()
    load_trunk(str(tiny_model(architecture))).save_pretrained(source, max_shard_size="50KB")
    shards = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    touched = {file for name, file in shards.items() if "embed_tokens" in name or "lm_head" in name}
    assert len(set(shards.values())) > 2 + len(touched)
    make_verifier(source, checkpoint)
    directory, _ = ensure_export(load_verifier(str(checkpoint)), str(source))
    for file in set(shards.values()):
        served = directory / file
        if file in touched:
            assert not served.is_symlink()
        else:
            assert served.is_symlink()
            assert served.resolve() == (source / file).resolve()
    assert_serves(load_verifier(str(checkpoint)), source, directory)


def test_trained_trunk_is_exported_with_its_own_weights(
    trunk: Path, make_verifier: Any, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "pav.ckpt"
    model = make_verifier(trunk, checkpoint, frozen=False)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter.mul_(1.1)
    save(load_verifier(str(checkpoint)).card, model, checkpoint)
    verifier = load_verifier(str(checkpoint))
    directory, _ = ensure_export(verifier, str(trunk))
    model.trunk.save_pretrained(tmp_path / "trained")
    assert_serves(verifier, tmp_path / "trained", directory)


@torch.inference_mode()
def assert_serves(verifier: Verifier, trunk: Path, directory: Path) -> None:
    """The exported model says what the trunk says, then what the heads say, then zero."""
    ids = torch.tensor([[1, 6, 10, 13, 11, 18, 4, 5]])
    model = HeadedTrunk(load_trunk(str(trunk)), len(verifier.card.heads))
    model.head.weight.data.copy_(verifier.weight)
    hidden = model.hidden(ids)
    exported = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
    own = model.trunk.get_output_embeddings()(hidden)
    count = own.shape[-1]
    torch.testing.assert_close(exported[..., :count], own)
    torch.testing.assert_close(
        exported[..., count:-1] * SCORE_SCALE, model.head_logits(hidden), atol=1e-4, rtol=1e-4
    )
    assert not exported[..., -1].any()
