"""Options by an old name: read as the new one, with a warning."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pav.core.printable import one_line
from pav.core.renamed import RENAMED


def by_new_names(args: Sequence[str], config_type: Any) -> list[str]:
    """A command line by the names of now; a config file with an old one becomes its contents."""
    fields = config_type.__dataclass_fields__
    names = {old: new for old, new in RENAMED.items() if new in fields and old not in fields}
    # A comparison's methods have settings of their own.
    of_methods = RENAMED if "methods" in fields else {}
    found: list[str] = []
    option = ""
    for arg in args:
        start, value = "", arg
        if arg.startswith("--"):
            option, equals, value = arg.partition("=")
            name, dot, rest = option.removeprefix("--").partition(".")
            if name in names:
                print(f"WARNING: --{name} is now --{names[name]}", file=sys.stderr)
                option = f"--{names[name]}{dot}{rest}"
            start = option + equals
        if value and option == "--config":
            value = _config(value, names, of_methods)
        elif value and of_methods and option in ("--methods", "--methods+"):
            value = _methods(value, of_methods)
        found.append(start + value)
    return found


def _config(file: str, names: Mapping[str, str], of_methods: Mapping[str, str]) -> str:
    """A config file's name, or its contents by new names."""
    try:
        settings = yaml.safe_load(Path(file).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return file  # the parser says what is wrong
    if not isinstance(settings, dict):
        return file
    where = f" in {one_line(file)}"
    new = _renamed(settings, names, where)
    if isinstance(methods := new.get("methods"), list):
        new["methods"] = [_renamed(m, of_methods, where) for m in methods]
    return file if new == settings else yaml.safe_dump(new)


def _methods(text: str, of_methods: Mapping[str, str]) -> str:
    """A method or a list of them as text, by new names."""
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    listed = settings if isinstance(settings, list) else [settings]
    new = [_renamed(m, of_methods, " of a method") for m in listed]
    if new == listed:
        return text
    return yaml.safe_dump(new if isinstance(settings, list) else new[0])


def _renamed(settings: Any, names: Mapping[str, str], where: str) -> Any:
    if not isinstance(settings, dict):
        return settings
    for old in sorted(names.keys() & settings.keys()):
        print(f"WARNING: {old}{where} is now {names[old]}", file=sys.stderr)
    return {names.get(name, name): value for name, value in settings.items()}
