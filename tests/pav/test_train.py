"""``pav.train`` end to end on hand-written labels: what moves, what is kept, what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pav.evaluate.report
import pav.train.command
from pav.core.errors import UserError
from pav.evaluate.report import first_half
from pav.labels.examples import balance, orm_examples, pav_examples
from pav.labels.tables import read_labels
from pav.policy.policy import PolicyConfig, load_policy
from pav.tasks.tape import Tape
from pav.train.batches import LabelData, class_weights
from pav.train.command import train
from pav.train.config import TrainConfig
from pav.train.fit import VerifierModule
from pav.verifier.calibrate import SURPRISE, fit_calibrator
from pav.verifier.checkpoint import Verifier, VerifierMeta, card_json, load_model, load_verifier
from pav.verifier.forward import score
from pav.verifier.trunk import HeadedTrunk, load_trunk
from tests.pav.label_runs import HEADS, TASK, write_labels


@pytest.fixture(scope="module")
def trunk(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def labels(trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labels(tmp_path_factory.mktemp("train") / "labels", trunk)


def trained(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[VerifierMeta, HeadedTrunk, Verifier]:
    """Card, the model as it was in memory when it was saved, and the checkpoint as loaded."""
    kept: list[HeadedTrunk] = []
    save = pav.train.command.save

    def keep_and_save(card: VerifierMeta, model: HeadedTrunk, output: Path, adapters: Any) -> None:
        kept.append(copy.deepcopy(model))
        save(card, model, output, adapters)

    monkeypatch.setattr(pav.train.command, "save", keep_and_save)
    card = train(config)
    assert card is not None
    return card, kept[0], load_verifier(config.output)


def adapted(names: set[str]) -> set[str]:
    """The weights that adapters change: all layers but the embeddings and norms."""
    return {n for n in names if n.endswith("_proj.weight")}


@pytest.mark.parametrize("recipe", ["pav", "orm"])
@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_what_is_trained_moves_and_comes_back_from_the_checkpoint(
    recipe: Any, mode: Any, labels: str, trunk: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lr, epochs = (None, 12) if mode == "frozen" else (5e-3, 4)
    config = TrainConfig(
        [labels], str(tmp_path / "pav.ckpt"), recipe, str(trunk), mode, lr=lr, head_lr=5e-3,
        max_epochs=epochs, accelerator="cpu",
    )  # fmt: skip
    card, model, verifier = trained(config, monkeypatch)

    # What must move moved; what must not did not.
    before = load_trunk(str(trunk)).state_dict()
    moved = {k for k, v in model.trunk.state_dict().items() if not torch.equal(v, before[k])}
    # No loss reaches the output rows of the trunk's own tokens.
    whole = before.keys() - {"lm_head.weight"}
    assert moved == {"frozen": set(), "lora": adapted(whole), "full": whole}[mode]
    assert (model.head.weight.norm(dim=1) > 0).all()
    assert (model.head.bias != 0).all()
    # Nor the input rows of tokens that no solution holds (padding).
    rows = model.trunk.get_input_embeddings().weight
    assert torch.equal(rows[0], before["model.embed_tokens.weight"][0])

    # The checkpoint says what the model in memory said, to the last bit.
    assert card_json(verifier.card) == card_json(card)
    assert (verifier.trunk_state is None) == (mode != "full")
    assert (verifier.adapters is None) == (mode != "lora")
    again = load_model(verifier, str(trunk))
    ids = torch.randint(1, 19, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(
            again.head_logits(again.hidden(ids)), model.head_logits(model.hidden(ids))
        )

    # It learned what was planted, and says so of problems that it was not fitted on.
    assert card.heads == (HEADS if recipe == "pav" else ["orm"])
    for head in card.heads:
        for kind in ("plain", "surprise"):
            told = card.validation[f"{head}/{kind}"]
            assert told["auc"] > 0.75
            assert told["brier"] < 0.85 * told["brier_constant"]
    assert json.loads((tmp_path / "pav.json").read_text()).keys() == card.validation.keys()
    assert (tmp_path / "pav.export" / "model.safetensors").exists()
    left = sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock"))
    assert left == ["pav.ckpt", "pav.export", "pav.json", "pav.png"]
    assert (card.base_head, card.prover_head) == (
        ("q/base", "q/prover") if recipe == "pav" else ("", "")
    )


def test_every_head_learns_the_policy_that_it_is_named_after(
    labels: str, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig([labels], str(tmp_path / "pav.ckpt"), trunk=str(trunk), max_epochs=12)
    card, model, _ = trained(config, monkeypatch)
    policy = load_policy(PolicyConfig(str(trunk)), TASK.step_rule)
    examples = pav_examples(read_labels([labels]), "validation", card.heads, policy, 64)
    q: dict[str, dict[bool, list[float]]] = {h: {True: [], False: []} for h in card.heads[:2]}
    for example in examples:
        hidden = model.hidden(torch.tensor([example.ids]))[0, example.positions_P]
        logits = model.head_logits(hidden).detach().numpy()
        # After a 5 or a 6 the prover finishes, the base does not; the last step is an outcome.
        for p in range(1, len(example.ends)):
            between = int(example.ids[example.positions_P[p]]) - 3 in (5, 6)
            for h, head in enumerate(card.heads[:2]):
                q[head][between].append(
                    float(card.calibrator(head, False)(logits[p : p + 1, h], None)[0])
                )
    assert np.mean(q["q/prover"][True]) - np.mean(q["q/base"][True]) > 0.3
    assert abs(np.mean(q["q/prover"][False]) - np.mean(q["q/base"][False])) < 0.2


def test_calibrators_of_a_frozen_trunk_are_fitted_on_training_labels_as_well(
    labels: str, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = TrainConfig([labels], str(tmp_path / "all.ckpt"), trunk=str(trunk), max_epochs=4)
    half = replace(every, output=str(tmp_path / "half.ckpt"), calibrate_on="validation")
    card, model, _ = trained(half, monkeypatch)
    more, same, _ = trained(every, monkeypatch)
    assert torch.equal(model.head.weight, same.head.weight)
    policy = load_policy(PolicyConfig(str(trunk)), TASK.step_rule)
    examples = [
        e
        for split in ("validation", "train")
        for e in pav_examples(read_labels([labels]), split, card.heads, policy, 64)
        if split == "train" or first_half(e.problem_id)
    ]
    scored = score(model, examples, policy, "scoring")
    for h, head in enumerate(card.heads):
        assert more.calibrators[head] != card.calibrators[head]
        rows = scored.n_NH[:, h] > 0
        wanted = fit_calibrator(
            scored.logits_NH[rows, h], None, scored.k_NH[rows, h], scored.n_NH[rows, h]
        )
        made = more.calibrator(head, False)
        assert (made.temperature, made.bias) == pytest.approx(
            (wanted.temperature, wanted.bias), rel=1e-3, abs=1e-3
        )
        # What is reported is of problems that neither was fitted on.
        told, before = (c.validation[f"{head}/plain"] for c in (more, card))
        assert told["brier"] != before["brier"]
        assert told["brier_constant"] == before["brier_constant"]
    monkeypatch.setattr(pav.evaluate.report, "MOST_CALIBRATING", 9)
    asked: list[int] = []
    inner = pav.evaluate.report.score
    monkeypatch.setattr(
        pav.evaluate.report,
        "score",
        lambda m, some, *a: (asked.append(len(some)), inner(m, some, *a))[1],
    )
    trained(replace(every, output=str(tmp_path / "few.ckpt")), monkeypatch)
    assert asked[1] == 9 < asked[0]
    with pytest.raises(UserError, match="calibrate_on is all, but trunk_mode is lora"):
        replace(every, calibrate_on="all", trunk_mode="lora")


def test_training_twice_gives_the_same_heads(
    labels: str, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for name in ("one", "two"):
        config = TrainConfig(
            [labels], str(tmp_path / f"{name}.ckpt"), trunk=str(trunk), max_epochs=2, seed=3
        )
        weights.append(trained(config, monkeypatch)[2].weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("loss", ["bce", "mse"])
@pytest.mark.parametrize("recipe", ["pav", "orm"])
def test_cached_features_of_a_frozen_trunk_give_the_loss_of_a_full_forward(
    recipe: str, loss: Any, labels: str, trunk: Path
) -> None:
    found = read_labels([labels])
    policy = load_policy(PolicyConfig(str(trunk)), TASK.step_rule)
    heads = HEADS if recipe == "pav" else ["orm"]
    sets = [
        pav_examples(found, split, heads, policy, 64)
        if recipe == "pav"
        else orm_examples(found, split, policy, 64)
        for split in ("train", "validation")
    ]
    model = HeadedTrunk(load_trunk(str(trunk)), len(heads))
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    config = TrainConfig([labels], loss=loss)
    weights = balance(sets[0])
    module = VerifierModule(model, weights, config)
    losses, gradients = [], []
    for frozen in (True, False):
        data = LabelData(model, *sets, policy, frozen, 0, weights, 8192)
        data.setup("fit")
        summed, total = torch.zeros(()), torch.zeros(())
        for batch in data.val_dataloader():
            logits = module.logits(batch)
            assert (batch.n_NH.sum(dim=-1) > 0).all()
            weight = class_weights(batch.k_NH, batch.n_NH, module.weight_2H, torch.where)
            summed, total = summed + module.summed(logits, batch, weight), total + weight.sum()
        module.zero_grad()
        (summed / total).backward()
        losses.append((summed / total).item())
        gradients.append(model.head.weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_both_classes_weigh_the_same(labels: str, trunk: Path) -> None:
    policy = load_policy(PolicyConfig(str(trunk)), TASK.step_rule)
    examples = pav_examples(read_labels([labels]), "train", HEADS, policy, 64)
    weights = balance(examples)
    k = np.concatenate([e.k_PH for e in examples])
    n = np.concatenate([e.n_PH for e in examples])
    for h in range(len(HEADS)):
        high = k[:, h] >= 0.5 * n[:, h]
        low_mass = weights[0, h] * n[~high, h].sum()
        high_mass = weights[1, h] * n[high, h].sum()
        assert low_mass == pytest.approx(high_mass, rel=1e-4)
        assert low_mass + high_mass == pytest.approx(n[:, h].sum(), rel=1e-4)


def test_prefix_that_stands_in_many_traces_counts_once(labels: str, trunk: Path) -> None:
    policy = load_policy(PolicyConfig(str(trunk)), TASK.step_rule)
    found = read_labels([labels])
    examples = pav_examples(found, "train", ["q/base"], policy, 64)
    problems = {e.problem_id for e in examples}
    # Every problem's step 0 is in all of its traces: two rollouts in all.
    for problem in problems:
        assert sum(e.n_PH[0, 0] for e in examples if e.problem_id == problem) == pytest.approx(2)
    labelled = sum(
        n for (key, name), (_, n) in found.counts.items()
        if name == "base" and any(c.prefix_key == key and c.problem_id in problems
                                  for c in found.completions)
    )  # fmt: skip
    outcomes = len(examples)
    assert sum(e.n_PH.sum() for e in examples) == pytest.approx(labelled + outcomes)


def refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(config)
    assert "\n" not in str(error.value)


def test_labels_of_another_task_setting_are_refused(
    labels: str, trunk: Path, tmp_path: Path
) -> None:
    config = TrainConfig([labels], str(tmp_path / "pav.ckpt"), trunk=str(trunk))
    refused(
        replace(config, task=Tape(n_ops=4)), r"another setting of the task .*give the same --task"
    )


def test_labels_of_two_settings_are_not_mixed(labels: str, trunk: Path, tmp_path: Path) -> None:
    other = write_labels(
        tmp_path / "other", trunk, train_problems=1, validation_problems=1, task=Tape(n_ops=4)
    )
    refused(TrainConfig([labels, other], str(tmp_path / "pav.ckpt"), trunk=str(trunk)),
            "disagree on task: .*train on runs of one setting")  # fmt: skip


def test_trunk_of_another_tokenizer_is_refused(
    labels: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = TrainConfig(
        [labels], str(tmp_path / "pav.ckpt"), trunk=str(tiny_model("llama", "chat"))
    )
    refused(
        config, "has another tokenizer than the labels' policy .*use a trunk of the same tokeniz"
    )


def test_labels_without_the_base_policy_are_refused(trunk: Path, tmp_path: Path) -> None:
    only = write_labels(
        tmp_path / "labels", trunk, train_problems=2, validation_problems=2, policies=["prover"]
    )
    refused(TrainConfig([only], str(tmp_path / "pav.ckpt"), trunk=str(trunk)),
            "have no rollouts under the base policy 'base'")  # fmt: skip


def test_output_that_exists_or_cannot_be_written_is_refused_before_training(
    labels: str, trunk: Path, tmp_path: Path
) -> None:
    (tmp_path / "pav.ckpt").write_text("precious")
    config = TrainConfig([labels], str(tmp_path / "pav.ckpt"), trunk=str(trunk))
    refused(config, "pav.ckpt' exists; choose another name or remove it")
    assert (tmp_path / "pav.ckpt").read_text() == "precious"
    under_a_file = str(tmp_path / "pav.ckpt" / "new.ckpt")
    refused(replace(config, output=under_a_file), r"output .*new.ckpt' cannot be written .*choose")
    with pytest.raises(UserError, match=r"output is 'pav'; give a file name ending in .ckpt"):
        TrainConfig([labels], "pav")


@pytest.mark.parametrize("missing", ["train", "validation"])
def test_labels_without_a_split_are_refused(missing: str, trunk: Path, tmp_path: Path) -> None:
    counts = {"train_problems": 3, "validation_problems": 3, f"{missing}_problems": 0}
    part = write_labels(tmp_path / "labels", trunk, **counts)  # type: ignore[arg-type]
    refused(TrainConfig([part], str(tmp_path / "pav.ckpt"), trunk=str(trunk)),
            "both are needed: raise problems or validation_problems")  # fmt: skip


@pytest.mark.parametrize("recipe", ["pav", "orm"])
@pytest.mark.parametrize("validation_problems", [1, 2])
def test_handful_of_validation_problems_is_enough_to_train(
    recipe: Any, validation_problems: int, trunk: Path, tmp_path: Path
) -> None:
    few = write_labels(
        tmp_path / "labels", trunk, train_problems=4, validation_problems=validation_problems,
        seeds=2,
    )  # fmt: skip
    config = TrainConfig([few], str(tmp_path / "pav.ckpt"), recipe, trunk=str(trunk), max_epochs=1)
    card = train(config)
    for head in card.heads:
        for with_surprise in (False, True):
            calibrator = card.calibrator(head, with_surprise)
            q = calibrator(np.zeros(3, np.float32), np.zeros((3, len(SURPRISE)), np.float32))
            assert np.isfinite(q).all()


@pytest.mark.parametrize("recipe", ["pav", "orm"])
def test_head_without_an_outcome_to_calibrate_on_is_reported_and_trains_the_rest(
    recipe: Any, trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The length cap cut every seed: prefixes have labels, no seed has an outcome.
    cut = write_labels(
        tmp_path / "labels", trunk, train_problems=8, validation_problems=8, truncated=True
    )
    config = TrainConfig([cut], str(tmp_path / "pav.ckpt"), recipe, trunk=str(trunk), max_epochs=3)
    card = train(config)
    assert "WARNING: no validation label for head orm" in capsys.readouterr().err
    assert np.isnan(card.validation["orm/plain"]["brier"])
    assert card.calibrator("orm", True)(np.zeros(1, np.float32), None) == 0.5
    if recipe == "pav":
        assert np.isfinite(card.validation["q/base/plain"]["brier"])
