"""From labels to training examples: which positions carry which counts.

Axes: P scored positions of a trace (steps + 1), H heads, D hidden size, F surprise features.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pav.core.errors import UserError
from pav.core.heads import LIK, ORM
from pav.core.progress import Reporter
from pav.core.steps import scoring_position
from pav.labels.tables import LabelSet, prefix_key
from pav.policy.policy import Policy
from pav.tasks.base import Problem
from pav.verifier.calibrate import SURPRISE, surprise

if TYPE_CHECKING:  # imported where they are used: --help stays fast
    from torch import Tensor

    from pav.verifier.trunk import HeadedTrunk

TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Example:
    """A trace with its labels.

    Attributes:
        problem_id: the problem.
        ids: prompt and solution.
        prompt_length: tokens of the prompt.
        ends: step ends in the solution.
        positions_P: token positions that are scored.
        k_PH: right rollouts (fractions where a prefix stands in several traces).
        n_PH: rollouts; 0 where a head has no label.
        share_P1: 1 / traces that hold this prefix; k and n are the prefix's own times this.
    """

    problem_id: str
    ids: list[int]
    prompt_length: int
    ends: list[int]
    positions_P: np.ndarray
    k_PH: np.ndarray
    n_PH: np.ndarray
    share_P1: np.ndarray


def pav_examples(
    labels: LabelSet, split: str, heads: Sequence[str], policy: Policy, max_length: int
) -> list[Example]:
    """One example per distinct seed trace of ``split``; every labelled prefix counts once.

    The last step of a complete trace has a known outcome, which all heads learn. The label of a
    ``lik/`` head is the probability of the forced answer, as one "rollout" of which that share was
    right: BCE on such a soft target makes its logit one of a probability, as every head's is.
    """
    traces = {(t.problem_id, tuple(t.ids)): t for t in labels.traces if t.split == split}
    graded = labels.graded
    keys_of = {}
    seen: Counter[str] = Counter()
    for where, trace in traces.items():
        keys = [prefix_key(trace.problem_id, trace.ids[:end]) for end in (0, *trace.step_ends)]
        keys_of[where] = keys
        seen.update(keys)
    prompts: dict[str, list[int]] = {}
    examples = []
    for where, trace in traces.items():
        prompt = _prompt(prompts, policy, trace.problem_id, trace.question)
        ends = list(trace.step_ends)
        if not ends or len(prompt) + len(trace.ids) > max_length:
            continue
        k_PH = np.zeros((len(ends) + 1, len(heads)), dtype=np.float32)
        n_PH = np.zeros_like(k_PH)
        for p, key in enumerate(keys_of[where]):
            last = graded and p == len(ends) and not trace.truncated
            for h, head in enumerate(heads):
                k, n = 0.0, 0
                if last:
                    k, n = float(trace.correct), 1
                elif head.startswith(LIK):
                    logprob = labels.likelihoods.get((key, head.removeprefix(LIK)))
                    if logprob is not None:
                        k, n = math.exp(logprob), 1
                elif head != ORM:
                    k, n = labels.counts.get((key, head.removeprefix("q/")), (0, 0))
                k_PH[p, h], n_PH[p, h] = k / seen[key], n / seen[key]
        shares = [1 / seen[key] for key in keys_of[where]]
        examples.append(_example(trace.problem_id, prompt, trace.ids, ends, k_PH, n_PH, shares))
    return examples


def orm_examples(labels: LabelSet, split: str, policy: Policy, max_length: int) -> list[Example]:
    """Every graded completion that the label run paid for, labelled at its last position."""
    splits = {t.problem_id: (t.split, t.question) for t in labels.traces}
    solutions: dict[tuple[str, tuple[int, ...]], bool] = {}
    for t in labels.traces:
        if not t.truncated:
            solutions[t.problem_id, tuple(t.ids)] = t.correct
    for c in labels.completions:
        if c.ids and not c.truncated:  # an imported label has no rollout
            solutions[c.problem_id, (*c.prefix_ids, *c.ids)] = c.correct
    prompts: dict[str, list[int]] = {}
    examples = []
    for (problem_id, ids), correct in solutions.items():
        if splits[problem_id][0] != split:
            continue
        prompt = _prompt(prompts, policy, problem_id, splits[problem_id][1])
        if len(prompt) + len(ids) > max_length:
            continue
        ends = policy.stepper.step_ends(ids)
        if not ends:
            continue
        k_PH = np.zeros((len(ends) + 1, 1), dtype=np.float32)
        n_PH = np.zeros_like(k_PH)
        k_PH[-1, 0], n_PH[-1, 0] = float(correct), 1.0
        shares = [1.0] * len(k_PH)
        examples.append(_example(problem_id, prompt, list(ids), ends, k_PH, n_PH, shares))
    return examples


def _prompt(
    cache: dict[str, list[int]], policy: Policy, problem_id: str, question: str
) -> list[int]:
    if problem_id not in cache:
        cache[problem_id] = policy.encode(Problem(problem_id, question))
    return cache[problem_id]


def _example(
    problem_id: str,
    prompt: list[int],
    ids: Sequence[int],
    ends: list[int],
    k_PH: np.ndarray,
    n_PH: np.ndarray,
    shares: Sequence[float],
) -> Example:
    positions = np.array([scoring_position(len(prompt), end) for end in (0, *ends)])
    share_P1 = np.array(shares, dtype=np.float32)[:, None]
    return Example(problem_id, [*prompt, *ids], len(prompt), ends, positions, k_PH, n_PH, share_P1)


def hardened(examples: Sequence[Example]) -> list[Example]:
    """The examples with hard labels: 1 where any rollout was right, else 0; a prefix counts once.

    Source: Math-Shepherd's hard estimation (arXiv 2312.08935, section 3.3).
    """
    return [
        replace(
            e,
            k_PH=np.where(e.k_PH > 0, e.share_P1, np.float32(0)),
            n_PH=np.where(e.n_PH > 0, e.share_P1, np.float32(0)),
        )
        for e in examples
    ]


def batches(
    examples: Sequence[Example],
    seed: int | None,
    tokens: int = TOKENS_PER_BATCH,
    max_waste: float = 1.0,
) -> Iterator[list[Example]]:
    """Batches of similar length; with a seed, traces of one length are mixed and batches shuffled.

    Args:
        examples: traces.
        seed: of the order; None for batches by length.
        tokens: upper limit of a padded batch (a longer trace is a batch of its own).
        max_waste: upper limit of the share of padding in a batch.
    """
    mixed = list(examples)
    rng = random.Random(seed)
    if seed is not None:
        rng.shuffle(mixed)
    ordered = sorted(mixed, key=lambda e: len(e.ids))
    out: list[list[Example]] = [[]]
    real = 0
    for example in ordered:
        length = len(example.ids)
        padded = (len(out[-1]) + 1) * length
        if out[-1] and (padded > tokens or padded - real - length > max_waste * padded):
            out.append([])
            real = 0
        out[-1].append(example)
        real += length
    if seed is not None:
        rng.shuffle(out)
    return (batch for batch in out if batch)


def padding_waste(parts: Sequence[Sequence[Example]]) -> float:
    """Share of padding among all tokens of ``parts``, from 0 to 1."""
    padded = sum(len(part) * max(len(e.ids) for e in part) for part in parts if part)
    return 1 - sum(len(e.ids) for part in parts for e in part) / max(1, padded)


def pad(batch: Sequence[Example]) -> Tensor:
    """Right-padded ids (B, T)."""
    import torch

    ids = torch.zeros(len(batch), max(len(e.ids) for e in batch), dtype=torch.long)
    for row, example in zip(ids, batch, strict=True):
        row[: len(example.ids)] = torch.tensor(example.ids)
    return ids


@dataclass(frozen=True)
class Scored:
    """What a verifier's forward pass says of examples, flattened over positions.

    Attributes:
        hidden_ND: hidden states at the scored positions.
        logits_NH: head logits there.
        surprise_NF: surprise features.
        k_NH, n_NH: counts.
        example_N: which example a row belongs to.
        step_N: which step (0 is the problem).
    """

    hidden_ND: Tensor
    logits_NH: np.ndarray
    surprise_NF: np.ndarray
    k_NH: np.ndarray
    n_NH: np.ndarray
    example_N: np.ndarray
    step_N: np.ndarray


def score(
    model: HeadedTrunk,
    examples: Sequence[Example],
    policy: Policy,
    what: str,
    labelled_only: bool = False,
    with_surprise: bool = True,
) -> Scored:
    """One forward pass over each example scores all its prefixes.

    Args:
        model: trunk and heads.
        examples: traces.
        policy: its stepper finds result parts.
        what: named in the progress line.
        labelled_only: keep only positions that carry a label.
        with_surprise: also compute the surprise features (else zeros).

    Raises:
        UserError: if a score is not finite.
    """
    import torch

    with torch.inference_mode():
        return _score(model, examples, policy, what, labelled_only, with_surprise)


def _score(
    model: HeadedTrunk,
    examples: Sequence[Example],
    policy: Policy,
    what: str,
    labelled_only: bool,
    with_surprise: bool,
) -> Scored:
    import torch

    model.eval()
    device = next(model.parameters()).device
    number = {id(e): i for i, e in enumerate(examples)}
    parts: list[tuple[Tensor, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    done = 0
    with Reporter(what, len(examples), "traces") as reporter:
        for batch in batches(examples, None):
            ids = pad(batch).to(device)
            hidden = model.hidden(ids)
            # A real vocabulary makes the softmax dear: only solutions need it, not prompts.
            skip = min(e.prompt_length for e in batch) - 1
            logprobs = None
            if with_surprise:
                logprobs = model.token_logprobs(hidden[:, skip:], ids[:, skip:]).cpu().numpy()
            rows = np.concatenate([np.full(len(e.positions_P), i) for i, e in enumerate(batch)])
            columns = np.concatenate([e.positions_P for e in batch])
            at = hidden[torch.as_tensor(rows), torch.as_tensor(columns)].float().cpu()
            features = np.zeros((len(rows), len(SURPRISE)), dtype=np.float32)
            if logprobs is not None:
                features = np.concatenate(
                    [
                        surprise(
                            lp[e.prompt_length - 1 - skip : len(e.ids) - 1 - skip],
                            e.ids[e.prompt_length :],
                            e.ends,
                            policy.stepper,
                        )
                        for lp, e in zip(logprobs, batch, strict=True)
                    ]
                )
            owner = np.concatenate([np.full(len(e.positions_P), number[id(e)]) for e in batch])
            step = np.concatenate([np.arange(len(e.positions_P)) for e in batch])
            counts = np.concatenate([np.stack([e.k_PH, e.n_PH]) for e in batch], axis=1)
            keep = counts[1].sum(-1) > 0 if labelled_only else np.ones(len(rows), dtype=bool)
            parts.append(
                (
                    at[torch.as_tensor(keep)],
                    features[keep],
                    counts[:, keep],
                    owner[keep],
                    step[keep],
                )
            )
            done += len(batch)
            reporter.update(done)
    hidden_ND = torch.cat([p[0] for p in parts])
    logits = model.head_logits(hidden_ND.to(device)).cpu().numpy()
    if wrong := np.argwhere(~np.isfinite(logits)).tolist():
        raise UserError(
            f"head {wrong[0][1]} gives {logits[tuple(wrong[0])]} ({len(wrong)} of {logits.size} "
            "scores are not finite): the trunk's weights are damaged, training diverged (lower lr) "
            "or the dtype is too narrow"
        )
    counts = np.concatenate([p[2] for p in parts], axis=1)
    return Scored(
        hidden_ND,
        logits,
        np.concatenate([p[1] for p in parts]),
        counts[0],
        counts[1],
        np.concatenate([p[3] for p in parts]),
        np.concatenate([p[4] for p in parts]),
    )


def balance(examples: Sequence[Example]) -> np.ndarray:
    """Weights (2, H) of labels with Q < 0.5 and Q >= 0.5 that give both classes the same mass.

    The paper samples the two classes equally often; weighting is the same in expectation.
    """
    k = np.concatenate([e.k_PH for e in examples])
    n = np.concatenate([e.n_PH for e in examples])
    high = (k >= 0.5 * n) & (n > 0)
    mass = np.stack([np.where(high, 0, n).sum(0), np.where(high, n, 0).sum(0)])
    return np.where(mass > 0, mass.sum(0) / (2 * np.maximum(mass, 1e-9)), 1.0).astype(np.float32)
