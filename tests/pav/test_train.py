"""``pav.train`` end to end on hand-written labels: what moves, what is kept, what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

import pav.train
from data_gen.store import Store
from pav.calibrate import SURPRISE
from pav.data import LabelData, balance, orm_examples, pav_examples
from pav.errors import UserError
from pav.labels import Completion, Trace, prefix_key, read_labels
from pav.policy import PolicyConfig, Sampler, load_policy, tokenizer_fingerprint
from pav.tasks.base import Problem, Split, task_spec
from pav.tasks.tape import Tape, apply, parse
from pav.train import TrainConfig, VerifierModule, _bce, train
from pav.verifier import Card, HeadedTrunk, Verifier, card_json, load_trunk, load_verifier

TASK = Tape(n_ops=3)
SAMPLER = Sampler(max_length=64)
HEADS = ["q/base", "q/prover", "orm"]


def solution(rng: Random, question: str) -> str:
    """A solution, half of the time with one wrong result."""
    value, operations = parse(question)
    slip = rng.randrange(2 * len(operations))
    lines = []
    for i, (op, operand) in enumerate(operations):
        line = f"{value}{op}{operand}="
        value = (apply(value, op, operand) + (rng.randint(1, 9) if i == slip else 0)) % 100
        lines.append(f"{line}{value}")
    return "\n".join([*lines, f"A{value}"])


def promising(ids: Sequence[int], limit: int) -> bool:
    """A planted rule that any trunk can tell: the digit before the delimiter is below ``limit``."""
    return len(ids) < 2 or ids[-2] - 3 < limit


def write_labels(
    directory: Path, model: Path, *, train_problems: int = 60, validation_problems: int = 40,
    seeds: int = 4, policies: Sequence[str] = ("base", "prover"), task: Tape = TASK,
    truncated: bool = False,
) -> str:  # fmt: skip
    """A label run in which the base finishes right after digits below 5, the prover below 7."""
    policy = load_policy(PolicyConfig(str(model), "base"), task.step_rule)
    manifest = {
        "format": 1,
        "task": task.fingerprint,
        "task_spec": task_spec(task),
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "policy": asdict(policy.config),
        "policy_fingerprint": policy.fingerprint,
        "sampler": asdict(SAMPLER),
    }
    rng = Random(0)
    splits: list[tuple[Split, int]] = [
        ("train", train_problems),
        ("validation", validation_problems),
    ]
    with Store(directory, manifest) as store:
        for split, count in splits:
            for problem in islice(task.problems(split), count):
                for seed in range(seeds):
                    write_trace(store, policy, split, problem, seed, rng, policies, truncated)
        store.seal(dict.fromkeys(policies, "fingerprint"))
    return str(directory)


def write_trace(
    store: Store, policy: Any, split: Split, problem: Problem, seed: int, rng: Random,
    policies: Sequence[str], truncated: bool,
) -> None:  # fmt: skip
    text = solution(rng, problem.question)
    whole = [
        *policy.tokenizer.encode(text, add_special_tokens=False),
        policy.tokenizer.eos_token_id,
    ]
    ends = policy.stepper.step_ends(whole)
    ids = whole[: ends[-2] + 1] if truncated else whole
    store.add(
        Trace(f"{problem.id}/{seed}", problem.id, problem.question, problem.gold, split, "base",
              seed, ids, ends[:-1] if truncated else ends, text.rsplit("A")[-1],
              promising(whole, 5) and not truncated, truncated)
    )  # fmt: skip
    for end in (0, *ends[:-1]):
        prefix = whole[:end]
        key = prefix_key(problem.id, prefix)
        for name, limit in zip(policies, (5, 7), strict=False):
            for index in range(2):
                if (key, name, index) not in store.completions:
                    store.add(
                        Completion(key, problem.id, name, index, prefix, whole[end:], "1",
                                   promising(prefix, limit), False)
                    )  # fmt: skip


@pytest.fixture(scope="module")
def trunk(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def labels(trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labels(tmp_path_factory.mktemp("train") / "labels", trunk)


def trained(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[Card, HeadedTrunk, Verifier]:
    """Card, the model as it was in memory when it was saved, and the checkpoint as loaded."""
    kept: list[HeadedTrunk] = []
    save = pav.train.save

    def keep_and_save(card: Card, model: HeadedTrunk, output: Path) -> None:
        kept.append(copy.deepcopy(model))
        save(card, model, output)

    monkeypatch.setattr(pav.train, "save", keep_and_save)
    card = train(config)
    return card, kept[0], load_verifier(config.output)


@pytest.mark.parametrize("recipe", ["pav", "orm"])
@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_what_is_trained_moves_and_comes_back_from_the_checkpoint(
    recipe: Any, mode: Any, labels: str, trunk: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lr, epochs = (None, 12) if mode == "frozen" else (5e-3, 4)
    config = TrainConfig(
        [labels], str(tmp_path / "pav.ckpt"), recipe, str(trunk), mode, lr=lr, max_epochs=epochs,
        accelerator="cpu",
    )  # fmt: skip
    card, model, verifier = trained(config, monkeypatch)

    # What must move moved; what must not did not.
    before = load_trunk(str(trunk)).state_dict()
    moved = {k for k, v in model.trunk.state_dict().items() if not torch.equal(v, before[k])}
    # No loss reaches the output rows of the trunk's own tokens.
    assert moved == (set() if mode == "frozen" else before.keys() - {"lm_head.weight"})
    assert (model.head.weight.norm(dim=1) > 0).all()
    assert (model.head.bias != 0).all()
    # Nor the input rows of tokens that no solution holds (padding).
    rows = model.trunk.get_input_embeddings().weight
    assert torch.equal(rows[0], before["model.embed_tokens.weight"][0])

    # The checkpoint says what the model in memory said, to the last bit.
    assert card_json(verifier.card) == card_json(card)
    assert (verifier.trunk_state is None) == (mode == "frozen")
    again = HeadedTrunk(load_trunk(str(trunk)), len(card.heads))
    again.head.load_state_dict({"weight": verifier.weight, "bias": verifier.bias})
    if verifier.trunk_state is not None:
        again.trunk.load_state_dict(verifier.trunk_state)
    ids = torch.randint(1, 19, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(
            again.eval().head_logits(again.hidden(ids)), model.head_logits(model.hidden(ids))
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
    assert left == ["pav.ckpt", "pav.export", "pav.json"]
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


@pytest.mark.parametrize("recipe", ["pav", "orm"])
def test_cached_features_of_a_frozen_trunk_give_the_loss_of_a_full_forward(
    recipe: str, labels: str, trunk: Path
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
    module = VerifierModule(
        model, card_of(heads), torch.tensor(balance(sets[0])), lr=0.1, max_epochs=1
    )
    losses, gradients = [], []
    for frozen in (True, False):
        data = LabelData(model, *sets, policy, frozen, seed=0)
        data.setup("fit")
        outputs = [module._forward(batch) for batch in data.val_dataloader()]
        logits, k, n = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        assert (n.sum(dim=-1) > 0).all()
        model.head.zero_grad()
        loss = _bce(logits, k, n, n)
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.head.weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def card_of(heads: list[str]) -> Card:
    return Card(
        heads, "pav", "", "", True, {}, "float32", {}, "", {}, "", "", {}, "", "", 0.5, "last"
    )


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
