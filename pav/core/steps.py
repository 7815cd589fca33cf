"""Steps: where one ends, and the token position at which it is scored.

Everything here works on token ids of the *solution* (prompt excluded). A step ends at a token whose
text contains the delimiter, or at an end-of-sequence token. A delimiter with nothing but space
since the last boundary ends no step. A solution ends with an end-of-sequence token, or with a step
that gives the answer (``StepRule.final``). The **scoring position** of a step is the token before
its last one: the position whose next-token prediction is the delimiter (or EOS). For step 0, the
problem itself, it is the last prompt token. Training and serving both call
:func:`scoring_position`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from pav.core.errors import UserError

# How often one step may run on over blank lines before its candidate is discarded.
MAX_BLANK_RESUMES = 8


class Ending(Protocol):
    """Where sampling ends, other than at an end-of-sequence token."""

    @property
    def is_watching(self) -> bool:
        """Whether it ends anything; one that does not is never asked."""

    def is_solution(self, ids: Sequence[int]) -> bool:
        """Whether what was sampled so far ends here."""


@dataclass(frozen=True)
class StepRule:
    """How solutions are cut into steps.

    Args:
        delimiter: text that ends a step.
        min_tokens: a shorter step is merged into the next one.
        max_tokens: a longer step is cut there; None for no limit.
        score_cut: whether a cut step is scored (and searched on from) or counts as truncated.
        result: text that opens the result part of a step, read by the surprise features.
        final: regular expression; a step in which it is found ends the solution, as for a base
            model that goes on after its answer. Empty: only an end-of-sequence token does.
    """

    delimiter: str = "\n"
    min_tokens: int = 0
    max_tokens: int | None = None
    score_cut: bool = True
    result: str = "="
    final: str = ""

    def __post_init__(self) -> None:
        if not self.delimiter:
            raise UserError(
                "step_rule.delimiter is empty; give the text that ends a step, e.g. '\\n'"
            )
        if self.max_tokens is not None and self.max_tokens <= max(self.min_tokens, 1):
            raise UserError(
                f"step_rule.max_tokens is {self.max_tokens}; it must exceed min_tokens "
                f"({self.min_tokens}) and 1"
            )
        try:
            found = self.final and re.search(self.final, "")
        except re.error as error:
            raise UserError(
                f"step_rule.final {self.final!r} is no regular expression: {error}; mend it, or "
                "leave it out"
            ) from error
        if found:
            raise UserError(
                f"step_rule.final {self.final!r} is found in every text; write what only the step "
                "with the answer holds, e.g. 'Answer: *[0-9]'"
            )


@dataclass(frozen=True)
class Stepper:
    """A step rule compiled for one tokenizer.

    Attributes:
        rule: the rule.
        delimiter_ids: tokens whose text contains the delimiter.
        blank_ids: tokens whose text is white space only.
        result_ids: tokens whose text contains ``rule.result``.
        eos_ids: tokens that end the sequence.
        tokenizer: reads the steps where the rule has ``final``.
    """

    rule: StepRule
    delimiter_ids: frozenset[int]
    blank_ids: frozenset[int]
    result_ids: frozenset[int]
    eos_ids: frozenset[int]
    tokenizer: Any = None

    @property
    def stop_ids(self) -> list[int]:
        """What sampling of one step stops at."""
        return sorted(self.delimiter_ids | self.eos_ids)

    @property
    def is_watching(self) -> bool:
        """Whether a step can end a solution."""
        return bool(self.rule.final)

    def ends_step(self, step: Sequence[int]) -> bool:
        """Whether the tokens since the last boundary end a step with their last token."""
        if not step:
            return False
        longest = self.rule.max_tokens
        return self._is_whole(step) or (longest is not None and len(step) >= longest)

    def is_cut(self, step: Sequence[int]) -> bool:
        """Whether a step was ended by ``max_tokens`` alone."""
        return not self._is_whole(step)

    def is_final(self, step: Sequence[int]) -> bool:
        """Whether a step ends the solution."""
        if step[-1] in self.eos_ids or not self.rule.final or not self._is_whole(step):
            return step[-1] in self.eos_ids
        text = self.tokenizer.decode(list(step), skip_special_tokens=True)
        return re.search(self.rule.final, text) is not None

    def is_solution(self, ids: Sequence[int]) -> bool:
        """Whether ``ids``, from the end of a step on, end with the solution's last step."""
        if not ids or ids[-1] in self.eos_ids or ids[-1] not in self.delimiter_ids:
            return bool(ids) and ids[-1] in self.eos_ids
        # Asked at every line of a growing solution, of which earlier steps were not final.
        ends = [0, *self._boundaries(ids)]
        return ends[-1] == len(ids) and self.is_final(ids[ends[-2] :])

    def _is_whole(self, step: Sequence[int]) -> bool:
        """Whether ``step`` ends at EOS, or at a delimiter that ends a step."""
        if step[-1] in self.eos_ids:
            return True
        # A step of one token (".\n") would be scored at the last boundary, none of it seen; as the
        # first step even where step 0 is. It is merged into the next.
        if step[-1] not in self.delimiter_ids or len(step) < max(self.rule.min_tokens, 2):
            return False
        return any(t not in self.blank_ids for t in step)

    def step_ends(self, ids: Sequence[int]) -> list[int]:
        """Exclusive ends of the complete steps of a solution; an unfinished tail is no step.

        A step cut by ``max_tokens`` counts only where the rule says that it is scored; where it
        does not, nothing after it is a step either, nor after the step that ends the solution. A
        solution that is nothing but EOS has no step: its scoring position would be step 0's.
        """
        ends = self._boundaries(ids)
        if not self.rule.final:
            return ends
        for number, (start, end) in enumerate(pairwise([0, *ends]), 1):
            if self.is_final(ids[start:end]):
                return ends[:number]
        return ends

    def _boundaries(self, ids: Sequence[int]) -> list[int]:
        """Ends of steps, whatever they say."""
        ends: list[int] = []
        start = 0
        stops = self.delimiter_ids | self.eos_ids
        longest = self.rule.max_tokens or len(ids) + 1
        for i, token in enumerate(ids):
            # Most tokens end nothing; slicing at each would be quadratic in the step's length.
            if token not in stops and i + 1 - start < longest:
                continue
            step = ids[start : i + 1]
            if self.ends_step(step):
                if i == 0 or (self.is_cut(step) and not self.rule.score_cut):
                    break
                start = i + 1
                ends.append(start)
        return ends

    def result_start(self, step: Sequence[int]) -> int:
        """Index in ``step`` of the first token of its result part; 0 where no token opens one."""
        for i in range(len(step) - 1, -1, -1):
            if step[i] in self.result_ids:
                return i + 1 if i + 1 < len(step) else 0
        return 0


