"""What strangers wrote is shown, never obeyed: by terminals, by rich, by spreadsheets."""

from __future__ import annotations

import csv
import io
import unicodedata
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.printable import cell, csv_text, from_csv_text, one_line, printable
from pav.core.progress import Reporter
from pav.core.tables import print_table

# Moves the cursor, retitles the window, turns the direction of writing; and rich's markup.
EVIL = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202egnp.exe\u2066 \r [red]x[/red] [/] \ud83d"


@dataclass(frozen=True)
class Nothing:
    """A command without a setting."""


@given(st.text(st.characters(codec=None), max_size=40))
def test_nothing_that_a_terminal_obeys_is_left_and_other_text_stays(text: str) -> None:
    shown = printable(text)
    for character in shown:
        assert unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") or character == "\n"
        assert unicodedata.bidirectional(character) not in (
            "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"
        )  # fmt: skip
    shown.encode()
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text
    assert "\n" not in one_line(text)


def test_the_characters_are_named() -> None:
    assert printable("a\x1b[2Jb\x07\x9b\u202ec\ud83d\U000e0041\n\té👩") == (
        "a\\x1b[2Jb\\x07\\x9b\\u202ec\\ud83d\\U000e0041\n\\té👩"
    )
    assert one_line("a\r\nb") == "a\\r\\nb"


def safe(text: str) -> bool:
    return not any(c in text for c in "\x1b\x07\x9b\u202e\u2066\r\ud83d") and "\\x1b[2J" in text


def test_tables_errors_and_progress_show_what_they_were_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_table(EVIL, [{"method": EVIL, EVIL: "1"}])
    table = capsys.readouterr().out
    assert safe(table) and table.count("[red]x[/red] [/]") == 3

    def refuse(config: Nothing) -> None:
        raise UserError(f"field is bad\n{EVIL}")

    with pytest.raises(SystemExit):
        run(refuse, Nothing, "prog", [])
    error = capsys.readouterr().err
    assert safe(error) and error.count("\n") == 1

    with Reporter(EVIL, 1, "problems") as reporter:
        reporter.update(1, EVIL)
    assert safe(capsys.readouterr().out)
    # The same on a terminal, where rich draws.
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system=None, width=200).print(cell(EVIL))
    assert safe(stream.getvalue()) and "[red]x[/red] [/]" in stream.getvalue()


@given(st.text(max_size=20))
def test_no_text_cell_is_a_formula_and_all_are_read_back(text: str) -> None:
    stream = io.StringIO()
    csv.writer(stream).writerow([csv_text(text)])
    assert not csv_text(text).startswith(tuple("=+-@\t\r"))
    assert from_csv_text(csv_text(text)) == text or text[:1] == "'"
    assert csv_text("best-of-N") == "best-of-N" and csv_text("=1+1") == "'=1+1"
