"""Names of heads, which say what they predict."""

from __future__ import annotations

from typing import Final

ORM: Final = "orm"
LIK = "lik/"


def q_head(policy: str) -> str:
    """Name of the head that predicts Q under ``policy``."""
    return f"q/{policy}"
