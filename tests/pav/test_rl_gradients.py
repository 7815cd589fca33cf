"""Gradients of the RL losses against Eq. 5, enumerated over every solution of a tiny policy.

The policy is a table of logits: three tokens (a letter, a newline, EOS), solutions of at most four.
All in float64. Axes: N solutions, T tokens, L rows of the table, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pav.rl.advantage import group_mean, rloo, step_credit, token_weights
from pav.rl.loss import kl, normaliser, policy_loss, token_logprobs

LETTER, NEWLINE, EOS = range(3)
LENGTH, PROMPT = 4, (NEWLINE, LETTER)
Ids = tuple[int, ...]
# States are the unfinished solutions; two more rows stand for what no loss may reach.
STATES: list[Ids] = [s for n in range(LENGTH) for s in product((LETTER, NEWLINE), repeat=n)]
ROW = {state: i for i, state in enumerate(STATES)}
AT_PROMPT, AFTER = len(STATES), len(STATES) + 1
SOLUTIONS: list[Ids] = [(*s, EOS) for s in STATES]
SOLUTIONS += list(product((LETTER, NEWLINE), repeat=LENGTH))
ALPHA = 3.0


def step_ends(ids: Ids) -> list[int]:
    """Every newline ends a step, and EOS; one of nothing but a newline is a step here, too."""
    return [i + 1 for i, token in enumerate(ids) if token != LETTER]


@dataclass(frozen=True)
class Enumerated:
    """A policy's exact values, of states and of solutions, and the chance of every solution."""

    value: dict[Ids, float]
    chance_N: Tensor

    @property
    def expected(self) -> float:
        return self.value[()]


RIGHT = np.random.default_rng(5).random(len(SOLUTIONS)) < 0.3
REWARD = {s: float(right) for s, right in zip(SOLUTIONS, RIGHT, strict=True)}


