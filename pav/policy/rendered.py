"""Prompts as a model reads them: rendered for probe questions, to be kept with what is made.

A chat template is a file that can be edited, and a program that can read more than its inputs. The
clock of all templates stands still at the start of the process, or at
``chat_template_kwargs.strftime_now``: a prompt cannot change in the middle of a run.
"""

from __future__ import annotations

import hashlib
import sys
from datetime import datetime
from typing import TYPE_CHECKING

from pav.core.errors import UserError
from pav.core.manifest import Rendering, other_prompt
from pav.core.printable import one_line
from pav.policy.policy import CLOCK, STARTED, Policy, Prompt, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = ("1+1", "What is 12 * 7?\nSay why.")
# Renderings of each probe: a choice of two by chance comes out alike in one of 16,000.
_TIMES = 8
# They differ in all parts of a date and of a time.
_CLOCKS = (datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 20, 17, 48, 59))


def rendered(policy: Policy) -> Rendering:
    """How ``policy`` is asked; see :func:`rendering`."""
    return rendering(policy.tokenizer, policy.config.prompt, policy.clock)


def rendering(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, clock: datetime = STARTED
) -> Rendering:
    """Probe prompts as plain data: ``ids``, a digest of their ids, and ``text`` of the first one.

    Raises:
        UserError: if the chat template renders another text every time, or refuses.
    """
    found = [encode_prompt(tokenizer, prompt, question, clock) for question in _PROBES]
    for _ in range(_TIMES - 1 if prompt.chat else 0):
        if [encode_prompt(tokenizer, prompt, question, clock) for question in _PROBES] != found:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path!r} renders the same question in "
                "different ways, by chance; take the chance out of chat_template.jinja"
            )
    return of_ids(found, tokenizer)


def of_ids(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Rendering:
    """The rendering that these prompts are."""
    digest = hashlib.sha256(repr(prompts).encode()).hexdigest()[:16]
    return {"ids": digest, "text": str(tokenizer.decode(prompts[0]))}


def warn_other_prompt(known: Rendering, policy: Policy, source: str, who: str) -> None:
    """Say that a verifier was made for another prompt than ``policy`` is asked with now.

    Args:
        known: what the verifier remembers; empty where that is nothing.
        policy: who is asked.
        source: names the verifier.
        who: names the policy in the message.
    """
    if said := other_prompt({who: known}, {who: rendered(policy)}):
        _warn(f"{source} was made for another prompt by the same settings: {said}")


def reads_clock(policy: Policy) -> bool:
    """Whether the prompt holds the date or time at which the command was started."""
    prompt, tokenizer = policy.config.prompt, policy.tokenizer
    return bool(prompt.chat) and any(
        encode_prompt(tokenizer, prompt, q, _CLOCKS[0])
        != encode_prompt(tokenizer, prompt, q, _CLOCKS[1])
        for q in _PROBES
    )


def refuse_clock(policy: Policy) -> None:
    """Refuse to begin what another day's prompt could not go on with.

    Raises:
        UserError: naming the setting at which the template's clock stands still.
    """
    if reads_clock(policy):
        raise UserError(_clock(policy))


def warn_clock(policy: Policy) -> None:
    """Say that another day's start will ask otherwise."""
    if reads_clock(policy):
        _warn(_clock(policy))


def _clock(policy: Policy) -> str:
    return (
        f"the chat template of {policy.config.model!r} writes the date or time of the start into "
        "the prompt: it will be another one tomorrow; set "
        f"prompt.chat_template_kwargs.{CLOCK}, e.g. to {policy.clock:%Y-%m-%d}"
    )


def _warn(message: str) -> None:
    print(f"WARNING: {one_line(message)}", file=sys.stderr)
