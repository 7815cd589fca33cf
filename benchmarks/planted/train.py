"""SFT and policy gradient with effective rewards on the planted task, many runs in one stack.

Axes: T iteration, R run, B response, H position, S state.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.planted.made import Stack
from benchmarks.planted.task import (
    LENGTH,
    NEXT_SA,
    RIGHT,
    VOCABULARY,
    is_live,
    prover,
    sample,
    values,
)
from pav.core.errors import UserError
from pav.core.progress import Reporter
from pav.rl.advantage import minus_mean, step_credit
from pav.rl.loss import normaliser, policy_loss

BATCH = 64
LEARNING_RATE = 1e-3
INITIAL_GAMMA = 5.0
SFT_SAMPLES = 3200
SFT_ITERATIONS = 50
NEXT = torch.from_numpy(NEXT_SA).flatten()


@dataclass(frozen=True)
class Settings:
    """One stack of RL runs that share a seed and an initial policy.

    Args:
        gammas: prover of each run.
        alphas: weight of the prover's advantage in each run; 0 is outcome reward alone.
        seed: of the initial policy, of the samples and of Monte-Carlo noise.
        iterations: policy updates.
        rollouts: Monte-Carlo rollouts behind every value of a prover; 0 means exact values.
        baseline: whether the batch mean of the effective reward at a position is subtracted.
        literal_sft: 50 SFT updates on 3200 samples in all; else 50 passes of 3200 each.
    """

    gammas: tuple[float, ...]
    alphas: tuple[float, ...]
    seed: int
    iterations: int
    rollouts: int = 0
    baseline: bool = False
    literal_sft: bool = False

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UserError(f"iterations is {self.iterations}; give a positive number")
        if self.rollouts < 0:
            raise UserError(f"rollouts is {self.rollouts}; give a positive number, 0 for exact")


@dataclass(frozen=True)
class Curves:
    """What a stack of runs measured.

    Attributes:
        right_TR: right responses among the 64 on which each update was made.
        seconds: wall time.
        cpu_seconds: processor time.
    """

    right_TR: NDArray[np.uint8]
    seconds: float
    cpu_seconds: float

    @property
    def accuracy_TR(self) -> NDArray[np.float64]:
        """Share of right responses in each batch, before its update."""
        return self.right_TR / BATCH


def sft(seed: int, literal: bool = False) -> Stack:
    """The initial policy: next-token loss on samples of mu_5, Adam at 1e-3, batches of 64."""
    rng = np.random.default_rng([seed, 1])
    policy = Stack.random(seed).repeated(1)
    optimiser = torch.optim.Adam(policy.parameters, lr=LEARNING_RATE, fused=True)
    updates = SFT_ITERATIONS if literal else SFT_ITERATIONS * SFT_SAMPLES // BATCH
    for _ in range(updates):
        tokens = sample(prover(INITIAL_GAMMA), BATCH, rng)
        live = torch.from_numpy(is_live(tokens)).float()
        loss = -(policy.log_probs(torch.from_numpy(tokens)[None])[0] * live).sum() / live.sum()
        _update(policy, optimiser, loss)
    return policy


def states(tokens_RBH: Tensor) -> Tensor:
    """States (R, B, H + 1) before the first and after every token."""
    out = torch.zeros(*tokens_RBH.shape[:2], LENGTH + 1, dtype=torch.int64)
    for h in range(LENGTH):
        out[..., h + 1] = NEXT[out[..., h] * VOCABULARY + tokens_RBH[..., h]]
    return out


def effective_rewards(
    states_RBH: Tensor,
    v_RHS: Tensor,
    alpha_R: Tensor,
    rollouts: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Outcome + alpha * A of the prover, per token (R, B, H): the bracket of Eq. 5.

    Q^pi is the outcome of the response, as in policy gradient. A is the difference of consecutive
    values (Eq. 2); with ``rollouts`` each is an independent draw of Binomial(n, V) / n. A token is
    a step here, so what a step is credited with weighs its one token.
    """
    runs, batch, positions = states_RBH.shape
    index = torch.arange(positions) * v_RHS.shape[2] + states_RBH
    v = v_RHS.flatten(1).gather(1, index.flatten(1)).view(runs, batch, positions)
    if rollouts:
        v = torch.binomial(torch.full_like(v, rollouts), v, generator=generator) / rollouts
    outcome = (states_RBH[..., -1:] == RIGHT).to(v.dtype)
    credit = torch.from_numpy(step_credit(v.diff(dim=-1).numpy(), credit_lambda=0.0)).to(v.dtype)
    return outcome + alpha_R[:, None, None] * credit


