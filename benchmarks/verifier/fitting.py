"""A row of the study becomes values of Q: the product's training and calibration, on cached states.

Axes: N scored positions, H heads, F surprise features, S seeds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import PreTrainedModel

from benchmarks.verifier.consistency import ConsistentModule, sampled_steps
from benchmarks.verifier.heads import MLP_RATE, BetaBinomialModule, Loss, widen
from benchmarks.verifier.pool import subset, truncated
from benchmarks.verifier.rows import DEFAULT, Row
from benchmarks.verifier.setting import HEADS, Study
from pav.evaluate.report import first_half
from pav.evaluate.scored_labels import MODES
from pav.labels.examples import Example
from pav.policy.policy import Policy, model_path
from pav.train.command import new_card, save, trained_model
from pav.train.config import TrainConfig
from pav.train.fit import VerifierModule, fit, label_data
from pav.verifier.calibrate import SURPRISE, Calibrator, fit_calibrator
from pav.verifier.forward import score
from pav.verifier.trunk import HeadedTrunk

# Of trained trunks: a model of a million parameters learns at higher rates than a real one.
TRAINED = {"lora": 2e-3, "full": 5e-4}
EPOCHS = 6
PATIENCE = 2


@dataclass(frozen=True)
class Fitted:
    """A trained verifier, and what it says of every judged set, by name.

    Attributes:
        model: trunk and heads.
        adapters: of the trunk, or None.
        logits: (N, H) of the heads.
        surprise: (N, F) of the trunk.
        own: logits and surprise of its training solutions.
    """

    model: HeadedTrunk
    adapters: dict[str, Tensor] | None
    logits: dict[str, np.ndarray]
    surprise: dict[str, np.ndarray]
    own: tuple[np.ndarray, np.ndarray] | None = None


def fit_frozen(study: Study, row: Row, seed: int) -> Fitted:
    """Heads on a frozen trunk."""
    train, early = study.training(row), study.early(row)
    with tempfile.TemporaryDirectory() as directory:
        config = TrainConfig(
            [], f"{directory}/pav.ckpt", trunk=row.trunk, seed=seed,
            loss="bce" if row.loss == "beta_binomial" else row.loss,
            lr=MLP_RATE if row.head == "mlp" else None,
            accelerator="cpu", checkpoint_minutes=1e6,
        )  # fmt: skip
        # States before the seed: the first row to read them loads a trunk, which draws numbers.
        states = study.states(row, train)
        L.seed_everything(seed, verbose=False)
        model = truncated(row.trunk, None, len(HEADS), row.head)
        widen(model, states.shape[1])
        data = label_data(config, model, train, early, study.policy)
        data.cached = {
            "train": dataset(states, train, row.loss),
            "validation": dataset(study.states(row, early), early, row.loss),
        }
        module: Any = BetaBinomialModule if row.loss == "beta_binomial" else VerifierModule
        if row.consistency:
            steps = sampled_steps(subset(study.pool, row.part)[0], train, HEADS)
            module = partial(
                ConsistentModule, hidden_ND=states, steps=steps, weight=row.consistency
            )
        state = fit(config, model, data, Path(directory) / "run", module)
    if state is None:
        raise RuntimeError("nothing was trained")
    model.load_state_dict(state, strict=False)
    with torch.inference_mode():
        logits = {
            name: model.head_logits(study.states(row, j.examples)).numpy()
            for name, j in study.judged.items()
        }
        own = model.head_logits(states).numpy(), study.surprise(row, train)
    surprise = {name: study.surprise(row, j.examples) for name, j in study.judged.items()}
    return Fitted(model, None, logits, surprise, own)


def trained_heads(
    settings: TrainConfig,
    trunk: PreTrainedModel,
    training: Sequence[Example],
    early: Sequence[Example],
    policy: Policy,
    seed: int,
) -> HeadedTrunk:
    """Heads on a frozen trunk, stopped by ``early``, as ``pav.train`` fits them."""
    L.seed_everything(seed, verbose=False)
    model = HeadedTrunk(trunk, len(HEADS))
    with tempfile.TemporaryDirectory() as working:
        data = label_data(settings, model, [*training], [*early], policy)
        state = fit(settings, model, data, Path(working))
    if state is None:
        raise RuntimeError("nothing was trained")
    model.load_state_dict(state, strict=False)
    return model


def dataset(states_ND: Tensor, examples: Sequence[Example], loss: Loss = "bce") -> TensorDataset:
    """Labelled rows of ``examples`` for :func:`pav.train.fit.fit`, states computed already."""
    k, n = (np.concatenate([getattr(e, name) for e in examples]) for name in ("k_PH", "n_PH"))
    if loss == "beta_binomial":
        share_N1 = np.concatenate([e.share_P1 for e in examples])
        states_ND = torch.cat([states_ND, torch.tensor(share_N1)], dim=1)
    keep = n.sum(1) > 0
    rows = torch.as_tensor(keep)
    return TensorDataset(states_ND[rows], *(torch.tensor(a[keep]) for a in (k, n)))


def fit_trunk(study: Study, row: Row) -> Fitted:
    """Heads and trunk."""
    labels, _ = subset(study.pool, row.part)
    config = TrainConfig(
        ["pool"], "pav.ckpt", trunk=row.trunk, trunk_mode=row.mode, lr=TRAINED[row.mode],
        head_lr=1e-3, max_epochs=EPOCHS, patience=PATIENCE, warmup=20, tokens_per_batch=2048,
        accelerator="cpu", checkpoint_minutes=1e6,
    )  # fmt: skip
    L.seed_everything(0, verbose=False)
    model = truncated(row.trunk, None, len(HEADS))
    with tempfile.TemporaryDirectory() as directory:
        data = label_data(config, model, study.training(row), study.early(row), study.policy)
        state = fit(config, model, data, Path(directory))
    if state is None:
        raise RuntimeError("nothing was trained")
    card = new_card(config, labels, study.task)
    model, adapters = trained_model(card, model_path(row.trunk), state, torch.float32)
    logits, surprise = {}, {}
    for name, judged in study.judged.items():
        scored = score(model, judged.examples, study.policy, "scoring")
        order = np.lexsort((scored.step_N, scored.example_N))
        logits[name], surprise[name] = scored.logits_NH[order], scored.surprise_NF[order]
    return Fitted(model, adapters, logits, surprise)


def calibrated(
    study: Study, row: Row, fitted: Fitted, head: int, mode: str, seed: int
) -> Calibrator:
    """Calibrator of a head, by default on the first half of the validation problems."""
    columns = [SURPRISE.index(f) for f in row.features]
    judged = study.judged["validation"]
    half = np.array([first_half(e.problem_id) for e in judged.examples])
    logit, features = fitted.logits["validation"][:, head], fitted.surprise["validation"]
    k, n = judged.scored.k_NH[:, head], judged.scored.n_NH[:, head]
    rows = np.flatnonzero(half[judged.scored.example_N] & (n > 0))
    if mode == "surprise" and row.fit_rows is not None:
        size = min(row.fit_rows, len(rows))
        rows = np.random.default_rng(seed).choice(rows, size, replace=False)
    if mode == "surprise" and row.fit_on == "train" and fitted.own is not None:
        examples = study.training(row)
        k, n = (
            np.concatenate([getattr(e, a)[:, head] for e in examples]) for a in ("k_PH", "n_PH")
        )
        logit, features = fitted.own[0][:, head], fitted.own[1]
        rows = np.flatnonzero(n > 0)
    x = features[rows][:, columns] if mode == "surprise" else None
    return fit_calibrator(logit[rows], x, k[rows], n[rows])


def values_of(study: Study, row: Row, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Q of every judged set, (S, H, modes, N) by its name; ``seconds`` and ``tokens`` beside it.

    The first seed's verifier is kept as a checkpoint where vLLM could serve it.
    """
    start = time.process_time()
    frozen = row.mode == "frozen"
    columns = [SURPRISE.index(f) for f in row.features]
    found: dict[str, list[np.ndarray]] = {name: [] for name in study.judged}
    for seed in seeds if frozen else [0]:
        fitted = fit_frozen(study, row, seed) if frozen else fit_trunk(study, row)
        made = {
            (h, mode): calibrated(study, row, fitted, h, mode, seed)
            for h in range(len(HEADS))
            for mode in MODES
        }
        for name in study.judged:
            logits, x = fitted.logits[name], fitted.surprise[name][:, columns]
            q = [
                [made[h, mode](logits[:, h], x if mode == "surprise" else None) for mode in MODES]
                for h in range(len(HEADS))
            ]
            found[name].append(np.array(q, dtype=np.float32))
        if not seed and (not frozen or row == DEFAULT):
            _keep(study, row, fitted, made)
    out = {name: np.stack(arrays) for name, arrays in found.items()}
    out["seconds"] = np.array((time.process_time() - start) / len(out["validation"]))
    out["tokens"] = np.array(subset(study.pool, row.part)[1])
    return out


def _keep(study: Study, row: Row, fitted: Fitted, made: dict[tuple[int, str], Calibrator]) -> None:
    labels, _ = subset(study.pool, row.part)
    config = TrainConfig(["pool"], "pav.ckpt", trunk=row.trunk, trunk_mode=row.mode)
    plain, surprised = (
        {head: asdict(made[h, mode]) for h, head in enumerate(HEADS)} for mode in MODES
    )
    card = replace(
        new_card(config, labels, study.task), calibrators=plain, surprise_calibrators=surprised,
        pick="orm",
    )  # fmt: skip
    save(card, fitted.model, study.directory / f"{row.key}.ckpt", fitted.adapters)
