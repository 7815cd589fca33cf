"""Text that comes from outside, checked where it enters: half a character is no text.

JSON can spell a lone surrogate (``"\\ud83d"``), which Python takes and no file, tokenizer or reply
in UTF-8 can hold.
"""

from __future__ import annotations

import re
from typing import Any

from pav.core.errors import UserError

_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(value: Any, where: str) -> None:
    """Refuse plain data in which a string, a key included, cannot be encoded as UTF-8.

    Args:
        value: text, or lists, tuples and dicts of it; all else is passed over.
        where: the file and line, say, that the message starts with.

    Raises:
        UserError: naming the first such field and its character.
    """
    found = no_text(value)
    if found is not None:
        field, character = found
        raise UserError(
            f"{where}: {field or 'text'} holds the lone surrogate U+{ord(character):04X}, half a "
            "character, which cannot be encoded as UTF-8; mend the text or leave it out"
        )


def no_text(value: Any) -> tuple[str, str] | None:
    """(field, character) of the first lone surrogate in plain data; None where there is none.

    The field is a path such as ``steps[1].text``, empty where ``value`` is the text itself.
    """
    # A stack: data may be nested deeper than Python calls.
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, str):
            # Most text is whole, and ASCII is known to be.
            if not item.isascii() and (match := _SURROGATE.search(item)):
                return path, match[0]
        elif isinstance(item, list | tuple):
            waiting += [(f"{path}[{i}]", x) for i, x in enumerate(item)][::-1]
        elif isinstance(item, dict):
            below = []
            for key, x in item.items():
                name = str(key).encode("ascii", "backslashreplace").decode()
                below.append((f"the key {name}", key))
                below.append((f"{path}.{name}" if path else name, x))
            waiting += below[::-1]
    return None
