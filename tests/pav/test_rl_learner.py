"""The policy in training: what it says, what is served of it, what an update does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor
from transformers import AutoModelForCausalLM

from pav.core.errors import UserError
from pav.policy.policy import PolicyConfig, load_policy
from pav.rl.checkpoint import save_policy
from pav.rl.config import RlConfig
from pav.rl.learner import Learner, Reference
from pav.rl.refresh import fit_row
from pav.rl.reward import judged
from pav.rl.sync import check_mismatch
from pav.rl.trace import Trace
from pav.rl.update import Sample, update
from pav.tasks.tape import Tape
from pav.verifier.forward import Scored
from pav.verifier.library import load_verifier
from pav.verifier.lora import Lora

FABRIC = Fabric(accelerator="cpu", devices=1)


def some(count: int, vocabulary: int, seed: int = 0) -> list[Sample]:
    """Random traces of different lengths."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt, length = int(rng.integers(2, 6)), int(rng.integers(3, 12))
        ids = rng.integers(3, vocabulary, prompt + length).tolist()
        sampled = rng.normal(-2, 0.1, length).astype(np.float32)
        found.append(Sample(ids, prompt, sampled, rng.normal(size=length), 1 / count))
    return found


def logprobs(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities of ids[:, 1:] by transformers alone."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].float()


@pytest.mark.parametrize("architecture", ["llama", "qwen3-tied", "gemma2"])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_what_is_served_and_saved_says_what_the_learner_says(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str, lora: Lora | None
) -> None:
    path = str(tiny_model(architecture))
    torch.manual_seed(0)
    learner = Learner(path, 1.0, False, lora)
    reference = Reference(learner)
    optimizer = torch.optim.AdamW(learner.trained().values(), lr=0.01)
    ids = torch.randint(3, 15, (3, 9))
    start = learner(ids, 0).logprob.detach()
    for _ in range(3):
        config = RlConfig("v", kl=0.0)
        update(FABRIC, FABRIC.setup(learner), optimizer, None, some(8, 15), config)
    now = learner(ids, 0).logprob.detach()
    assert (now - start).abs().max() > 1e-3
    torch.testing.assert_close(reference.logprob(ids, 0), start)
    policy = load_policy(PolicyConfig(path), Tape().step_rule)
    save_policy(tmp_path / "policy", learner, learner.served(), policy.tokenizer)
    # A policy takes the place of the one before.
    save_policy(tmp_path / "policy", learner, learner.served(), policy.tokenizer)
    saved = AutoModelForCausalLM.from_pretrained(
        tmp_path / "policy", dtype=torch.float32, attn_implementation="eager"
    )
    torch.testing.assert_close(logprobs(saved, ids), now, atol=1e-5, rtol=1e-5)
    if lora is not None:
        from peft import PeftModel

        plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        adapted = PeftModel.from_pretrained(plain, str(tmp_path / "policy" / "adapter")).eval()
        torch.testing.assert_close(logprobs(adapted, ids), now, atol=1e-5, rtol=1e-5)
    # What an engine is given has the names and shapes of the directory that it was started on.
    start_of = AutoModelForCausalLM.from_pretrained(path).state_dict()
    served = learner.served()
    assert {k: v.shape for k, v in served.items()} == {k: v.shape for k, v in start_of.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimator": "value"},
        {"clip": 0.2},
        {"kl": 0.1, "kl_estimator": "k1"},
        {"kl": 0.1, "kl_estimator": "k3", "importance_cap": 2.0},
    ],
)
def test_micro_batches_and_padding_change_no_gradient(
    tiny_model: Callable[..., Path], settings: dict[str, object]
) -> None:
    path = str(tiny_model("llama"))
    gradients = []
    for tokens in (20, 8192):
        plain = {"kl": 0.0, "max_grad_norm": 1e9, "tokens_per_batch": tokens, **settings}
        config = RlConfig("v", **plain)  # type: ignore[arg-type]
        torch.manual_seed(0)
        learner = Learner(path, 1.0, config.estimator == "value").double()
        reference = Reference(learner) if config.kl else None
        if reference is not None:  # else the divergence is 0
            with torch.no_grad():
                for parameter in learner.parameters():
                    parameter.mul_(1.01)
        optimizer = torch.optim.SGD(learner.trained().values(), lr=0.0)
        update(FABRIC, FABRIC.setup(learner), optimizer, reference, some(9, 15), config)
        gradients.append({n: p.grad for n, p in learner.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)


def test_an_engine_that_samples_from_another_policy_is_found_and_said(
    tiny_model: Callable[..., Path],
) -> None:
    learner = Learner(str(tiny_model("llama")), 1.0, False)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)
    wrong = some(6, 15)
    right = []
    for sample in wrong:
        with torch.no_grad():
            said = learner(torch.tensor([sample.ids]), sample.prompt_length - 1).logprob[0]
        right.append(replace(sample, sampled_T=said.numpy()))
    config = RlConfig("v", kl=0.0)
    sums = update(FABRIC, FABRIC.setup(learner), optimizer, None, right, config)
    assert sums.mismatch / sums.tokens < 1e-5
    check_mismatch(FABRIC, sums, 0.1, "float32")
    sums = update(FABRIC, FABRIC.setup(learner), optimizer, None, wrong, config)
    with pytest.raises(UserError, match=r"engine and trainer differ: .* in bfloat16: serve"):
        check_mismatch(FABRIC, sums, 0.1, "bfloat16")


