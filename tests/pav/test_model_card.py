"""Every export carries a card that a model hub accepts, with the figures that were measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import AutoModelForTokenClassification, AutoTokenizer

from pav.core.errors import UserError
from pav.engine.vllm import SCORE_BIAS
from pav.export.card import PLOT, model_card
from pav.export.prm import ExportPrmConfig, export_prm
from pav.export.vllm import ensure_export
from pav.train.command import save
from pav.verifier.checkpoint import load_model, load_verifier
from pav.verifier.trunk import HeadedTrunk

FIGURES = {
    "q/base/plain": {"rows": 90, "auc": 0.71, "spearman": 0.4, "brier": 0.2,
                     "brier_constant": 0.22, "calibration_error": 0.03,
                     "bins": {"n": [50.0, 40.0], "q": [0.2, 0.7], "right": [0.25, 0.75]},
                     "steps": {"step": [], "auc": [], "calibration_error": []}},
    "q/base/surprise": {"rows": 90, "auc": 0.83, "spearman": 0.5, "brier": 0.11,
                        "brier_constant": 0.22, "calibration_error": 0.02,
                        "bins": {"n": [60.0, 30.0], "q": [0.1, 0.8], "right": [0.12, 0.79]},
                        "steps": {"step": [1, 2], "auc": [0.7, 0.9],
                                  "calibration_error": [0.1, 0.05]}},
    "q/base/ceiling": {"rows": 90, "auc": 0.91, "spearman": 0.6, "brier": float("nan"),
                       "brier_constant": 0.22, "calibration_error": 0.01},
    "advantage": {"q/base/surprise": {"rows": 70, "sign": 0.66, "correlation": 0.31}},
    "data": {"problems": {"train": 900, "validation": 50}, "solutions": {"base": 4000},
             "rollouts": 17000, "prefixes": {"base": {"1": 16000, "2": 500}}},
}  # fmt: skip


@pytest.fixture
def checkpoint(tiny_model: Callable[..., Path], make_verifier: Any, tmp_path: Path) -> Path:
    path = tmp_path / "pav.ckpt"
    trunk = tiny_model("llama")
    model = make_verifier(trunk, path)
    card = load_verifier(str(path)).card
    calibrators = {h: {**c, "temperature": 1.5, "bias": -0.25} for h, c in card.calibrators.items()}
    save(replace(card, validation=FIGURES, calibrators=calibrators), model, path)
    return path


def check_metadata(directory: Path) -> ModelCard:
    """What the hub asks of a README.md, as far as it can be checked without it."""
    text = (directory / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert {"library_name", "pipeline_tag", "tags"} <= front.keys()
    assert all(isinstance(tag, str) and " " not in tag for tag in front["tags"])
    assert front["pipeline_tag"] in ("text-generation", "token-classification")
    # What the hub refuses: a base model that is no hub id.
    assert "/" in front.get("base_model", "/")
    card = ModelCard.load(directory / "README.md")
    assert card.data.to_dict().keys() <= {
        "library_name", "pipeline_tag", "tags", "base_model", "model-index"
    }  # fmt: skip
    if "model-index" in front:
        _, results = model_index_to_eval_results(front["model-index"])
        assert len({(r.dataset_config, r.metric_type) for r in results}) == len(results)
    return card


def test_export_carries_a_card_with_figures_data_and_how_to_serve_it(checkpoint: Path) -> None:
    verifier = load_verifier(str(checkpoint))
    directory, score_ids = ensure_export(verifier, verifier.card.trunk)
    card = check_metadata(directory)
    assert card.data.pipeline_tag == "text-generation"
    results = {(r.dataset_config, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert results == {
        ("q/base", "AUC"): 0.83, ("q/base", "Spearman"): 0.5, ("q/base", "Brier"): 0.11,
        ("q/base", "ECE"): 0.02,
    }  # fmt: skip
    text = card.text
    # Stock vLLM must not sample score tokens: the export's own words stay.
    bias = json.dumps({str(i): SCORE_BIAS for i in score_ids})
    assert f"logit_bias={bias}" in text
    for said in (
        "| q/base/surprise | 90 | 0.830 | 0.500 | 0.110 | 0.220 | 0.020 | 0.660 | 0.310 |",
        "| `q/base` | 1.5 | -0.25 |",
        "problems 900 train, 50 validation; solutions 4000 by base; Monte-Carlo rollouts 17000",
        "16000 with n = 1, 500 with n = 2",
        f"({PLOT})",
    ):
        assert said in text, said
    # A ceiling that is not known is not in the table.
    assert "q/base/ceiling" not in text
    assert (directory / PLOT).read_bytes().startswith(b"\x89PNG")
    # Nothing of this machine.
    assert str(checkpoint.parent) not in (directory / "README.md").read_text()


def test_card_of_a_verifier_without_figures_is_valid_and_claims_none(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path: Path
) -> None:
    make_verifier(tiny_model("llama"), tmp_path / "pav.ckpt")
    verifier = load_verifier(str(tmp_path / "pav.ckpt"))
    directory, _ = ensure_export(verifier, verifier.card.trunk)
    card = check_metadata(directory)
    assert card.data.eval_results is None
    assert "Validation" not in card.text
    assert not (directory / PLOT).exists()


@pytest.mark.parametrize("name", ["pav:reference", "pav:reference_orm", "pav:reference_fused"])
def test_shipped_verifiers_have_cards(name: str, tmp_path: Path) -> None:
    card = load_verifier(name).card
    (tmp_path / "README.md").write_text(model_card(card, "Use it.", "text-generation", False))
    found = check_metadata(tmp_path)
    assert found.data.eval_results
    heads = [r.dataset_config for r in found.data.eval_results]
    assert set(heads) == set(card.heads)


def test_trunk_of_the_hub_is_named_as_base_model(checkpoint: Path, tmp_path: Path) -> None:
    card = replace(load_verifier(str(checkpoint)).card, trunk="owner/model-7b")
    (tmp_path / "README.md").write_text(model_card(card, "", "text-generation", False))
    assert check_metadata(tmp_path).data.base_model == "owner/model-7b"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3-tied"])
@pytest.mark.parametrize("head", [None, "orm"])
@torch.inference_mode()
def test_softmax_of_the_token_classification_model_is_the_calibrated_q(
    architecture: str, head: str | None, tiny_model: Any, make_verifier: Any, tmp_path: Path
) -> None:
    trunk = tiny_model(architecture)
    model: HeadedTrunk = make_verifier(trunk, tmp_path / "pav.ckpt")
    card = load_verifier(str(tmp_path / "pav.ckpt")).card
    calibrators = {h: {**c, "temperature": 0.7, "bias": 0.3} for h, c in card.calibrators.items()}
    save(replace(card, calibrators=calibrators), model, tmp_path / "pav.ckpt")
    export_prm(ExportPrmConfig(str(tmp_path / "pav.ckpt"), str(tmp_path / "prm"), head))
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "prm", dtype=torch.float32)
    assert theirs.config.id2label == {0: "wrong", 1: "right"}
    ids = torch.randint(3, 19, (2, 30), generator=torch.Generator().manual_seed(0))
    q = theirs.eval()(ids).logits.softmax(-1)[..., 1].numpy()
    row = card.heads.index(head or "q/base")
    logits = model.head_logits(model.hidden(ids))[..., row].numpy()
    np.testing.assert_allclose(q, 1 / (1 + np.exp(-(0.7 * logits + 0.3))), atol=1e-5)
    assert q.std() > 0.05
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prm")
    assert tokenizer.encode("12", add_special_tokens=False) == [4, 5]
    prm_card = check_metadata(tmp_path / "prm")
    assert prm_card.data.pipeline_tag == "token-classification"
    # Its softmax is Q already: no second calibration.
    assert "| temperature |" not in prm_card.text
    assert json.loads((tmp_path / "prm" / "pav.json").read_text())["head"] == (head or "q/base")


def test_trained_trunk_goes_into_the_token_classification_model(
    tiny_model: Any, make_verifier: Any, tmp_path: Path
) -> None:
    path = tmp_path / "pav.ckpt"
    model = make_verifier(tiny_model("llama"), path, frozen=False)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter.mul_(1.1)
    save(load_verifier(str(path)).card, model, path)
    export_prm(ExportPrmConfig(str(path), str(tmp_path / "prm")))
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "prm")
    ours = load_model(load_verifier(str(path)), str(tiny_model("llama")))
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        logit = ours.head_logits(ours.hidden(ids))[..., 0]
        torch.testing.assert_close(theirs.eval()(ids).logits[..., 1], logit, atol=1e-5, rtol=1e-5)


def test_stock_vllm_pools_the_token_classification_model(
    tiny_model: Any, make_verifier: Any, tmp_path: Path
) -> None:
    make_verifier(tiny_model("llama"), tmp_path / "pav.ckpt")
    export_prm(ExportPrmConfig(str(tmp_path / "pav.ckpt"), str(tmp_path / "prm")))
    from vllm import LLM

    ids = [1, *range(3, 19)]
    llm = LLM(
        str(tmp_path / "prm"), runner="pooling", dtype="float32", max_model_len=64,
        max_num_batched_tokens=64, max_num_seqs=1, kv_cache_memory_bytes=1 << 26, block_size=32,
        gpu_memory_utilization=0.05, enforce_eager=True, disable_log_stats=True,
        skip_tokenizer_init=True, use_tqdm_on_load=False, enable_chunked_prefill=False,
    )  # fmt: skip
    try:
        pooled = llm.encode({"prompt_token_ids": ids}, pooling_task="token_classify")
        found = pooled[0].outputs.data
    finally:
        llm.llm_engine.engine_core.shutdown()
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "prm").eval()
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0].softmax(-1)
    assert found.shape == (len(ids), 2)
    torch.testing.assert_close(found.float(), wanted, atol=1e-4, rtol=1e-3)


def test_what_the_layout_cannot_hold_is_refused(
    checkpoint: Path, tiny_model: Any, make_verifier: Any, tmp_path: Path
) -> None:
    def refused(message: str, **settings: Any) -> None:
        config = {"verifier": str(checkpoint), "output": str(tmp_path / "prm"), **settings}
        with pytest.raises(UserError, match=message) as error:
            export_prm(ExportPrmConfig(**config))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "prm").exists()

    refused(r"head is 'q/x', verifier .* has q/base, orm; name one", head="q/x")
    refused(r"pav.ckpt' is not empty; choose another directory", output=str(checkpoint))
    gemma = tmp_path / "gemma.ckpt"
    make_verifier(tiny_model("gemma2"), gemma)
    refused(r"caps its logits \(final_logit_softcapping 3.0\)", verifier=str(gemma))
