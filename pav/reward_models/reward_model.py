"""Third-party reward models as scorers: read as text, by a tokenizer of their own, in batches.

:mod:`pav.reward_models.text` says which layouts there are. One label is squashed by a sigmoid; of
two the second is the good one.

Axes: S steps of a solution, P = S + 1 states (state 0 is the problem).
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
from numpy.typing import NDArray
from transformers import AutoConfig, PreTrainedModel

from pav.core.errors import UserError
from pav.core.heads import ORM
from pav.core.manifest import Rendering
from pav.engine.gpu_memory import Planned
from pav.policy.cost import Cost, Shape, skeleton_shape
from pav.policy.inference import Read
from pav.policy.policy import Policy, model_path, weights_digest
from pav.policy.rendered import of_ids, rendered
from pav.reward_models.loading import KINDS, chance, layout_of, load
from pav.reward_models.progress import check_tokenizers, start_of, tokens
from pav.reward_models.text import Reader, RewardModelConfig, Text
from pav.tasks.base import Problem
from pav.verifier.score import Pick, Values
from pav.verifier.scoring import NO_LOGPROBS, PrefixScore

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
        self.layout = layout_of(config)
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
        self._model = load(self.config, self.layout).to(self._device).eval()
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
            kind = KINDS[self.layout]
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
        """Its value after the last step.

        Raises:
            ValueError: if the text is longer than the model can read.
        """
        if not ends:
            return PrefixScore({self.head: self.nothing})
        steps = self._steps(ids, ends)
        if (found := self._known.get((problem.question, steps))) is not None:
            self._charge(cost, 0, found[1])
            return PrefixScore({self.head: found[0]})
        text = self._text(problem, steps, ids, ends)
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

    def states(
        self, solutions: Sequence[tuple[Problem, Sequence[int], Sequence[int]]]
    ) -> list[NDArray[np.float64]]:
        """(P,) value of every state of whole solutions, by one forward pass of each.

        Steps beyond what the model can read have the value of the last one that it reads.

        Args:
            solutions: problem, ids and step ends of each.

        Raises:
            UserError: if a score is not finite.
        """
        self.start()
        found = [np.full(len(ends) + 1, self.nothing) for _, _, ends in solutions]
        texts = [(value_P, self._fitted(self._text(problem, self._steps(ids, ends), ids, ends)))
                 for value_P, (problem, ids, ends) in zip(found, solutions, strict=True)
                 if ends]  # fmt: skip
        texts = sorted((pair for pair in texts if pair[1].positions), key=lambda p: len(p[1].ids))
        for at in range(0, len(texts), self._batch):
            batch = texts[at : at + self._batch]
            read = self._forward([text for _, text in batch])
            for (value_P, text), scores in zip(batch, read, strict=True):
                self._check(text, scores)
                value_P[1 : 1 + len(scores)] = scores
                value_P[1 + len(scores) :] = scores[-1]
        return found

    @property
    def nothing(self) -> float:
        """Value of the bare problem, which none of these models scores."""
        return 0.0 if self.layout == "progress" else NEUTRAL

    def _steps(self, ids: Sequence[int], ends: Sequence[int]) -> tuple[str, ...]:
        return tuple(self._policy.text(ids[a:b]).strip() for a, b in pairwise([0, *ends]))

    def _text(
        self, problem: Problem, steps: tuple[str, ...], ids: Sequence[int], ends: Sequence[int]
    ) -> Text:
        if self.layout == "progress":
            return tokens(self._policy, problem, ids, ends)
        return self._reader.text(problem.question, steps)

    def _fitted(self, text: Text) -> Text:
        """What the model can read of a text."""
        if self._limit is None or len(text.ids) <= self._limit:
            return text
        there = [p for p in text.positions if p < self._limit]
        return replace(text, ids=text.ids[: self._limit], positions=there)

    def _check(self, text: Text, scores: list[float]) -> None:
        if not all(map(math.isfinite, scores)):
            raise UserError(
                f"reward model {self.config.model!r} gives {scores} for a solution of "
                f"{len(text.steps)} steps: its weights are damaged, or reward_model.dtype "
                f"({self.config.dtype}) is too narrow for them"
            )

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
            self._check(text, scores)
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
            return [[p] for p in chance(logits_BL).tolist()]
        if self.layout == "shepherd":
            states = self._model.get_decoder()(
                input_ids=ids_BT, attention_mask=mask_BT
            ).last_hidden_state
            good, bad = self._model.get_output_embeddings().weight[self._signs]
            logits_BTL = states @ torch.stack([bad, good]).T
        else:
            logits_BTL = self._model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return [chance(logits_BTL[b, text.positions]).tolist() for b, text in enumerate(texts)]


# Of a worker: what crosses to it is what a reward model is made with.
_loaded: dict[RewardModelConfig, RewardModel] = {}


def _in_service(config: RewardModelConfig, policy: Policy) -> RewardModel:
    if config not in _loaded:
        _loaded[config] = RewardModel(config, policy)
    return _loaded[config]
