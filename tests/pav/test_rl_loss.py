"""Weights of tokens, and losses per token: small cases with known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pav.core.errors import UserError
from pav.core.steps import StepRule, compile_rule
from pav.rl import loss as loss_module
from pav.rl.advantage import center, dead, group_mean, rloo, token_weights
from pav.rl.loss import normaliser, policy_loss, token_logprobs, value_loss
from pav.tasks.tape import tape_tokenizer


def test_coefficients_are_those_of_the_named_means() -> None:
    lengths = [1, 2, 5]
    loss_BT = np.where(
        np.arange(5) < np.array(lengths)[:, None], np.arange(1.0, 16).reshape(3, 5), 0
    )

    def total(how: Any) -> float:
        return float((loss_BT * normaliser(lengths, how)[:, None]).sum())

    sums = loss_BT.sum(axis=1)
    assert total("traces") == pytest.approx(sums.mean())
    assert total("sequences") == pytest.approx((sums / lengths).mean())
    assert total("tokens") == pytest.approx(sums.sum() / 8)


def test_importance_weights_correct_the_sampler_and_are_cut_at_the_cap() -> None:
    # Solutions of one token, sampled by another policy: uncut weights give the policy's gradient.
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    other = other.softmax(-1)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[:, None]
    mask = torch.ones(3, 1, dtype=torch.bool)

    def gradient(cap: float | None) -> Tensor:
        x = logits.clone().requires_grad_()
        logprob = x.log_softmax(-1)[:, None]
        loss = policy_loss(logprob, weight, mask, other.log()[:, None], importance_cap=cap)
        (found,) = torch.autograd.grad((other[:, None] * loss).sum(), x)
        return -found

    x = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad((x.softmax(-1) * weight[:, 0]).sum(), x)
    torch.testing.assert_close(gradient(1e9), exact)
    ratio = logits.softmax(-1) / other
    assert ratio.max() > 1.05
    x = logits.clone().requires_grad_()
    cut = (other * ratio.clamp(max=1.05))[:, None]
    (capped,) = torch.autograd.grad((cut * weight * x.log_softmax(-1)[:, None]).sum(), x)
    torch.testing.assert_close(gradient(1.05), capped)


def test_a_clipped_ratio_stops_where_the_weight_has_already_pushed_it() -> None:
    sampled = torch.zeros(1, 4)
    logprob = torch.tensor([[0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    weight = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss = policy_loss(logprob, weight, mask, sampled, clip=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    ratio = logprob.detach().exp()
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -ratio[0, 1], ratio[0, 2], 0.0]]))
    torch.testing.assert_close(loss.detach()[0, [0, 3]], torch.tensor([-1.2, 0.8]))


def test_both_ratios_at_once_are_refused() -> None:
    one = torch.zeros(1, 1)
    with pytest.raises(UserError, match=r"clip is 0.2 and importance_cap is 2.0, .* one of them"):
        policy_loss(one, one, one, one, clip=0.2, importance_cap=2.0)


def test_value_loss_leads_to_the_mean_return_and_ignores_the_rest() -> None:
    value = torch.zeros(1, 3, requires_grad=True)
    target, mask = torch.tensor([[1.0, -2.0, torch.nan]]), torch.tensor([[1, 1, 0]])
    loss = value_loss(value, target, mask)
    (gradient,) = torch.autograd.grad(loss.sum(), value)
    assert loss.tolist() == [[1.0, 4.0, 0.0]] and gradient.tolist() == [[-2.0, 4.0, 0.0]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropies_are_exact_in_any_chunks(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[0, 0, 3] = -torch.inf
    ids = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(1))
    p = (logits.double() / temperature).softmax(-1)[:, :-1]
    whole = token_logprobs(logits, ids, temperature)
    monkeypatch.setattr(loss_module, "_LOGIT_BYTES", 1)
    for logprob, entropy in (whole, token_logprobs(logits, ids, temperature)):
        assert logprob.dtype == entropy.dtype == torch.float32
        chosen = p.log().gather(-1, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(logprob.double(), chosen, rtol=1e-5, atol=1e-5)
        exact = -(p * p.log()).nan_to_num().sum(-1)
        torch.testing.assert_close(entropy.double(), exact, rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(1, 5), max_size=6), st.integers(0, 4), st.floats(-2, 2), st.randoms())
def test_every_token_has_the_credit_of_its_own_step(
    sizes: list[int], tail: int, outcome: float, random: Any
) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    credit = np.array([random.uniform(-1, 1) for _ in sizes])
    length = sum(sizes) + tail
    weights = token_weights(length, ends, outcome, credit)
    assert weights.shape == (length,)
    for token in range(length):
        step = sum(end <= token for end in ends)
        own = credit[step] if step < len(sizes) else 0.0
        assert weights[token] == outcome + own


def test_a_delimiter_carries_the_credit_of_the_step_that_it_ends() -> None:
    tokenizer = tape_tokenizer()
    stepper = compile_rule(StepRule(), tokenizer, [tokenizer.eos_token_id])
    ids = [*tokenizer.encode("12+3=15\n15-4=11\n9", add_special_tokens=False)]
    ends = stepper.step_ends(ids)
    weights = token_weights(len(ids), ends, 0.0, np.array([1.0, 2.0]))
    text = [(tokenizer.decode([t]), float(w)) for t, w in zip(ids, weights, strict=True)]
    assert text[7:9] == [("\n", 1.0), ("1", 2.0)]
    assert text[-2:] == [("\n", 2.0), ("9", 0.0)]
    with pytest.raises(ValueError, match="1 credits"):
        token_weights(len(ids), ends, 0.0, np.array([1.0]))


def test_baselines_of_a_group_are_the_others_and_a_group_of_one_is_refused() -> None:
    reward = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_allclose(rloo(reward)[0], [1, -1 / 3, -1 / 3, -1 / 3])
    np.testing.assert_allclose(group_mean(reward)[0], [0.75, -0.25, -0.25, -0.25])
    assert dead(reward).tolist() == [False, True]
    assert (rloo(reward)[1] == 0).all()
    for of in (rloo, group_mean):
        with pytest.raises(UserError, match=r"group is 1, .* give group 2 or more"):
            of(np.ones((3, 1)))


def test_credits_are_centred_at_their_own_step_index_or_over_all_steps() -> None:
    credits = [np.array([1.0, 2.0, 6.0]), np.array([]), np.array([3.0])]
    none, step, every = (center(credits, how) for how in ("none", "step", "batch"))  # type: ignore[arg-type]
    assert [c.tolist() for c in none] == [[1, 2, 6], [], [3]]
    assert [c.tolist() for c in step] == [[-1, 0, 0], [], [1]]
    assert [c.tolist() for c in every] == [[-2, -1, 3], [], [0]]
    assert center([np.array([])], "batch")[0].size == 0
