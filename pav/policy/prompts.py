"""Prompts of what was made before, compared with those of now.

How a policy is asked stands in settings and in its directory's chat template. Label runs, verifiers
and searches keep what was rendered of both (:mod:`pav.policy.rendered`), and are compared by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pav.core.errors import UserError

# Key of a manifest: name -> rendering. One of an older version has none, and tells nothing.
PROMPTS = "prompts"
# ``ids``: a digest of the token ids of the probe prompts; ``text``: the first of them.
Rendering = dict[str, str]


def other_prompt(there: Mapping[str, Rendering], now: Mapping[str, Rendering]) -> str:
    """The first of the names on both sides whose renderings differ, and how; empty if none does."""
    for name in there:
        a, b = there[name], now.get(name)
        if not a or not b or a == b:
            continue
        if a["text"] == b["text"]:
            return f"{name} reads a prompt of other tokens (ids {a['ids']} there, {b['ids']} now)"
        # Some characters before the first that differs, to find the place by.
        pairs = enumerate(zip(a["text"], b["text"], strict=False))
        shorter = min(len(a["text"]), len(b["text"]))
        at = max(0, next((i for i, (x, y) in pairs if x != y), shorter) - 20)
        old, new = a["text"][at : at + 60], b["text"][at : at + 60]
        return f"{name} reads another prompt ({old!r} there, {new!r} now)"
    return ""


def check_prompts(there: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Refuse to go on with another prompt than a run's manifest holds.

    Args:
        there: the manifest that lies there.
        now: what it would be now.
        what: names the run.

    Raises:
        UserError: naming who is asked otherwise.
    """
    if said := other_prompt(there.get(PROMPTS, {}), now.get(PROMPTS, {})):
        raise UserError(refusal(what, said))


def refusal(what: str, said: str) -> str:
    """The line with which ``what`` is not gone on with; ``said`` is of :func:`other_prompt`."""
    return (
        f"{what} was made with another prompt by the same settings: {said}; put back the chat "
        "template (chat_template.jinja or tokenizer_config.json), or choose another output"
    )
