"""Damaged files are one line that names the file and the fix, with exit code 2."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_gen.config import RolloutsConfig
from data_gen.inspect.show import ShowConfig, show
from data_gen.inspect.status import StatusConfig, status
from data_gen.rollouts import rollouts
from pav.cli.run import run
from pav.core.errors import UserError
from pav.policy.policy import PolicyConfig, asset, load_policy
from pav.tasks.tape import Tape
from pav.train.command import TrainConfig, train
from pav.train.sft import sft
from pav.train.sft_config import SftConfig
from pav.verifier.calibrate import SURPRISE
from pav.verifier.checkpoint import Verifier, load_verifier
from pav.verifier.scoring import Scorer
from search.beam import BeamConfig, beam
from tests.pav.label_runs import write_labels

ROOT = Path(__file__).parents[1]
COMMANDS: dict[str, tuple[Any, type]] = {
    "data_gen.rollouts": (rollouts, RolloutsConfig),
    "data_gen.show": (show, ShowConfig),
    "data_gen.status": (status, StatusConfig),
    "pav.train": (train, TrainConfig),
    "pav.sft": (sft, SftConfig),
    "search.beam": (beam, BeamConfig),
}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; returns its one line."""

    def command(name: str, *arguments: str) -> str:
        function, config = COMMANDS[name]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(function, config, name, arguments)
        # A tiny label run has few problems, which is said before.
        *warnings, line = capsys.readouterr().err.splitlines()
        assert all("figures of so few say little" in warning for warning in warnings)
        assert stopped.value.code == 2
        return line.removeprefix(f"{name}: error: ")

    return command


# -- verifiers -------------------------------------------------------------------------------------


