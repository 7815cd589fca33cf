"""Solutions that are given as text, in the tokens that a policy writes.

A text is encoded as a whole and then cut. Alone, a step would begin as a text does: tokenizers such
as SentencePiece's put a mark there that no policy writes in the middle of a solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pav.core.errors import UserError
from pav.policy.policy import Policy


@dataclass(frozen=True)
class Encoded:
    """A solution and where its steps end.

    Attributes:
        ids: solution ids; a complete solution ends with EOS.
        ends: exclusive end of every given step: after the token that holds the delimiter's first
            character, or EOS. Where a token holds text of two steps, they may share an end.
        is_changed: whether the ids spell another text than was given.
    """

    ids: list[int]
    ends: list[int]
    is_changed: bool


def encode_steps(
    policy: Policy, steps: Sequence[str], separator: str, complete: bool = True
) -> Encoded:
    """Encode steps as one text.

    Args:
        policy: whose tokenizer and step rule.
        steps: at least one.
        separator: stands between steps; holds the delimiter of the step rule.
        complete: whether EOS ends the last step; otherwise one more separator does.

    Raises:
        UserError: if the tokenizer does not tell which characters a token holds.
    """
    text = separator.join(steps) + ("" if complete else separator)
    ids, starts = _encode(policy, text)
    is_changed = policy.text(ids) != text
    offset = separator.index(policy.stepper.rule.delimiter)
    at, ends = 0, []
    for step in steps[:-1] if complete else steps:
        at += len(step)
        ends.append(_end(starts, at + offset))
        at += len(separator)
    if complete:
        ids = [*ids, eos_id(policy)]
        ends.append(len(ids))
    return Encoded(ids, ends, is_changed)


def encode_after_step(policy: Policy, text: str) -> list[int]:
    """Ids of a text as they follow the end of a step; its own ids where the two share a token."""
    return encode_after(policy, policy.stepper.rule.delimiter, text)


def encode_after(policy: Policy, before: str, text: str) -> list[int]:
    """Ids of ``text`` as they follow the text ``before``; its own where the two share a token."""
    if policy.tokenizer.is_fast:
        ids, starts = _encode(policy, before + text)
        end = int(np.searchsorted(starts, len(before)))
        if policy.text(ids) == before + text and starts[end : end + 1] == [len(before)]:
            return ids[end:]
    return list(policy.tokenizer.encode(text, add_special_tokens=False))


def eos_id(policy: Policy) -> int:
    """The token with which ``policy`` ends a solution."""
    eos, own = policy.stepper.eos_ids, policy.tokenizer.eos_token_id
    return int(own) if own in eos else min(eos)


def _encode(policy: Policy, text: str) -> tuple[list[int], list[int]]:
    """(ids, where in ``text`` each of them starts)."""
    if not policy.tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {policy.path!r} does not tell which characters a token holds; use "
            "a model with a fast tokenizer (tokenizer.json)"
        )
    encoded = policy.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]


def _end(starts: Sequence[int], character: int) -> int:
    """Exclusive end after the last token that starts at or before ``character``: it holds it."""
    return max(1, int(np.searchsorted(starts, character, side="right")))
