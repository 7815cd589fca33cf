"""A run belongs to one configuration: what its manifest says, compared with what it would say now.

Settings do not tell how a policy is asked: that also stands in its directory's chat template. Label
runs, verifiers and searches keep what was rendered of both (:mod:`pav.policy.rendered`), and are
compared by that, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pav.core.errors import UserError
from pav.core.renamed import RENAMED

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


def other_configuration(
    there: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> str:
    """How a run is of another configuration than ``now``, and what to do; empty if it is not.

    Args:
        there: the manifest that lies there.
        now: what it would be now, as it reads on disk.
        free: settings that may differ.
    """
    keys = (there.keys() | now.keys()) - {*free, PROMPTS}
    if changed := sorted(k for k in keys if there.get(k) != now.get(k)):
        first = changed[0]
        names = [RENAMED.get(k, k) for k in changed]
        return (
            f"made with another {', '.join(names)} ({names[0]}: {there.get(first)!r} there, "
            f"{now.get(first)!r} now); restore it, or choose another output"
        )
    if said := other_prompt(there.get(PROMPTS, {}), now.get(PROMPTS, {})):
        return (
            f"made with another prompt by the same settings: {said}; put back the chat template "
            "(chat_template.jinja or tokenizer_config.json), or choose another output"
        )
    return ""


def refuse_other(
    what: str, there: Mapping[str, Any], now: Mapping[str, Any], also: str = ""
) -> None:
    """Refuse to go on with a run of another configuration.

    Args:
        what: names the run.
        there: the manifest that lies there; settings that ``now`` does not know are passed over.
        now: what it would be now, as it reads on disk.
        also: one more way out.

    Raises:
        UserError: naming what differs.
    """
    if said := other_configuration({k: there[k] for k in now if k in there}, now):
        raise UserError(f"{what} was {said}{also}")
