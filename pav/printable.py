"""What models, data sets and strangers wrote, where people look at it: shown, never obeyed."""

from __future__ import annotations

import re

from rich.text import Text

# Line ends and tabs pass. All other controls go, ESC and C1 among them, which move a terminal's
# cursor, retitle it or paste into it; so do marks that turn the direction of writing, separators
# that only some programs take for line ends, invisible tags, and halves of a character.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_FORMULA = tuple("=+-@\t\r")


def printable(text: object) -> str:
    r"""The text with everything that a terminal would obey as ``\x1b``, ``\u202e``, ..."""
    return _UNSAFE.sub(lambda found: _escape(found[0]), str(text))


def one_line(text: object) -> str:
    r"""As :func:`printable`, with line ends as ``\n``: for errors and warnings."""
    return printable(text).replace("\n", "\\n")


def cell(text: object, style: str = "") -> Text:
    """A cell of a rich table; square brackets in it are no markup."""
    return Text(printable(text), style)


def csv_text(text: str) -> str:
    """A cell of a CSV file that a spreadsheet takes for text, not for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def from_csv_text(text: str) -> str:
    """What :func:`csv_text` was given."""
    return text[1:] if text[:1] == "'" and text[1:].startswith(_FORMULA) else text


def _escape(character: str) -> str:
    code = ord(character)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else (f"\\U{code:08x}")
    )