def test_scores_of_a_frozen_verifier_are_the_same_bits_after_ten_updates() -> None:
    verifier = load_verifier("pav:reference")
    policy = load_policy(PolicyConfig("pav:base"), Tape().step_rule)
    rng = np.random.default_rng(0)
    traces = []
    for problem in islice(Tape().problems("validation"), 100):
        text = "".join(f"{a}+{b}={a + b}\n" for a, b in rng.integers(1, 50, (3, 2)))
        ids = policy.tokenizer.encode(text, add_special_tokens=False)
        ends = policy.stepper.step_ends(ids)
        prompt = policy.encode(problem)
        traces.append(Trace(problem, 0, prompt, ids, np.zeros(len(ids), np.float32), ends, True,
                            None, False, 0))  # fmt: skip
    before = judged(verifier, traces)
    learner = Learner(policy.path, 1.0, False)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    for seed in range(10):
        config = RlConfig("v", kl=0.0)
        update(FABRIC, FABRIC.setup(learner), optimizer, None, some(4, 15, seed), config)
    after = judged(verifier, traces)
    for (a, _), (b, _) in zip(before, after, strict=True):
        for head in a:
            np.testing.assert_array_equal(a[head], b[head])


def test_a_refreshed_row_follows_a_policy_whose_q_has_changed() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(800, 16)).astype(np.float32)
    row, moved = rng.normal(size=16) * 0.5, rng.normal(size=16) * 0.7
    q_N = 1 / (1 + np.exp(-(hidden @ (row + moved) - 1.0)))
    k_NH = rng.binomial(8, q_N)[:, None].astype(np.float32)
    logit = (hidden @ row).astype(np.float32)
    scored = Scored(
        torch.as_tensor(hidden), logit[:, None], np.zeros((800, 6), np.float32), k_NH,
        np.full((800, 1), 8, np.float32), np.arange(800), np.zeros(800, int),
    )  # fmt: skip
    half = np.arange(800) % 2 == 0
    weight, bias = fit_row(scored, logit, half, torch.as_tensor(row, dtype=torch.float32))
    after = 1 / (1 + np.exp(-(hidden[~half] @ weight.numpy() + bias)))
    before = 1 / (1 + np.exp(-logit[~half]))
    assert np.abs(after - q_N[~half]).mean() < 0.05 < np.abs(before - q_N[~half]).mean()
