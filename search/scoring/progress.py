"""Implicit progress: what RL made of a policy says which steps it came to prefer.

The log-probability of a step under the policy that ``pav.rl`` trained, less that under its start,
is a reward that needs no labels and no heads. Sources: PRIME (arXiv 2502.01456), progress advantage
(arXiv 2606.26080).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pav.core.errors import UserError
from pav.core.files import read_object
from pav.policy.policy import Policy, load_tokenizer, model_path, tokenizer_fingerprint
from pav.rl.learner import Learner
from pav.tasks.base import Problem
from search.scoring.text import Text

RUN = "rl.json"


def start_of(model: str) -> str:
    """The policy that the RL run of ``model`` started from.

    Raises:
        UserError: if ``model`` is no policy of an RL run.
    """
    file = Path(model).expanduser().resolve().parent / RUN
    if not file.is_file():
        raise UserError(
            f"reward_model.layout progress reads a policy that pav.rl trained, and there is no "
            f"{RUN} beside {model!r}; give e.g. runs/rl/best, or another layout"
        )
    found = read_object(file, "restore it").get("policy")
    if not isinstance(found, dict) or not isinstance(found.get("model"), str):
        raise UserError(f"{str(file)!r} names no policy that the run started from; restore it")
    return str(found["model"])


def check_tokenizers(model: str, policy: Policy) -> None:
    """Refuse a pair that reads other tokens than ``policy`` writes.

    Raises:
        UserError: naming the one that does.
    """
    for name in (model, start_of(model)):
        if tokenizer_fingerprint(load_tokenizer(model_path(name))) != tokenizer_fingerprint(
            policy.tokenizer
        ):
            raise UserError(
                f"{name!r} has another tokenizer than the policy {policy.config.model!r}, whose "
                "tokens layout progress reads; search with the policy that was trained"
            )


def tokens(policy: Policy, problem: Problem, ids: Sequence[int], ends: Sequence[int]) -> Text:
    """A solution as layout progress reads it: the policy's own tokens."""
    prompt = policy.encode(problem)
    steps = tuple(policy.text(ids[a:b]).strip() for a, b in zip([0, *ends], ends, strict=False))
    positions = [len(prompt) + end - 1 for end in ends]
    return Text(problem.question, steps, [*prompt, *ids[: ends[-1]]], positions, len(prompt) - 1)


class Progress(nn.Module):
    """A policy that RL trained, and its start."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.trained = Learner(model_path(model), 1.0, with_value=False).to(dtype)
        self.start = Learner(model_path(start_of(model)), 1.0, with_value=False).to(dtype)
        self.config = self.trained.policy.config

    def forward(self, input_ids: Tensor) -> Tensor:
        """Sum (B, T) of log-probability ratios of all tokens up to each, of right-padded ids."""
        ratio = self.trained(input_ids, 0).logprob - self.start(input_ids, 0).logprob
        ratio = ratio.cumsum(-1)
        return torch.cat([torch.zeros_like(ratio[:, :1]), ratio], dim=-1)
