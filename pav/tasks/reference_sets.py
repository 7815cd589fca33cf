"""Data sets whose answers cannot be checked: only likelihoods of their references are used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pav.grading.kinds import Grader
from pav.tasks.jsonl import Jsonl

# A link in Markdown leaves its text, a bare one nothing.
_LINK = re.compile(r"!?\[([^\]\n]*)\]\([^)\s]*\)")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+")


@dataclass(frozen=True)
class Alpaca(Jsonl):
    """Alpaca-cleaned: an instruction, often with an input, and a text that follows it."""

    data: str = "yahma/alpaca-cleaned"
    question_key: str = "instruction"
    answer_key: str = "output"
    grader: Grader = "none"

    def row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The input stands below the instruction; a few rows have no output."""
        parts = [str(row.get(key) or "").strip() for key in ("instruction", "input")]
        output = str(row.get("output") or "").strip()
        return (
            {"instruction": "\n\n".join(filter(None, parts)), "output": output} if output else None
        )


@dataclass(frozen=True)
class NuminaProof(Jsonl):
    """The proofs among NuminaMath-1.5's problems, without hyperlinks."""

    data: str = "AI-MO/NuminaMath-1.5"
    question_key: str = "problem"
    answer_key: str = "solution"
    grader: Grader = "none"

    def row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """None for a problem that asks for no proof, or has none."""
        if row.get("question_type") != "proof":
            return None
        found = {key: without_links(str(row.get(key) or "")) for key in ("problem", "solution")}
        return found if all(found.values()) else None


def without_links(text: str) -> str:
    """``text`` without hyperlinks."""
    return _ADDRESS.sub("", _LINK.sub(r"\1", text)).strip()