def scoring_position(prompt_length: int, step_end: int) -> int:
    """Index in prompt + solution of the token at which the step ending at ``step_end`` is scored.

    ``step_end`` is the exclusive end in the solution, 0 for step 0.
    """
    return prompt_length - 1 if step_end == 0 else prompt_length + step_end - 2


def compile_rule(rule: StepRule, tokenizer: Any, eos_ids: Sequence[int]) -> Stepper:
    """Compile ``rule`` for a transformers tokenizer.

    Raises:
        UserError: if no token of the tokenizer contains the delimiter.
    """
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    special = set(tokenizer.all_special_ids)
    delimiter = frozenset(
        i for i, text in enumerate(texts) if rule.delimiter in text and i not in special
    )
    if not delimiter:
        raise UserError(
            f"step_rule.delimiter {rule.delimiter!r} is in no single token of the tokenizer "
            f"{tokenizer.name_or_path!r}; choose a delimiter that the tokenizer produces, or set "
            "step_rule.max_tokens with a delimiter such as '\\n'"
        )
    return Stepper(
        rule=rule,
        delimiter_ids=delimiter,
        blank_ids=frozenset(
            i for i, text in enumerate(texts) if not text.strip() and i not in special
        ),
        result_ids=frozenset(i for i, text in enumerate(texts) if rule.result in text),
        eos_ids=frozenset(eos_ids),
        tokenizer=tokenizer,
    )
