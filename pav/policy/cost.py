"""What a search costs: tokens by kind, and forward FLOPs from a model's config.

A multiply-add is two FLOPs. A forward pass costs, per token, 2 for every weight of a matrix outside
the embeddings; per token and token of its context 4 * heads * head size in every layer (queries by
keys, attention by values); and per position whose logits are asked for, 2 * hidden size for every
entry of the vocabulary. Norms, activations and rotations are left out, as is usual.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pav.policy.inference import Read, Sampled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Cost:
    """What one problem cost. All counts are of tokens unless they say otherwise.

    Attributes:
        policy_tokens: sampled tokens, those of merged, truncated and pruned candidates included.
        policy_requests: continuations asked for; the last token of each is not computed.
        policy_prefilled: prompt and prefix tokens that the policy's engine computed.
        policy_cached: prompt and prefix tokens that it took from its prefix cache.
        policy_context: sum, over all tokens that the policy computed, of the tokens attended to.
        verifier_tokens: tokens that a verifier engine computed (0 when fused).
        verifier_cached: tokens it took from its prefix cache.
        verifier_context: as ``policy_context``.
        verifier_logits: positions whose logits the verifier engine computed.
    """

    policy_tokens: int = 0
    policy_requests: int = 0
    policy_prefilled: int = 0
    policy_cached: int = 0
    policy_context: int = 0
    verifier_tokens: int = 0
    verifier_cached: int = 0
    verifier_context: int = 0
    verifier_logits: int = 0

    def sampled(self, out: Sampled) -> None:
        """Charge a sampled continuation."""
        self.policy_tokens += len(out.ids)
        self.policy_requests += 1
        self.policy_prefilled += out.prefilled
        self.policy_cached += out.cached
        # The last sampled token is never fed back.
        self.policy_context += context_of(out.cached, out.prefilled + len(out.ids) - 1)

    def read(self, out: Read) -> None:
        """Charge a reading by a verifier's own engine."""
        self.verifier_tokens += out.computed
        self.verifier_cached += out.cached
        self.verifier_context += context_of(out.cached, out.computed)
        self.verifier_logits += 1 if out.logprobs is None else out.computed
        for gap in out.gaps:
            self.read(gap)


def context_of(start: int, tokens: int) -> int:
    """Tokens attended to, its own among them, summed over ``tokens`` tokens after ``start``."""
    return tokens * start + tokens * (tokens + 1) // 2


@dataclass(frozen=True)
class Shape:
    """What a model's forward FLOPs depend on.

    Attributes:
        weights: weights of matrices outside the embeddings (every expert of a mixture).
        attention: layers * heads * head size. Sliding windows are taken as longer than the text.
        hidden: hidden size.
        vocabulary: rows of the output embedding, score rows excluded.
    """

    weights: int
    attention: int
    hidden: int
    vocabulary: int


@lru_cache
def shape_of(model: str) -> Shape:
    """Shape of the causal LM at ``model`` (directory or hub id); its weights are not read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    with torch.device("meta"):
        return skeleton_shape(AutoModelForCausalLM.from_config(config))


def skeleton_shape(skeleton: PreTrainedModel) -> Shape:
    """Shape of a model, which may be on the device ``meta``."""
    embeddings = {
        id(m.weight)
        for m in (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
        if m is not None
    }
    text = skeleton.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        sum(p.numel() for p in skeleton.parameters() if p.ndim > 1 and id(p) not in embeddings),
        text.num_hidden_layers * text.num_attention_heads * head,
        text.hidden_size,
        text.vocab_size,
    )


def forward_flops(shape: Shape, tokens: float, context: float, logits: float) -> float:
    """FLOPs of a forward pass.

    Args:
        shape: the model.
        tokens: tokens computed.
        context: tokens attended to, summed over them (:func:`context_of`).
        logits: positions whose logits are computed.
    """
    body = 2 * shape.weights * tokens + 4 * shape.attention * context
    return body + rows_flops(shape, shape.vocabulary, logits)


def rows_flops(shape: Shape, rows: int, positions: float) -> float:
    """FLOPs of ``rows`` rows of the output embedding at ``positions``: what fused heads cost."""
    return 2.0 * shape.hidden * rows * positions
