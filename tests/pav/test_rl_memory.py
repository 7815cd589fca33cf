"""What RL is said to need of a device, and what is said where it does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pav.core.errors import UserError
from pav.policy.policy import PolicyConfig, Sampler, load_policy
from pav.rl import memory
from pav.rl.config import RlConfig
from pav.rl.learner import Learner, Reference
from pav.tasks.tape import Tape
from pav.verifier.library import load_verifier
from pav.verifier.lora import Lora
from pav.verifier.shape import GIB

BASE = load_policy(PolicyConfig("pav:base"), Tape().step_rule)
VERIFIER = load_verifier("pav:reference")
SAMPLER = Sampler(max_length=160)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_the_plan_counts_the_parameters_that_are_there(lora: Lora | None) -> None:
    config = RlConfig("pav:reference", lora=lora)
    found = memory.plan(config, BASE, [VERIFIER], SAMPLER, gpu=False)
    learner = Learner(BASE.path, 1.0, False, lora)
    trained = sum(p.numel() for p in learner.trained().values())
    assert found.training.gradients == 4 * trained
    assert found.training.optimizer == 8 * trained
    assert found.training.weights == 4 * sum(p.numel() for p in learner.parameters())
    copied = Reference(learner).copy
    size = 0 if copied is None else 4 * sum(p.numel() for p in copied.parameters())
    assert found.reference == size
    trunk = VERIFIER.model.trunk
    assert found.verifier == 4 * sum(p.numel() for p in trunk.parameters())


def test_shares_of_a_policy_are_counted_as_shares() -> None:
    copies = RlConfig("pav:reference", devices=4, kl=0.001)
    each, shared = (
        memory.plan(config, BASE, [VERIFIER], SAMPLER, gpu=False)
        for config in (copies, replace(copies, strategy="fsdp"))
    )
    assert 4 * shared.training.optimizer == pytest.approx(each.training.optimizer, rel=1e-3)
    assert 4 * shared.training.gradients == pytest.approx(each.training.gradients, rel=1e-3)
    assert 4 * shared.reference == pytest.approx(each.reference, rel=1e-3)


def test_what_does_not_fit_is_refused_with_settings_that_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = RlConfig("pav:reference", tokens_per_batch=65536)
    needs = memory.plan(config, BASE, [VERIFIER], SAMPLER, gpu=False).total
    monkeypatch.setattr(memory, "device_memory", lambda gpu: int(needs * 0.9))
    with pytest.raises(UserError, match="these fit: --gradient_checkpointing true"):
        memory.settle(config, BASE, [VERIFIER], SAMPLER, gpu=False)


def test_a_gpus_engine_gets_what_the_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda gpu: 80 * GIB)
    config = RlConfig("pav:reference")
    engine = memory.settle(config, BASE, [VERIFIER], SAMPLER, gpu=True)
    others = memory.plan(config, BASE, [VERIFIER], SAMPLER, gpu=True)
    share = engine.gpu_memory_utilization
    assert share is not None
    rest = others.training.total + others.reference + others.verifier
    assert 0.9 * 80 * GIB < share * 80 * GIB + rest <= 0.95 * 80 * GIB + 1
    set_by_hand = replace(config, engine=replace(config.engine, kv_gib=2.0))
    assert memory.settle(set_by_hand, BASE, [VERIFIER], SAMPLER, gpu=True) == set_by_hand.engine
