"""Third-party reward models as scorers: read as text, by a tokenizer of their own, in batches.

:mod:`search.scoring.text` says which layouts there are. One label is squashed by a sigmoid; of two
the second is the good one. Code that comes with a model is never run, and weights are read from
safetensors only.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Qwen2Model,
    Qwen2PreTrainedModel,
)
from transformers.modeling_outputs import TokenClassifierOutput

from pav.core.errors import UserError
from pav.core.heads import ORM
from pav.core.manifest import Rendering
from pav.engine.gpu_memory import Planned
from pav.policy.cost import Cost, Shape, skeleton_shape
from pav.policy.inference import Read
from pav.policy.policy import Policy, model_path, weights_digest
from pav.policy.rendered import of_ids, rendered
from pav.tasks.base import Problem
from pav.verifier.score import Pick, Values
from pav.verifier.scoring import NO_LOGPROBS, PrefixScore
from search.scoring.progress import Progress, check_tokenizers, start_of, tokens
from search.scoring.text import Layout, Reader, RewardModelConfig, Text

PRM = "prm"
# What step 0 is worth: these models do not score the problem itself. A constant changes no ranking
# among first steps.
NEUTRAL = 0.5


class RewardModel:
    """A reward model in service: scores steps, and is turned by ``drive`` like an engine.

    A score is kept until the next run, so that no text is read twice; a PRM's forward pass scores
    all steps of its text at once.

    It takes its weights when it is started, or first asked.

    Args:
        config: which model.
        policy: whose solutions are scored.
    """

    fused = False
    alpha = 0.0

    def __init__(self, config: RewardModelConfig, policy: Policy) -> None:
        self.config, self._policy = config, policy
        self.layout = _layout(config)
        if self.layout == "progress":
            check_tokenizers(config.model, policy)
        self._reader = Reader(config, self.layout)
        found = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
        self._limit = getattr(found, "max_position_embeddings", None)
        labels = getattr(found, "num_labels", 2)
        if self.layout in ("sequence", "token") and labels > 2:
            raise UserError(
                f"{config.model!r} has {labels} labels; a reward model has one, or a bad and a "
                "good one"
            )
        if self.layout == "shepherd":
            signs = self._reader.encode("+ -")
            if len(signs) != 2:
                raise UserError(
                    f"reward_model.layout shepherd reads the tokens + and -, which "
                    f"{config.model!r} spells in {len(signs)} tokens; choose another layout"
                )
            self._signs = signs
        self._known: dict[tuple[str, tuple[str, ...]], tuple[float, int]] = {}
        self._waiting: deque[tuple[Text, asyncio.Future[float]]] = deque()
        self._model: Any = None

    def start(self) -> None:
        """Take the weights, unless that is done.

        Raises:
            UserError: if they cannot be loaded, or some are missing.
        """
        if self._model is not None:
            return
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = _load(self.config, self.layout).to(self._device).eval()
        # Without a padding id transformers cannot tell where a padded text ends.
        self._batch = self.config.batch
        if self.layout == "sequence" and self._model.config.pad_token_id is None:
            self._batch = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return _in_service, (self.config, self._policy)

    @property
    def head(self) -> str:
        """Name of its value: ``orm`` for a whole solution, ``prm`` for a step."""
        return ORM if self.layout == "sequence" else PRM

    @property
    def heads(self) -> list[str]:
        """All that it gives values for."""
        return [self.head]

    @property
    def base_head(self) -> str:
        """Its value stands in for Q_base."""
        return self.head

    @property
    def prover_head(self) -> str:
        """Its value stands in for the prover's Q."""
        return self.head

    @property
    def pick(self) -> Pick:
        """Default final pick."""
        return "orm" if self.layout == "sequence" else "last"

    @property
    def digest(self) -> str:
        """Digest of its weights."""
        found = weights_digest(model_path(self.config.model))
        if self.layout != "progress":
            return found
        return f"{found}/{weights_digest(model_path(start_of(self.config.model)))}"

    @property
    def rendered(self) -> Rendering:
        """How it is asked about a probe solution: its chat template is part of its layout."""
        if self.layout == "progress":
            return rendered(self._policy)
        return of_ids([self._reader.text("1+1", ("1+1=2", "2")).ids], self._reader.tokenizer)

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(self.config.model, trust_remote_code=False)
        with torch.device("meta"):
            kind = _KINDS[self.layout]
            return kind(config) if self.layout == "qwen" else kind.from_config(config)

    @cached_property
    def shape(self) -> Shape:
        """What its forward FLOPs depend on. It has no output embedding, or uses two rows of it."""
        found = skeleton_shape(self._skeleton)
        return found if self.layout == "progress" else replace(found, vocabulary=0)

    @property
    def planned(self) -> Planned:
        """Its memory on a GPU beside vLLM."""
        size = 4 if self.config.dtype == "float32" else 2
        weights = size * sum(p.numel() for p in self._skeleton.parameters())
        weights *= 2 if self.layout == "progress" else 1
        return Planned(self.config.model, weights, 0)

    @property
    def described(self) -> dict[str, Any]:
        """Settings that belong in a record."""
        return {
            "scoring": "separate",
            "surprise": False,
            "trunk": self.config.model,
            "layout": self.layout,
        }

    def values(
        self, logits_H: np.ndarray, logprobs: np.ndarray, ids: Sequence[int], ends: Sequence[int]
    ) -> Values:
        """Never used: its scores are not fused."""
        raise RuntimeError("a third-party reward model has no fused scores")

    async def read(
        self,
        problem: Problem,
        ids: Sequence[int],
        ends: Sequence[int],
        cost: Cost,
        known: np.ndarray = NO_LOGPROBS,
    ) -> PrefixScore:
        """Its value after the last step; before the first 0 of progress, else :data:`NEUTRAL`.

        Raises:
            ValueError: if the text is longer than the model can read.
        """
        if not ends:
            return PrefixScore({self.head: 0.0 if self.layout == "progress" else NEUTRAL})
        steps = tuple(self._policy.text(ids[a:b]).strip() for a, b in pairwise([0, *ends]))
        if (found := self._known.get((problem.question, steps))) is not None:
            self._charge(cost, 0, found[1])
            return PrefixScore({self.head: found[0]})
        if self.layout == "progress":
            text = tokens(self._policy, problem, ids, ends)
        else:
            text = self._reader.text(problem.question, steps)
        if self._limit is not None and len(text.ids) > self._limit:
            raise ValueError(
                f"{len(text.ids)} tokens are more than the {self._limit} that "
                f"{self.config.model!r} reads"
            )
        self.start()
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, future))
        value = await future
        self._charge(cost, len(text.ids), 0)
        return PrefixScore({self.head: value})

    def _charge(self, cost: Cost, computed: int, cached: int) -> None:
        """Charge a reading; progress reads with two models, and makes logits of every token."""
        none = np.zeros(0, np.float32)
        for _ in range(2 if self.layout == "progress" else 1):
            cost.read(Read(none, none if self.layout == "progress" else None, computed, cached))

    @property
    def busy(self) -> bool:
        """Whether texts wait to be read."""
        return bool(self._waiting)

    def step(self) -> None:
        """Read one batch.

        Raises:
            UserError: if a score is not finite.
        """
        batch = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
        for (text, future), scores in zip(batch, self._forward([t for t, _ in batch]), strict=True):
            if not all(map(math.isfinite, scores)):
                raise UserError(
                    f"reward model {self.config.model!r} gives {scores} for a solution of "
                    f"{len(text.steps)} steps: its weights are damaged, or reward_model.dtype "
                    f"({self.config.dtype}) is too narrow for them"
                )
            first = len(text.steps) - len(scores) + 1
            for j, value in enumerate(scores, first):
                end = text.positions[j - first] + 1
                self._known[text.question, text.steps[:j]] = (value, end)
            if not future.done():
                future.set_result(scores[-1])

    def reset_prefix_cache(self) -> None:
        """Forget all scores, so that what a method costs does not depend on the one before."""
        self._known.clear()

    def shutdown(self) -> None:
        """Free the device."""
        if self._model is None:
            return
        self._model.to("meta")
        if self._device == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _forward(self, texts: list[Text]) -> list[list[float]]:
        """Scores of every text: of all its steps, or the one of a sequence classifier."""
        pad = self._model.config.pad_token_id or 0
        longest = max(len(t.ids) for t in texts)
        ids_BT = torch.full((len(texts), longest), pad, device=self._device)
        mask_BT = torch.zeros_like(ids_BT)
        for b, text in enumerate(texts):
            ids_BT[b, : len(text.ids)] = torch.tensor(text.ids)
            mask_BT[b, : len(text.ids)] = 1
        if self.layout == "progress":
            ratio_BT = self._model(ids_BT).double()
            return [
                (row_T[text.positions] - row_T[text.start]).tolist()
                for row_T, text in zip(ratio_BT, texts, strict=True)
            ]
        if self.layout == "sequence":
            logits_BL = self._model(input_ids=ids_BT, attention_mask=mask_BT).logits
            return [[p] for p in _chance(logits_BL).tolist()]
        if self.layout == "shepherd":
            states = self._model.get_decoder()(
                input_ids=ids_BT, attention_mask=mask_BT
            ).last_hidden_state
            good, bad = self._model.get_output_embeddings().weight[self._signs]
            logits_BTL = states @ torch.stack([bad, good]).T
        else:
            logits_BTL = self._model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return [_chance(logits_BTL[b, text.positions]).tolist() for b, text in enumerate(texts)]


