"""How likely a model finds the reference answer at every step of a solution.

At a step boundary the task's forced answer is appended (``A20`` and EOS, ``#### 18`` and EOS), and
its log-probability given prompt and steps is read. All boundaries of a solution are read in one
forward pass over a packed sequence: the solution, then one copy of the answer per boundary. A copy
sees the solution up to its boundary and itself, at the positions that it would have there.

Axes: L tokens of prompt and solution, B boundaries, A tokens of the answer, T = L + B * A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pav.core.errors import UserError
from pav.policy.encoding import encode_after_step, eos_id
from pav.policy.policy import Policy
from pav.tasks.base import Problem, Task

# Answer tokens of one pass: attention grows with their square.
TOKENS = 2048
TOLERANCE = 1e-3
Scorer = Callable[[PreTrainedModel, list[int], Sequence[int], list[int]], NDArray[np.float64]]


def answer_ids(task: Task, policy: Policy, problem: Problem) -> list[int]:
    """The task's forced answer and EOS as token ids.

    Raises:
        UserError: if the problem has no reference answer, or the tokenizer changes its text.
    """
    text = task.forced_answer(problem) if problem.gold is not None else ""
    if not text:
        raise UserError(
            f"problem {problem.id} has no reference answer; likelihoods need one for every problem"
        )
    ids = encode_after_step(policy, text)
    if policy.text(ids) != text:
        raise UserError(
            f"the tokenizer of {policy.config.model!r} turns the forced answer {text[:60]!r} into "
            f"{policy.text(ids)[:60]!r}; change forced_answer of the task"
        )
    return [*ids, eos_id(policy)]


def packed(
    model: PreTrainedModel, ids: list[int], cuts: Sequence[int], answer: list[int]
) -> NDArray[np.float64]:
    """Log-probability (B,) of ``answer`` after each of the first ``cuts`` tokens of ``ids``."""
    size = max(1, TOKENS // len(answer))
    parts = [cuts[i : i + size] for i in range(0, len(cuts), size)]
    return np.concatenate([_packed(model, ids, part, answer) for part in parts])


class Packed(NamedTuple):
    """A solution and copies of an answer in one sequence.

    Attributes:
        ids_T: tokens.
        position_T: at which each of them stands.
        sees_TT: whether a token (row) looks at another (column).
        from_BA: index of the token that predicts each token of each copy.
    """

    ids_T: Tensor
    position_T: Tensor
    sees_TT: Tensor
    from_BA: Tensor


def pack(ids: list[int], cuts: Sequence[int], answer: list[int]) -> Packed:
    """One sequence of the longest prefix and a copy of ``answer`` for each cut of it."""
    length, copies, width = max(cuts), len(cuts), len(answer)
    cut_B = torch.tensor(cuts)
    answer_BA = torch.tensor(answer).expand(copies, width)
    ids_T = torch.cat([torch.tensor(ids[:length]), answer_BA.flatten()])
    # Copy 0 is the solution itself.
    copy_T = torch.cat([torch.zeros(length, dtype=torch.long),
                        torch.arange(1, copies + 1).repeat_interleave(width)])  # fmt: skip
    position_T = torch.cat([torch.arange(length),
                            (cut_B[:, None] + torch.arange(width)).flatten()])  # fmt: skip
    start_T = torch.cat([torch.full((length,), length), cut_B.repeat_interleave(width)])
    in_solution_T = copy_T == 0
    sees_TT = position_T[:, None] >= position_T[None, :]
    sees_TT &= (in_solution_T[None, :] & (position_T[None, :] < start_T[:, None])) | (
        copy_T[:, None] == copy_T[None, :]
    )
    # The token before the answer predicts its first one.
    first_B = cut_B - 1
    rest_BA = length + torch.arange(copies * width).reshape(copies, width)[:, :-1]
    return Packed(ids_T, position_T, sees_TT, torch.cat([first_B[:, None], rest_BA], dim=1))


@torch.inference_mode()
def _packed(
    model: PreTrainedModel, ids: list[int], cuts: Sequence[int], answer: list[int]
) -> NDArray[np.float64]:
    ids_T, position_T, sees_TT, from_BA = pack(ids, cuts, answer)
    device = model.device
    logits = model(
        input_ids=ids_T[None].to(device),
        attention_mask=masks(model, sees_TT[None], position_T[None]),
        position_ids=position_T[None].to(device),
        use_cache=False,
        logits_to_keep=from_BA.flatten().to(device),
    ).logits[0]
    answer_BA = torch.tensor(answer).expand(len(cuts), len(answer))
    return _sums(logits.reshape(*from_BA.shape, -1), answer_BA)


def masks(model: PreTrainedModel, sees_NTT: Tensor, position_NT: Tensor) -> Any:
    """The mask as attention adds it; one per kind of layer where some look only so far back.

    Args:
        model: what attends.
        sees_NTT: whether a token (row) looks at another (column), of N sequences.
        position_NT: at which each token stands.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    lowest = torch.finfo(model.dtype).min

    def additive(mask_NTT: Tensor) -> Tensor:
        mask = torch.zeros(mask_NTT.shape, dtype=model.dtype).masked_fill(~mask_NTT, lowest)
        return mask[:, None].to(model.device)

    if "sliding_attention" not in kinds:
        return additive(sees_NTT)
    distance_NTT = position_NT[:, :, None] - position_NT[:, None, :]
    near_NTT = distance_NTT < model.config.sliding_window
    return {
        "full_attention": additive(sees_NTT),
        "sliding_attention": additive(sees_NTT & near_NTT),
    }


@torch.inference_mode()
def one_by_one(
    model: PreTrainedModel, ids: list[int], cuts: Sequence[int], answer: list[int]
) -> NDArray[np.float64]:
    """The same by one plain forward pass per boundary."""
    found = []
    for cut in cuts:
        whole = torch.tensor([ids[:cut] + answer], device=model.device)
        logits = model(input_ids=whole, use_cache=False).logits[:, cut - 1 : -1]
        found.append(_sums(logits, torch.tensor([answer]))[0])
    return np.array(found)


def _sums(logits_BAV: Tensor, answer_BA: Tensor) -> NDArray[np.float64]:
    logprobs = logits_BAV.float().log_softmax(dim=-1).cpu()
    picked = logprobs.gather(2, answer_BA[:, :, None])[:, :, 0]
    return np.asarray(picked.double().sum(dim=1).numpy())


def scorer_for(
    model: PreTrainedModel, ids: list[int], cuts: Sequence[int], answer: list[int]
) -> Scorer:
    """:func:`packed` where it equals :func:`one_by_one` on this solution, else the latter.

    Attention that depends on more than who sees whom at which distance (chunks, states that are
    handed on) cannot be packed.
    """
    try:
        fast = packed(model, ids, cuts, answer)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError):
        return one_by_one
    slow = one_by_one(model, ids, cuts, answer)
    # Half-precision rounds differently in other shapes; a wrong mask is wrong by far more.
    tolerance = TOLERANCE if model.dtype == torch.float32 else 0.05
    return packed if np.allclose(fast, slow, rtol=tolerance, atol=tolerance) else one_by_one
