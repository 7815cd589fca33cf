"""Implicit progress: what RL made of a policy says which steps it came to prefer.

The log-probability of a step under the policy that ``pav.rl`` trained, less that under its start,
is a reward that needs no labels and no heads. Sources: PRIME (arXiv 2502.01456), progress advantage
(arXiv 2606.26080).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pav.core.errors import UserError
from pav.core.files import read_object
from pav.policy.policy import Policy, load_tokenizer, model_path, tokenizer_fingerprint
from pav.reward_models.text import Text
from pav.tasks.base import Problem
from pav.verifier.trunk import load_trunk, refuse_unservable

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
        self.trained = load_trunk(model_path(model), dtype)
        self.start = load_trunk(model_path(start_of(model)), dtype)
        self.config = self.trained.config
        refuse_unservable(self.config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Sum (B, T) of log-probability ratios of all tokens up to each, of right-padded ids."""
        ratio = logprobs(self.trained, input_ids) - logprobs(self.start, input_ids)
        ratio = ratio.cumsum(-1)
        return torch.cat([torch.zeros_like(ratio[:, :1]), ratio], dim=-1)


def logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probability (B, T - 1) of ``ids[:, 1:]``, at temperature 1."""
    config: Any = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    embedding = model.get_output_embeddings()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    rows = []
    # Logits over a real vocabulary are large: a text at a time.
    for hidden_TD, next_T in zip(hidden, ids[:, 1:], strict=True):
        logits = embedding(hidden_TD).float()
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        rows.append(logits.gather(-1, next_T[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.stack(rows)