# Of a worker: what crosses to it is what a reward model is made with.
_loaded: dict[RewardModelConfig, RewardModel] = {}


def _in_service(config: RewardModelConfig, policy: Policy) -> RewardModel:
    if config not in _loaded:
        _loaded[config] = RewardModel(config, policy)
    return _loaded[config]


class QwenPrm(Qwen2PreTrainedModel):
    """Qwen2.5-Math-PRM: a Qwen 2 with a head of two layers, whose own code is not run."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.ReLU(),
            nn.Linear(config.hidden_size, 2),
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TokenClassifierOutput:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return TokenClassifierOutput(logits=self.score(states))


_KINDS: dict[str, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "qwen": QwenPrm,
    "shepherd": AutoModelForCausalLM,
    "progress": AutoModelForCausalLM,
}


def _chance(logits: Tensor) -> Tensor:
    """Chance of the good label from logits (..., 1) or (..., 2); float64 saturates late."""
    wide = logits.double()
    return torch.sigmoid(wide[..., 0] if wide.shape[-1] == 1 else wide[..., 1] - wide[..., 0])


def _layout(config: RewardModelConfig) -> Layout:
    """The layout, from the architecture where it is not given."""
    if config.layout != "auto":
        return config.layout
    try:
        found = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read a reward model's config at {config.model!r}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    name = (found.architectures or ["none"])[0]
    if name.endswith("ForSequenceClassification"):
        return "sequence"
    if name.endswith("ForTokenClassification"):
        return "token"
    if name == "Qwen2ForProcessRewardModel":
        return "qwen"
    if name.endswith("ForCausalLM"):
        raise UserError(
            f"{config.model!r} is a language model ({name}), not a classifier; if it is a PRM in "
            "Math-Shepherd's manner, add --reward_model.layout shepherd; if pav.rl trained it, "
            "--reward_model.layout progress"
        )
    raise UserError(
        f"{config.model!r} has the architecture {name}, which is not known here (code that comes "
        "with a model is never run); give a sequence or token classifier, a Qwen2.5-Math-PRM, or "
        "a PRM in Math-Shepherd's manner"
    )


def _load(config: RewardModelConfig, layout: Layout) -> Any:
    if layout == "progress":
        return Progress(config.model, getattr(torch, config.dtype))
    trust = {} if layout == "qwen" else {"trust_remote_code": False}
    try:
        model, told = _KINDS[layout].from_pretrained(
            config.model,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **trust,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot load the reward model {config.model!r} in layout {layout}: "
            f"{(str(error).strip().splitlines() or ['?'])[0]}"
        ) from error
    # transformers makes up what a checkpoint lacks: a reward model with a random head.
    if told["missing_keys"]:
        raise UserError(
            f"{config.model!r} lacks the weights {', '.join(sorted(told['missing_keys'])[:3])} of "
            f"layout {layout}; choose another reward_model.layout or another model"
        )
    return model
