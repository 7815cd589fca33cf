"""How third-party reward models read a solution: as text, each in its layout.

| layout | made for | reads | scores a step at |
|---|---|---|---|
| ``sequence`` | ``...ForSequenceClassification`` | chat, or question and solution | the end |
| ``token`` | ``...ForTokenClassification`` of TRL | question, steps, separators | its separator |
| ``qwen`` | ``Qwen2ForProcessRewardModel`` | chat, steps, ``<extra_0>`` | its ``<extra_0>`` |
| ``shepherd`` | Math-Shepherd, a causal LM | ``Step i: ... ки`` | its ``ки`` |
| ``progress`` | a policy of pav.rl | the policy's own tokens | its end |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pav.core.errors import UserError
from pav.policy.policy import CLOCK, STARTED, Dtype, load_tokenizer

Layout = Literal["auto", "sequence", "token", "qwen", "shepherd", "progress"]
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
MARK = "<extra_0>"
SOLUTION = "@@SOLUTION@@"


@dataclass(frozen=True)
class RewardModelConfig:
    """A third-party reward model.

    Args:
        model: transformers directory or hub id.
        layout: how it reads steps; ``auto`` goes by the architecture, which does not tell
            ``shepherd`` from any other language model, nor ``progress`` (a policy that pav.rl
            trained, against its start).
        separator: what ends a step in layout ``token``; the one it was trained with.
        dtype: of weights and activations.
        batch: texts per forward pass.
    """

    model: str
    layout: Layout = "auto"
    separator: str = "\n"
    dtype: Dtype = "float32"
    batch: int = 16

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"orm.batch is {self.batch}; give at least 1")
        if not self.separator:
            raise UserError("orm.separator is empty; give the text that ended steps in training")


@dataclass(frozen=True)
class Text:
    """A solution as the model reads it: ids, and the positions where its steps are scored.

    ``start`` is the position of the problem's last token, which layout ``progress`` counts from.
    """

    question: str
    steps: tuple[str, ...]
    ids: list[int]
    positions: list[int]
    start: int = 0


class Reader:
    """A reward model's tokenizer and layout."""

    def __init__(self, config: RewardModelConfig, layout: Layout) -> None:
        self.layout = layout
        self.separator = config.separator
        self.tokenizer: Any = load_tokenizer(config.model)
        self.mark: list[int] = []
        if layout == "qwen":
            self.mark = self.tokenizer.convert_tokens_to_ids([MARK])
            if self.mark[0] in (None, self.tokenizer.unk_token_id):
                raise UserError(
                    f"the tokenizer of {config.model!r} has no token {MARK}, which layout qwen "
                    "needs; choose another orm.layout"
                )

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text; what looks like a special token in it is text, too."""
        return list(
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )

    def _whole(self, text: str) -> Any:
        """Encoding of a whole text, with the special tokens that the tokenizer itself adds."""
        return self.tokenizer(text, split_special_tokens=True)

    def _around(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Ids before and after the solution in the chat template; no second BOS."""
        text = self.tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": SOLUTION}],
            tokenize=False,
            **{CLOCK: STARTED.strftime},
        )
        before, _, after = text.partition(SOLUTION)
        return self._ids(before), self._ids(after)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, question: str, steps: tuple[str, ...]) -> Text:
        """A question and the steps of its solution as ids, with where each step is scored."""
        ids: list[int]
        positions: list[int] = []
        if self.layout == "sequence":
            whole = "\n".join(steps)
            if self.tokenizer.chat_template:
                before, after = self._around([{"role": "user", "content": question}])
                ids = [*before, *self.encode(whole), *after]
            else:
                ids = list(self._whole(f"{question}\n{whole}")["input_ids"])
            positions = [len(ids) - 1]
        elif self.layout == "shepherd":
            text = question
            marks = []
            for i, step in enumerate(steps, 1):
                named = step if step.startswith(f"Step {i}:") else f"Step {i}: {step}"
                text += f"{' ' if i == 1 else chr(10)}{named} ки"
                marks.append(len(text) - 1)
            encoding = self._whole(text)
            ids = list(encoding["input_ids"])
            positions = [encoding.char_to_token(mark) for mark in marks]
        else:
            if self.layout == "qwen":
                ids, after = self._around(
                    [
                        {"role": "system", "content": QWEN_SYSTEM},
                        {"role": "user", "content": question},
                    ]
                )
                separator = self.mark
            else:
                bos = self.tokenizer.bos_token_id
                ids, after = [*([] if bos is None else [bos]), *self.encode(question)], []
                # A separator is encoded on its own, as in TRL's training: "." and "\n" stay two.
                separator = self.encode(self.separator)
            for step in steps:
                ids = [*ids, *self.encode(step), *separator]
                positions.append(len(ids) - 1)
            ids += after
        return Text(question, steps, ids, positions)
