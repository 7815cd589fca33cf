"""Trunk and heads: a causal LM whose last hidden states are read by linear rows.

A head is a row that stock vLLM can serve as a score token (``pav/export/vllm.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pav.core.errors import UserError
from pav.policy.inference import SCORE_SCALE

# Logits over a real vocabulary are made this many bytes at a time.
_LOGIT_BYTES = 1 << 29


class HeadedTrunk(nn.Module):
    """Trunk and heads. Shapes: B sequences, T tokens, D hidden size, H heads."""

    def __init__(self, trunk: PreTrainedModel, heads: int) -> None:
        super().__init__()
        self.trunk = trunk
        config = trunk.config
        refuse_unservable(config)
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.heads = heads
        self.head = nn.Linear(config.hidden_size, heads)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, row_N: Tensor, column_N: Tensor) -> Tensor:
        """Head logits (N, H) at the positions (row, column) of right-padded ids (B, T)."""
        return self.head_logits(self.hidden(ids)[row_N, column_N])

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states (B, T, D) of right-padded ids (B, T)."""
        # Causal attention: right padding cannot reach a real token, so no mask is needed.
        states: Tensor = self.trunk.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Head logits (..., H) of hidden states (..., D), exactly as served."""
        return self.row_logits(hidden) * SCORE_SCALE + self.head.bias

    def row_logits(self, hidden: Tensor) -> Tensor:
        """What the appended rows of the output embedding say, soft-capped as the model's logits."""
        rows = nn.functional.linear(hidden, self.head.weight.to(hidden.dtype) / SCORE_SCALE)
        return self._capped(rows).float()

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def token_logprobs(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Log-probability (B, T-1) of ids[:, 1:] in the served softmax (score rows included)."""
        vocabulary = self.trunk.config.vocab_size
        rows = max(1, _LOGIT_BYTES // (4 * vocabulary * max(1, hidden.shape[1])))
        parts = zip(hidden[:, :-1].split(rows), ids[:, 1:].split(rows), strict=True)
        return torch.cat([self._chosen(h, i) for h, i in parts])

    def _chosen(self, hidden: Tensor, ids: Tensor) -> Tensor:
        logits = self._capped(self.trunk.get_output_embeddings()(hidden)).float()
        rows = self.row_logits(hidden)
        reference = torch.zeros_like(rows[..., :1])
        normaliser = torch.logsumexp(torch.cat([logits, rows, reference], dim=-1), dim=-1)
        return logits.gather(-1, ids[..., None])[..., 0] - normaliser


def refuse_unservable(config: Any) -> None:
    """Raise where stock vLLM would not serve the rows that were trained."""
    if config.model_type == "gemma2" and not config.tie_word_embeddings:
        raise UserError(
            "trunk is a Gemma 2 with untied embeddings; vLLM always ties Gemma 2, so its scores "
            "would differ: use a tied Gemma 2 or another trunk"
        )
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(
                f"trunk {config.model_type!r} scales its logits ({name}="
                f"{getattr(config, name)}); such trunks are not supported: use Llama, Qwen or Gemma"
            )


def load_trunk(path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal LM at ``path``; code that lies there is never run."""
    try:
        trunk: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the trunk {path!r}: {reason}") from error
    if getattr(trunk.config, "attn_logit_softcapping", None):
        # The default (SDPA) leaves out Gemma 2's soft cap on attention without a word; vLLM has it.
        trunk.set_attn_implementation("eager")
    return trunk