def table(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(AFTER + 1, 3, generator=generator, dtype=torch.float64)


def probabilities(logits_LV: Tensor, ids: Ids) -> Tensor:
    """Chance of ``ids`` from the start, differentiable."""
    chance = torch.ones((), dtype=torch.float64)
    for h, token in enumerate(ids):
        chance = chance * logits_LV[ROW[ids[:h]]].softmax(-1)[token]
    return chance


def enumerated(logits_LV: Tensor) -> Enumerated:
    value: dict[Ids, float] = dict(REWARD)
    for state in sorted(STATES, key=len, reverse=True):
        p = logits_LV[ROW[state]].softmax(-1)
        value[state] = sum(p[a].item() * value[(*state, a)] for a in range(3))
    return Enumerated(value, torch.stack([probabilities(logits_LV, s) for s in SOLUTIONS]))


def advantages(value: dict[Ids, float], ids: Ids) -> np.ndarray:
    """A of every complete step: value after it minus value before it (Eq. 2)."""
    q = [value[()], *(value[ids[:end]] for end in step_ends(ids))]
    return np.diff(q)


def eq_5(policy_LV: Tensor, prover: dict[Ids, float], alpha: float) -> Tensor:
    """Eq. 5 state by state and step by step: no sampling, no score function, no outcome.

    sum_s d(s) sum_a grad pi(a|s) (Q^pi(s, a) + alpha A^mu(s, a)), a = all tokens of a step; the
    unfinished step of a truncated solution has no A.
    """
    own = enumerated(policy_LV.detach()).value
    logits = policy_LV.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    starts: list[Ids] = [()]
    while starts:
        state = starts.pop()
        visited = float(probabilities(policy_LV, state))
        open_steps: list[Ids] = [()]
        while open_steps:
            step = open_steps.pop()
            for token in range(3):
                after = (*state, *step, token)
                whole = token != LETTER
                if not whole and len(after) < LENGTH:
                    open_steps.append((*step, token))
                    continue
                conditional = torch.ones((), dtype=torch.float64)
                for i, t in enumerate((*step, token)):
                    at = (*state, *step[:i])
                    conditional = conditional * logits[ROW[at]].softmax(-1)[t]
                effective = own[after] + alpha * whole * (prover[after] - prover[state])
                total = total + visited * conditional * effective
                if token == NEWLINE and len(after) < LENGTH:
                    starts.append(after)
    (gradient,) = torch.autograd.grad(total, logits)
    return gradient


def outcome_gradient(policy_LV: Tensor) -> Tensor:
    """Gradient of the expected reward."""
    logits = policy_LV.clone().requires_grad_()
    chance_N = enumerated(logits).chance_N
    reward_N = torch.tensor([REWARD[s] for s in SOLUTIONS], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((chance_N * reward_N).sum(), logits)
    return gradient


def batch(solutions: Sequence[Ids], width: int = 0) -> tuple[Tensor, Tensor]:
    """ids (B, T) of prompt and solution, right-padded with letters, and the mask (B, T - 1)."""
    width = max(width, *map(len, solutions)) + len(PROMPT)
    rows = [[*PROMPT, *s, *[LETTER] * (width - len(PROMPT) - len(s))] for s in solutions]
    place = torch.arange(width - 1)
    ends = torch.tensor([len(PROMPT) + len(s) - 1 for s in solutions])
    return torch.tensor(rows), (place >= len(PROMPT) - 1) & (place < ends[:, None])


def model(logits_LV: Tensor, ids_BT: Tensor) -> Tensor:
    """Next-token logits (B, T, V), as a network says them: at prompt, EOS and padding, too."""
    rows = []
    for ids in ids_BT.tolist():
        written = ids[len(PROMPT) :]
        over = written.index(EOS) if EOS in written else LENGTH - 1
        after = [ROW[tuple(written[:n])] if n <= over else AFTER for n in range(len(written) + 1)]
        rows.append([AT_PROMPT] * (len(PROMPT) - 1) + after)
    return logits_LV[torch.tensor(rows)]


def padded(weights: Sequence[np.ndarray], like: Tensor) -> Tensor:
    """Token weights, at the positions that predict the tokens; NaN elsewhere must not matter."""
    out = torch.full(like.shape, torch.nan, dtype=torch.float64)
    for row, weight in zip(out, weights, strict=True):
        row[len(PROMPT) - 1 : len(PROMPT) - 1 + len(weight)] = torch.from_numpy(weight)
    return out


def estimated(
    policy_LV: Tensor,
    solutions: Sequence[Ids],
    weights: Sequence[np.ndarray],
    coefficient_B: Tensor,
    width: int = 0,
    **loss: Any,
) -> Tensor:
    """Minus the gradient of the loss of a batch."""
    logits = policy_LV.clone().requires_grad_()
    ids, mask = batch(solutions, width)
    logprob, _ = token_logprobs(model(logits, ids), ids, 1.0)
    sampled = loss.pop("sampled", logprob.detach())
    total = policy_loss(logprob, padded(weights, mask), mask, sampled, **loss)
    (gradient,) = torch.autograd.grad((total * coefficient_B[:, None]).sum(), logits)
    return -gradient


def weights_of(
    solutions: Sequence[Ids], outcome_B: np.ndarray, prover: dict[Ids, float], credit_lambda: float
) -> list[np.ndarray]:
    """Token weights of a batch: outcome, and alpha times the credit of steps."""
    return [
        token_weights(
            len(s),
            step_ends(s),
            float(outcome),
            ALPHA * step_credit(advantages(prover, s), credit_lambda),
        )
        for s, outcome in zip(solutions, outcome_B, strict=True)
    ]


# All groups of two: 961, each by its chance.
PAIRS = list(product(range(len(SOLUTIONS)), repeat=2))
PAIRED = [SOLUTIONS[i] for pair in PAIRS for i in pair]


def over_groups(
    policy_LV: Tensor,
    prover: dict[Ids, float],
    baseline: Callable[[np.ndarray], np.ndarray],
    credit_lambda: float = 0.0,
    **loss: Any,
) -> Tensor:
    """Exact expectation of the gradient over all groups of two."""
    reward_PG = np.array([[REWARD[SOLUTIONS[i]] for i in pair] for pair in PAIRS])
    weights = weights_of(PAIRED, baseline(reward_PG).ravel(), prover, credit_lambda)
    chance_N = enumerated(policy_LV).chance_N
    chance_P = torch.tensor([float(chance_N[i] * chance_N[j]) for i, j in PAIRS])
    coefficient = torch.from_numpy(normaliser([1, 1], "traces"))
    coefficient_B = (chance_P.double()[:, None] * coefficient).flatten()
    return estimated(policy_LV, PAIRED, weights, coefficient_B, **loss)


POLICY, PROVER = table(1), table(2)
MU = enumerated(PROVER).value


def close(a: Tensor, b: Tensor, atol: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_the_enumeration_is_whole() -> None:
    own = enumerated(POLICY)
    assert float(own.chance_N.sum()) == pytest.approx(1, abs=1e-12)
    mean = sum(float(p) * REWARD[s] for p, s in zip(own.chance_N, SOLUTIONS, strict=True))
    assert own.expected == pytest.approx(mean, abs=1e-12)
    assert 0.1 < own.expected < 0.9
    # Without a prover Eq. 5 is the gradient of the expected reward; with one it is another.
    close(eq_5(POLICY, MU, 0.0), outcome_gradient(POLICY), 1e-12)
    assert (eq_5(POLICY, MU, ALPHA) - outcome_gradient(POLICY)).abs().max() > 0.05


def test_rloo_has_the_gradient_of_eq_5() -> None:
    close(over_groups(POLICY, MU, rloo), eq_5(POLICY, MU, ALPHA))


def test_the_whole_groups_mean_shrinks_the_outcome_part_by_one_over_the_group() -> None:
    dense = eq_5(POLICY, MU, ALPHA) - eq_5(POLICY, MU, 0.0)
    close(over_groups(POLICY, MU, group_mean), dense + eq_5(POLICY, MU, 0.0) / 2)


@pytest.mark.parametrize("loss", [{"clip": 0.2}, {"importance_cap": 2.0}])
def test_clipped_and_importance_weights_have_the_gradient_of_eq_5_on_policy(
    loss: dict[str, float],
) -> None:
    close(over_groups(POLICY, MU, rloo, **loss), eq_5(POLICY, MU, ALPHA))


def test_a_baseline_of_the_state_leaves_the_gradient_of_eq_5() -> None:
    own = enumerated(POLICY)
    exact = eq_5(POLICY, MU, ALPHA)
    rng = np.random.default_rng(3)
    for baseline in (own.value, {s: rng.normal() for s in STATES}):
        weights = weights_of(SOLUTIONS, np.array([REWARD[s] for s in SOLUTIONS]), MU, 0.0)
        for s, weight in zip(SOLUTIONS, weights, strict=True):
            weight -= [baseline[s[:h]] for h in range(len(s))]
        close(estimated(POLICY, SOLUTIONS, weights, own.chance_N), exact)


@pytest.mark.parametrize("credit_lambda", [0.0, 0.6, 1.0])
def test_the_policy_as_its_own_prover_has_one_plus_alpha_times_the_outcome_gradient(
    credit_lambda: float,
) -> None:
    # Later advantages of the policy itself are 0 in expectation, so lambda changes nothing. The
    # unfinished step of a truncated solution has no A; this policy ends its last step in time.
    policy = POLICY.clone()
    for state in STATES:
        if len(state) == LENGTH - 1:
            policy[ROW[state], LETTER] = -60.0
    gradient = over_groups(policy, enumerated(policy).value, rloo, credit_lambda)
    expected = (1 + ALPHA) * outcome_gradient(policy)
    close(gradient, expected)
    assert expected.abs().max() > 0.05


def test_another_prover_makes_lambda_matter() -> None:
    zero, one = (over_groups(POLICY, MU, rloo, credit_lambda=x) for x in (0.0, 1.0))
    assert (zero - one).abs().max() > 0.02


def test_advantages_telescope() -> None:
    for s in SOLUTIONS:
        ends = step_ends(s)
        last = MU[s[: ends[-1]]] if ends else MU[()]
        assert advantages(MU, s).sum() == pytest.approx(last - MU[()], abs=1e-12)
        # lambda 1 is the return-to-go: the last Q minus the one before the step.
        before = [MU[s[:start]] for start in [0, *ends][: len(ends)]]
        np.testing.assert_allclose(
            step_credit(advantages(MU, s), 1.0), last - np.array(before), atol=1e-12
        )


def test_prompt_eos_and_padding_carry_no_gradient() -> None:
    gradient = over_groups(POLICY, MU, rloo, width=LENGTH + 3)
    assert (gradient[[AT_PROMPT, AFTER]] == 0).all()
    assert (gradient[: len(STATES)] != 0).any(dim=1).all()
    close(gradient, over_groups(POLICY, MU, rloo), 1e-12)
    nowhere = POLICY.clone()
    nowhere[[AT_PROMPT, AFTER]] = torch.nan
    own = over_groups(nowhere, MU, rloo)[: len(STATES)]
    close(own, gradient[: len(STATES)], 1e-12)


@pytest.mark.parametrize("how", ["traces", "sequences", "tokens"])
def test_micro_batches_and_padding_change_nothing(how: Any) -> None:
    rng = np.random.default_rng(0)
    solutions = [SOLUTIONS[i] for i in rng.integers(len(SOLUTIONS), size=12)]
    weights = weights_of(solutions, rng.normal(size=12), MU, 0.3)
    coefficient = torch.from_numpy(normaliser([len(s) for s in solutions], how))
    whole = estimated(POLICY, solutions, weights, coefficient)
    for sizes in ([5, 7], [1] * 12, [3, 3, 6]):
        parts, start = torch.zeros_like(POLICY), 0
        for size in sizes:
            part = slice(start, start + size)
            parts += estimated(
                POLICY, solutions[part], weights[part], coefficient[part], width=start % 3 + LENGTH
            )
            start += size
        close(parts, whole, 1e-12)


def test_kl_estimators_have_the_biases_that_are_said_of_them() -> None:
    reference = table(6)
    ids, mask = batch(SOLUTIONS)
    there, _ = token_logprobs(model(reference, ids), ids, 1.0)
    logits = POLICY.clone().requires_grad_()
    here, _ = token_logprobs(model(logits, ids), ids, 1.0)
    chance_N = enumerated(POLICY).chance_N[:, None]

    # The two divergences, state by state.
    p, r = logits[: len(STATES)].softmax(-1), reference[: len(STATES)].softmax(-1)
    visited = torch.stack([probabilities(logits, s) for s in STATES])
    divergence = (visited * (p * (p / r).log()).sum(-1)).sum()
    other = (visited.detach() * (r * (r / p).log()).sum(-1)).sum()
    (of_divergence,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    (of_other,) = torch.autograd.grad(other, logits, retain_graph=True)

    def as_loss(estimator: Any) -> Tensor:
        total = (chance_N * torch.where(mask, kl(here, there, estimator), 0)).sum()
        assert total.item() == pytest.approx(divergence.item(), abs=1e-10)
        (found,) = torch.autograd.grad(total, logits, retain_graph=True)
        return found

    def in_reward(estimator: Any) -> Tensor:
        each = torch.where(mask, kl(here, there, estimator), 0).detach()
        to_go = each.flip(1).cumsum(1).flip(1)
        loss = policy_loss(here, to_go, mask, here)
        (found,) = torch.autograd.grad(-(chance_N * loss).sum(), logits, retain_graph=True)
        return found

    close(as_loss("k1"), torch.zeros_like(POLICY))
    close(as_loss("k3"), of_other)
    close(in_reward("k1"), of_divergence)
    assert (in_reward("k3") - of_divergence).abs().max() > 0.05
    assert (kl(here, there, "k3") >= 0).all()
