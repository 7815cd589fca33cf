"""Commands that other commands print, run as a user would who copies them."""

from __future__ import annotations

import shlex
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
SCRIPTS: dict[str, str] = tomllib.loads(PROJECT.read_text())["project"]["scripts"]


def printed(said: str) -> list[list[str]]:
    """The commands after "next: " in what a command said, each as its words."""
    lines = [line.removeprefix("next: ") for line in said.splitlines() if line.startswith("next: ")]
    return [shlex.split(line) for line in lines]


def follow(command: list[str], *more: str) -> None:
    """Run a printed command in this process; ``more`` keeps it small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command, *more])
        module, _, main = SCRIPTS[command[0]].partition(":")
        getattr(import_module(module), main)()