def centred(reward_RBH: Tensor, live_RBH: Tensor) -> Tensor:
    """Effective rewards less their mean over the live tokens of a run's batch at each position."""
    runs, _, positions = reward_RBH.shape
    group_RBH = torch.arange(runs * positions).view(runs, 1, positions).expand_as(reward_RBH)
    off = minus_mean(reward_RBH[live_RBH].double().numpy(), group_RBH[live_RBH].numpy())
    out = torch.zeros_like(reward_RBH)
    out[live_RBH] = torch.from_numpy(off).to(out.dtype)
    return out


def train(settings: Settings, initial: Stack | None = None) -> tuple[Curves, Stack]:
    """Policy gradient (Eq. 5) from ``initial``, by default the SFT policy of the seed."""
    runs = len(settings.gammas)
    policy = (initial or sft(settings.seed, settings.literal_sft)).repeated(runs)
    optimiser = torch.optim.Adam(policy.parameters, lr=LEARNING_RATE, fused=True)
    generator = torch.Generator().manual_seed(settings.seed + 1_000_003)
    v_RHS = torch.from_numpy(np.stack([values(prover(g)).v for g in settings.gammas])).float()
    alpha_R = torch.tensor(settings.alphas)
    right_TR = np.empty((settings.iterations, runs), dtype=np.uint8)
    coefficient_B = torch.from_numpy(normaliser([LENGTH] * BATCH, "traces")).float()
    start, cpu_start = time.perf_counter(), time.process_time()
    # Adam's moments decay into denormal numbers where rewards are rare, and those are slow.
    torch.set_flush_denormal(True)
    with Reporter(f"RL, seed {settings.seed}", settings.iterations, "updates") as reporter:
        for t in range(settings.iterations):
            tokens_RBH = policy.sample(BATCH, generator)
            states_RBH = states(tokens_RBH)
            right_TR[t] = (states_RBH[..., -1] == RIGHT).sum(1).numpy()
            reward = effective_rewards(states_RBH, v_RHS, alpha_R, settings.rollouts, generator)
            # EOS counts, what follows it does not.
            live = torch.from_numpy(is_live(tokens_RBH.numpy()))
            if settings.baseline:
                reward = centred(reward, live)
            log_probs = policy.log_probs(tokens_RBH)
            loss = policy_loss(log_probs, reward, live, log_probs)
            _update(policy, optimiser, (loss * coefficient_B[:, None]).sum())
            reporter.update(t + 1)
    torch.set_flush_denormal(False)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return Curves(right_TR, seconds, cpu), policy


def _update(policy: Stack, optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    policy.mask_gradients()
    optimiser.step()


def trained(settings: Settings, directory: Path) -> Curves:
    """Curves of a finished stack, from ``directory`` if it was run before with equal settings."""
    path = saved_at(settings, directory)
    if path.exists():
        with np.load(path, allow_pickle=False) as saved:
            return Curves(saved["right_TR"], float(saved["seconds"]), float(saved["cpu_seconds"]))
    curves, _ = train(settings)
    directory.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            settings=json.dumps(asdict(settings), allow_nan=False),
            right_TR=curves.right_TR,
            seconds=curves.seconds,
            cpu_seconds=curves.cpu_seconds,
        )
    os.replace(partial, path)
    return curves


def saved_at(settings: Settings, directory: Path) -> Path:
    """File of a stack's curves; its name holds a digest of the settings."""
    text = json.dumps(asdict(settings), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return directory / f"seed{settings.seed}-{digest}.npz"