def nan_row(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["model.head.weight"][0, [1, 5, 7]] = torch.nan


def infinite_bias(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["model.head.bias"][2] = torch.inf


def narrow(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["state_dict"]
    state["model.head.weight"] = state["model.head.weight"][:, :64].clone()


def headless(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["state_dict"]
    state["model.head.weight"] = state["model.head.weight"][:2].clone()


def card(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    def damage(checkpoint: dict[str, Any]) -> None:
        plain = json.loads(checkpoint["verifier"])
        change(plain)
        checkpoint["verifier"] = json.dumps(plain)

    return damage


def deep(checkpoint: dict[str, Any]) -> None:
    checkpoint["verifier"] = "[" * 20_000


VERIFIERS = {
    "nan row": (nan_row, "damaged: head q/base: weight holds 3 NaN in row 0 (of 128 numbers);"),
    "infinite bias": (
        infinite_bias,
        "damaged: head orm: bias holds 1 NaN or infinite numbers in row 2 (of 1 numbers);",
    ),
    "nan calibrator": (
        card(lambda c: c["surprise_calibrators"]["q/prover"].update(bias=float("nan"))),
        "damaged: head q/prover: surprise calibrator has a bias that is no finite number;",
    ),
    "short calibrator": (
        card(lambda c: c["surprise_calibrators"]["orm"]["mean"].pop()),
        "damaged: head orm: surprise calibrator has mean of shape (6,), not (7,);",
    ),
    "no calibrator": (
        card(lambda c: c["surprise_calibrators"].pop("orm")),
        "damaged: head orm has no surprise calibrator;",
    ),
    "narrow": (narrow, "its head rows hold 64 numbers, and the trunk at 'pav:base' has hidden "),
    "headless": (headless, "is not a verifier checkpoint (3 heads in 2 rows);"),
    "deep card": (deep, "is not a verifier checkpoint (maximum recursion depth exceeded"),
    "mlp": (
        card(lambda c: c.update(head="mlp")),
        "has head 'mlp', this version reads linear heads;",
    ),
    "no card": (lambda c: c.pop("verifier"), "is not a verifier checkpoint ("),
}


@pytest.fixture(scope="module")
def quick_beam() -> list[str]:
    return ["--n", "1", "--problems", "1", "--engine.kv_gib", "0.02"]


@pytest.mark.parametrize("kind", VERIFIERS)
def test_damaged_verifier_is_refused_by_head_before_an_engine_starts(
    kind: str, tmp_path: Path, refused: Callable[..., str], quick_beam: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    damage, said = VERIFIERS[kind]
    checkpoint = torch.load(asset("verifiers/reference_fused.ckpt"), weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, tmp_path / "pav.ckpt")
    monkeypatch.setattr(
        "search.run.session.VllmEngine", lambda *_: pytest.fail("an engine was started")
    )
    where = ["--verifier", str(tmp_path / "pav.ckpt"), "--output", str(tmp_path / "run")]
    assert said in refused("search.beam", *where, *quick_beam)


def test_truncated_verifier_and_one_with_a_flipped_bit_are_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    whole = asset("verifiers/reference.ckpt").read_bytes()
    path = tmp_path / "pav.ckpt"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "pav.ckpt' is not a verifier checkpoint (" in refused(
            "search.beam", "--verifier", str(path)
        )
    weights = whole.index(load_verifier("pav:reference").weight.numpy().tobytes()[:64])
    path.write_bytes(whole[:weights] + bytes([whole[weights] ^ 1]) + whole[weights + 1 :])
    said = refused("search.beam", "--verifier", str(path))
    assert "pav.ckpt' is damaged (the checksum of " in said


def test_numbers_of_a_trained_trunk_are_looked_at_too(
    tmp_path: Path, make_verifier: Any, tiny_model: Callable[..., Path]
) -> None:
    make_verifier(tiny_model("llama"), tmp_path / "pav.ckpt", frozen=False)
    checkpoint = torch.load(tmp_path / "pav.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.trunk.model.norm.weight"][3] = torch.nan
    torch.save(checkpoint, tmp_path / "pav.ckpt")
    with pytest.raises(UserError, match=r"trunk.model.norm.weight holds 1 NaN in row 3 "):
        load_verifier(str(tmp_path / "pav.ckpt"))


def test_score_that_is_not_finite_is_named_by_its_head() -> None:
    """As a damaged trunk gives it: the verifier itself is whole."""
    verifier = load_verifier("pav:reference_fused")
    policy = load_policy(verifier.card.policy_config(), Tape().step_rule)
    scorer = Scorer(verifier, None, True, True, policy)  # type: ignore[arg-type]
    none = np.zeros(0, np.float32)
    assert set(scorer.values(np.zeros(3), none, [], [])) == {"q/base", "q/prover", "orm"}
    for wrong in (np.nan, np.inf):
        with pytest.raises(UserError) as refused:
            scorer.values(np.array([0.0, wrong, 0.0]), none, [], [])
        assert str(refused.value).startswith(f"head q/prover gives {wrong} and Q ")
    # Surprise of which nothing is known.
    logprobs = np.full(4, np.nan, np.float32)
    with pytest.raises(UserError, match=r"head q/base gives 0\.0 and Q nan after 4 tokens"):
        scorer.values(-verifier.bias.numpy(), logprobs, [4, 18, 17, 4], [4])


def test_undefined_metrics_of_a_card_are_json_and_come_back_undefined() -> None:
    from pav.verifier.checkpoint import card_json

    known: Verifier = load_verifier("pav:reference")
    undefined = replace(known.card, validation={"auc": float("nan"), "steps": [0.5, float("nan")]})
    plain = json.loads(card_json(undefined), parse_constant=pytest.fail)
    assert plain["validation"] == {"auc": None, "steps": [0.5, None]}
    assert len(SURPRISE) + 1 == len(plain["surprise_calibrators"]["orm"]["mean"])


# -- labels ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("damaged") / "labels"
    write_labels(directory, tiny_model("llama"), train_problems=3, validation_problems=3, seeds=1)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest |= {"rollout_policies": {"base": "fingerprint", "prover": "fingerprint"}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


def without(key: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        plain = json.loads((directory / "manifest.json").read_text())
        del plain[key]
        (directory / "manifest.json").write_text(json.dumps(plain))

    return damage


def truncated(name: str, share: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        os.truncate(directory / name, int((directory / name).stat().st_size * share))

    return damage


def column(name: str, change: Callable[[list[Any]], list[Any]] | None) -> Callable[[Path], None]:
    """A column of the solutions changed, or left out."""

    def damage(directory: Path) -> None:
        path = directory / "traces" / "part-00000.parquet"
        table = pq.read_table(path)
        index = table.schema.get_field_index(name)
        if change is None:
            changed = table.drop_columns(name)
        else:
            values = pa.array(change(table[name].to_pylist()), table.schema.field(index).type)
            changed = table.set_column(index, table.schema.field(index), values)
        pq.write_table(changed, path)

    return damage


TRACES, COMPLETIONS = "traces/part-00000.parquet", "completions/part-00000.parquet"
LABELS = {
    "list": (written("manifest.json", b"[]"), "manifest.json' cannot be read: it holds a list"),
    "not UTF-8": (
        written("manifest.json", b'{"a": "\xff"}'),
        "cannot be read: it is not UTF-8 (invalid start byte at byte 7)",
    ),
    "deep": (written("manifest.json", b"[" * 20_000), "it is nested too deeply"),
    "torn": (truncated("manifest.json", 0.5), "manifest.json' cannot be read: "),
    "no task": (without("task"), "is no manifest of labels: it lacks 'task'"),
    "no policy": (without("policy"), "is no manifest of labels: it lacks 'policy'"),
    "empty traces": (truncated(TRACES, 0), f"{TRACES}' is damaged ("),
    "half traces": (truncated(TRACES, 0.5), f"{TRACES}' is damaged ("),
    "half completions": (truncated(COMPLETIONS, 0.5), f"{COMPLETIONS}' is damaged ("),
    "no column": (column("step_ends", None), f"{TRACES}' is damaged ("),
    "null": (
        column("question", lambda v: [None, *v[1:]]),
        f"{TRACES}' is damaged: question has no value in 1 rows",
    ),
    "beyond": (
        column("ids", lambda v: [[*v[0][:-1], 99_999], *v[1:]]),
        "hold the token 99999 in solution ",
    ),
    "negative": (column("ids", lambda v: [[-1, *v[0][1:]], *v[1:]]), "hold the token -1 in "),
    "steps": (
        column("step_ends", lambda v: [[5, 3], *v[1:]]),
        "tokens, at [5, 3]; they are damaged: restore them",
    ),
}


@pytest.mark.parametrize("kind", LABELS)
def test_damaged_labels_are_refused_by_training_and_by_the_tools(
    kind: str, labels: Path, tiny_model: Callable[..., Path], tmp_path: Path,
    refused: Callable[..., str],
) -> None:  # fmt: skip
    damage, said = LABELS[kind]
    copied = tmp_path / "labels"
    shutil.copytree(labels, copied)
    damage(copied)
    trunk = ["--trunk", str(tiny_model("llama")), "--output", str(tmp_path / "pav.ckpt")]
    assert said in refused("pav.train", "--labels", f"[{copied}]", *trunk)
    assert said in refused("data_gen.show", "--labels", str(copied))
    assert [p.name for p in tmp_path.iterdir()] == ["labels"]


@pytest.mark.parametrize("tool", ["data_gen.show", "data_gen.status"])
def test_labels_that_do_not_say_who_made_the_rollouts_are_refused_by_the_tools(
    tool: str, labels: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    copied = tmp_path / "labels"
    shutil.copytree(labels, copied)
    without("rollout_policies")(copied)
    given = f"[{copied}]" if tool == "data_gen.status" else str(copied)
    said = refused(tool, "--labels", given)
    assert "is no manifest of labels: it lacks 'rollout_policies'" in said


# -- models ----------------------------------------------------------------------------------------


def test_model_with_pickled_weights_alone_is_never_read(
    labels: Path, tiny_model: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    out = ["--output", str(tmp_path / "pav.ckpt")]
    for said in (
        refused("pav.train", "--labels", f"[{labels}]", "--trunk", str(model), *out),
        refused("data_gen.rollouts", "--policy", str(model), "--output", str(tmp_path / "run"),
                "--task", "Tape"),
    ):  # fmt: skip
        assert said.startswith(f"the model at {str(model)!r} holds pickled weights alone (pytorch_")
        assert "save it as safetensors" in said


def test_trunk_with_truncated_weights_is_one_line(
    labels: Path, tiny_model: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    truncated("model.safetensors", 0.5)(model)
    said = refused("pav.train", "--labels", f"[{labels}]", "--trunk", str(model),
                   "--output", str(tmp_path / "pav.ckpt"))  # fmt: skip
    assert said.startswith(f"cannot load the trunk {str(model)!r}: ")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_damaged_settings_of_a_model_are_one_line(
    name: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    for content in (b"", b"[]", b'{"a": "\xff"}', b"[" * 20_000):
        (model / name).write_bytes(content)
        with pytest.raises(UserError, match=f"cannot load a (config|tokenizer) from '{model}': "):
            load_policy(PolicyConfig(str(model)), Tape().step_rule)


def test_training_that_diverged_is_one_line(
    labels: Path, tiny_model: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    said = refused("pav.train", "--labels", f"[{labels}]", "--trunk", str(tiny_model("llama")),
                   "--output", str(tmp_path / "pav.ckpt"), "--lr", "1e30", "--trunk_mode", "full",
                   "--tokens_per_batch", "40", "--accelerator", "cpu")  # fmt: skip
    assert said.startswith("training diverged: ") and " holds " in said
    assert f"lower lr (now 1e+30), and remove {str(tmp_path / 'pav.training')!r}" in said


# -- what the engine writes itself -----------------------------------------------------------------


def test_damaged_note_of_an_unfinished_policy_is_one_line(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    output = tmp_path / "policy"
    output.mkdir()
    torch.save({"global_step": 2}, output / "last.ckpt")
    (output / "sft.json").write_bytes(b"[]")
    said = refused("pav.sft", "--output", str(output), "--steps", "1")
    assert said.startswith(f"{str(output / 'sft.json')!r} cannot be read: it holds a list")


# They print settings as a command line takes them.
PRINTED = ("pav/policy/opening.py", "pav/cli/refusals.py", "pav/train/sft.py")


def test_all_json_that_is_written_is_json() -> None:
    """NaN is none: every writer refuses it (keys and fingerprints, sorted, are never read)."""
    found = []
    for folder in ("pav", "data_gen", "search", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if node.func.attr not in ("dumps", "dump", "JSONEncoder"):
                    continue
                if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "json"):
                    continue
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if given.get("allow_nan") != "False" and given.get("sort_keys") != "True":
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert [place for place in found if not place.startswith(PRINTED)] == []
