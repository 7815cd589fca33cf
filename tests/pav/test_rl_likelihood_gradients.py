"""Gradients of likelihood rewards against their definition, enumerated over all groups of chains.

The policy is a table of logits over three tokens: two letters and the opening tag. A chain is up to
two letters and the tag; one of two letters without it is cut, and the tag is forced. The reference
is two letters. All through the update of a run, in float64. Axes: N chains, V tokens.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric import Fabric
from torch import Tensor, nn

from pav.policy.policy import PolicyConfig
from pav.rl.config import RewardKind, RlConfig
from pav.rl.learner import Said
from pav.rl.likelihood import contributions, derivative, log_mean, reward
from pav.rl.update import Sample, Sums, update
from pav.tasks.tape import Tape

A, B, TAG = range(3)
PROMPT, REFERENCE = B, (A, B)
Ids = tuple[int, ...]
STATES: list[Ids] = [s for n in range(6) for s in product(range(3), repeat=n)]
ROW = {state: i for i, state in enumerate(STATES)}
CHAINS: list[Ids] = [(*s, TAG) for n in range(2) for s in product((A, B), repeat=n)]
CHAINS += [(*s, last) for s in product((A, B), repeat=1) for last in (A, B)]
CHAINS = list(dict.fromkeys(CHAINS))
KINDS: tuple[RewardKind, ...] = (
    "probability", "avg_probability", "logprob", "avg_logprob", "jepo",
)  # fmt: skip


def after(chain: Ids) -> Ids:
    return REFERENCE if chain[-1] == TAG else (TAG, *REFERENCE)


class Table(nn.Module):
    """Says what a learner says."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, ids: Tensor, first: int) -> Said:
        at = [
            [ROW[tuple(row[1 : 1 + t])] if 1 + t <= 6 else 0 for t in range(len(row) - 1)]
            for row in ids.tolist()
        ]
        log = self.logits[torch.tensor(at)].log_softmax(-1)
        logprob = log.gather(-1, ids[:, 1:, None])[..., 0][:, first:]
        return Said(logprob, torch.zeros_like(logprob), torch.zeros_like(logprob))


def table(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(STATES), 3, generator=generator, dtype=torch.float64)


POLICY = table(1)


def log_probability(logits: Tensor, before: Ids, written: Ids) -> Tensor:
    """(len,) log-probability of each token of ``written``."""
    rows = [logits[ROW[(*before, *written[:t])]].log_softmax(-1)[w] for t, w in enumerate(written)]
    return torch.stack(rows)


def chances(logits: Tensor) -> Tensor:
    return torch.stack([log_probability(logits, (), z).sum().exp() for z in CHAINS])


def reward_of(kind: RewardKind, logits: Tensor, chain: Ids) -> Tensor:
    """R by its definition, differentiable."""
    log_A = log_probability(logits, chain, after(chain))
    if kind == "probability":
        return log_A.sum().exp()
    if kind == "avg_probability":
        return log_A.exp().mean()
    return log_A.mean() if kind == "avg_logprob" else log_A.sum()


def exact(kind: RewardKind, policy: Tensor, with_reference: bool = True) -> Tensor:
    """Gradient of the expected reward; of groups of two for jepo."""
    logits = policy.clone().requires_grad_()
    chance_N = chances(logits)
    if kind == "jepo":
        log_N = torch.stack([log_probability(logits, z, after(z)).sum() for z in CHAINS])
        both_NN = torch.logaddexp(log_N[:, None], log_N) - np.log(2)
        value = (chance_N[:, None] * chance_N * both_NN).sum()
    else:
        reward_N = torch.stack([reward_of(kind, logits, z) for z in CHAINS])
        if not with_reference:
            reward_N = reward_N.detach()
        value = (chance_N * reward_N).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return gradient


PAIRS = list(product(range(len(CHAINS)), repeat=2))


def config(kind: RewardKind, **settings: Any) -> RlConfig:
    return RlConfig(
        policy=PolicyConfig(), task=Tape(), dense="none", reward=kind, group=2, kl=0.0,
        max_grad_norm=1e9, **settings,
    )  # fmt: skip


