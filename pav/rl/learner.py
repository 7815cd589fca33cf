"""What is trained: the policy, and a value head on it where the estimator asks for one.

Axes: B traces, T tokens of prompt and solution (right-padded), D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pav.rl.loss import token_logprobs
from pav.rl.processes import whole
from pav.verifier.lora import Lora, add_adapters, merged
from pav.verifier.trunk import load_trunk, refuse_unservable

# Logits over a real vocabulary are made this many bytes at a time.
LOGIT_BYTES = 1 << 29


class Said(NamedTuple):
    """What the policy says of the tokens ``ids[:, first + 1:]``; each field is (B, T - first - 1).

    Attributes:
        logprob: log-probability of each at the training temperature.
        entropy: exact entropy of the distribution that it was drawn from, in nats.
        value: what the value head expected before it; 0 without one.
    """

    logprob: Tensor
    entropy: Tensor
    value: Tensor


class Learner(nn.Module):
    """The policy in training.

    Args:
        path: a transformers directory.
        temperature: at which it samples.
        with_value: whether it has a value head.
        lora: adapters, which alone are trained then; None trains all weights.
        gradient_checkpointing: recompute activations.
    """

    def __init__(
        self,
        path: str,
        temperature: float,
        with_value: bool,
        lora: Lora | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.policy = load_trunk(path)
        config: Any = self.policy.config.get_text_config()
        refuse_unservable(self.policy.config)
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.temperature, self.lora = temperature, lora
        if gradient_checkpointing:
            self.policy.gradient_checkpointing_enable()
            if lora is not None:  # else no gradient would reach the first adapter
                self.policy.enable_input_require_grads()
        if lora is not None:
            for parameter in self.policy.parameters():
                parameter.requires_grad_(False)
            add_adapters(self.policy, lora)
        self.value = nn.Linear(config.hidden_size, 1) if with_value else None
        if self.value is not None:
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)

    def forward(self, ids: Tensor, first: int) -> Said:
        """Read ids (B, T); ``first``: tokens up to this index are prompt in every row."""
        # Causal attention: right padding cannot reach a real token, so no mask is needed.
        decoder = self.policy.get_decoder()
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, first:]
        tokens = ids[:, first:]
        size = 4 * self.policy.get_output_embeddings().weight.shape[0] * max(1, hidden.shape[1])
        rows = max(1, LOGIT_BYTES // size)
        parts = [
            # A slice's logits are made again in the backward pass, where there are several.
            self._read(h, t)
            if rows >= len(ids)
            else checkpoint(self._read, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(rows), tokens.split(rows), strict=True)
        ]
        logprob = torch.cat([p[0] for p in parts])
        entropy = torch.cat([p[1] for p in parts])
        if self.value is None:
            return Said(logprob, entropy, torch.zeros_like(logprob))
        # Detached: the value is a baseline, and must not bend the policy.
        value = self.value(hidden[:, :-1].detach().to(self.value.weight.dtype))[..., 0]
        return Said(logprob, entropy, value)

    def _read(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(self._logits(hidden), ids, self.temperature)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.policy.get_output_embeddings()(hidden).float()
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def read(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Log-probability (...,) of the tokens ``ids`` after the last hidden states (..., D)."""
        logits = self._logits(hidden) / self.temperature
        return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained, by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def served(self) -> dict[str, Tensor]:
        """The policy's weights by their names in a transformers directory, adapters merged.

        All processes ask together.
        """
        state = {k: whole(v) for k, v in self.policy.state_dict().items()}
        if self.lora is None:
            return state
        plain = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
        adapters = {k.replace(".default.", "."): v for k, v in state.items() if ".lora_" in k}
        scale = {"alpha": self.lora.alpha, "rank": self.lora.rank}
        for key in adapters:
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                weight = plain[f"{name}.weight"]
                plain[f"{name}.weight"] = merged(weight, adapters, name, scale).to(weight.dtype)
        return plain


class Reference:
    """The start, which the KL divergence is from: adapters off, or a frozen copy.

    Args:
        learner: before its first update.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.copy = None
        if learner.lora is None:
            self.copy = copy.deepcopy(learner).requires_grad_(False).eval()

    @torch.no_grad()
    def logprob(self, ids: Tensor, first: int) -> Tensor:
        """As :attr:`Said.logprob`."""
        if self.copy is not None:
            found: Said = self.copy.to(ids.device)(ids, first)
            return found.logprob
        with _adapters_off(self.learner):
            return self.learner(ids, first).logprob


@contextmanager
def _adapters_off(learner: Learner) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in learner.policy.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
