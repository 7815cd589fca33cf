"""What models, data sets and strangers wrote, where people look at it: shown, never obeyed."""

from __future__ import annotations

from rich.text import Text

_FORMULA = tuple("=+-@\t\r")


def printable(text: object) -> str:
    r"""The text with what nobody would see, or a terminal would obey, as ``\x1b``, ``\u202e``, ...

    Line ends pass. ESC and C1 controls move a terminal's cursor, retitle it or paste into it; marks
    turn the direction of writing; halves of a character cannot be written at all.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


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