def estimated(policy: Tensor, settings: RlConfig) -> tuple[Tensor, Sums]:
    """Expected gradient of an update over all groups of two, each by its chance."""
    chance_N = chances(policy)
    samples = [
        Sample(
            [PROMPT, *CHAINS[i], *after(CHAINS[i])], 1, np.zeros(len(CHAINS[i]), np.float32),
            np.zeros(len(CHAINS[i])), float(chance_N[pair[0]] * chance_N[pair[1]] / 2), 2 * p + g,
        )
        for p, pair in enumerate(PAIRS)
        for g, i in enumerate(pair)
    ]  # fmt: skip
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    learner = Table(policy)
    wrapped, optimizer = fabric.setup(learner, torch.optim.SGD(learner.parameters(), lr=0.0))
    torch.set_default_dtype(torch.float64)  # Fabric gives outputs that type
    try:
        sums = update(fabric, wrapped, optimizer, None, samples, settings)
    finally:
        torch.set_default_dtype(torch.float32)
    assert learner.logits.grad is not None
    return -learner.logits.grad, sums


def close(a: Tensor, b: Tensor, atol: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_the_enumeration_is_whole() -> None:
    assert float(chances(POLICY).sum()) == pytest.approx(1, abs=1e-12)
    assert len(CHAINS) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_every_reward_has_the_gradient_of_its_expectation(kind: RewardKind) -> None:
    expected = exact(kind, POLICY)
    gradient, _ = estimated(POLICY, config(kind))
    close(gradient, expected)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_groups_too_large_for_one_pass_are_read_first_and_weighed_alike(kind: RewardKind) -> None:
    whole, one_pass = estimated(POLICY, config(kind))
    parts, two_passes = estimated(POLICY, config(kind, tokens_per_batch=8))
    close(parts, whole, 1e-12)
    assert one_pass.read.keys() == two_passes.read.keys() == set(range(2 * len(PAIRS)))
    for number, row in one_pass.read.items():
        np.testing.assert_allclose(row, two_passes.read[number], atol=1e-12)
        chain = CHAINS[PAIRS[number // 2][number % 2]]
        np.testing.assert_allclose(row, log_probability(POLICY, chain, after(chain)), atol=1e-12)


@pytest.mark.parametrize("kind", ["probability", "logprob"])
def test_without_the_reference_term_chains_alone_are_taught(kind: RewardKind) -> None:
    gradient, _ = estimated(POLICY, config(kind, reference_term=False))
    close(gradient, exact(kind, POLICY, with_reference=False))


@pytest.mark.parametrize("kind", ["probability", "avg_logprob"])
def test_the_baseline_touches_the_first_term_only(kind: RewardKind) -> None:
    by_rloo, _ = estimated(POLICY, config(kind))
    by_mean, _ = estimated(POLICY, config(kind, estimator="group_mean"))
    first = exact(kind, POLICY, with_reference=False)
    # Half of the first term is lost with a mean that holds the chain itself; the second is whole.
    close(by_rloo - by_mean, first / 2)


@pytest.mark.parametrize("kind", ["logprob", "sft"])
def test_a_policy_that_ignores_the_chain_learns_as_in_fine_tuning(
    kind: Literal["logprob", "sft"],
) -> None:
    policy = POLICY.clone()
    for chain in CHAINS:
        for n in range(len(REFERENCE)):
            opened = chain if chain[-1] == TAG else (*chain, TAG)
            policy[ROW[(*opened, *REFERENCE[:n])]] = table(5)[n]
        if chain[-1] != TAG:
            policy[ROW[chain]] = torch.tensor([-60.0, -60.0, 0.0])
    gradient, _ = estimated(policy, config(kind, sft_chain="own" if kind == "sft" else "none"))
    logits = policy.clone().requires_grad_()
    chance_N = chances(policy)
    log_N = torch.stack([log_probability(logits, z, after(z)).sum() for z in CHAINS])
    (fine_tuning,) = torch.autograd.grad((chance_N * log_N).sum(), logits)
    close(gradient, fine_tuning)


logprobs = st.lists(st.floats(-30, 0), min_size=1, max_size=6).map(np.array)


@given(logprobs, st.sampled_from(KINDS))
def test_the_derivative_is_that_of_the_reward(row: np.ndarray, kind: RewardKind) -> None:
    step = 1e-6
    for t, slope in enumerate(derivative(kind, row)):
        up, down = row.copy(), row.copy()
        up[t] += step
        down[t] -= step
        numeric = (reward(kind, up) - reward(kind, down)) / (2 * step)
        assert slope == pytest.approx(numeric, rel=1e-4, abs=1e-7)


@given(st.lists(st.floats(-300, 0), min_size=2, max_size=6).map(np.array))
def test_what_a_chain_contributes_is_what_the_mean_loses_without_it(log_G: np.ndarray) -> None:
    for i, contribution in enumerate(contributions(log_G)):
        others = np.delete(log_G, i)
        assert contribution == pytest.approx(log_mean(log_G) - log_mean(others), abs=1e-9)
