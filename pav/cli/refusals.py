"""One line for what the command line, or a config file on it, has wrong."""

from __future__ import annotations

import importlib
import json
import re
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from pav.core.errors import UserError
from pav.core.renamed import RENAMED
from pav.tasks.base import BUILT_IN, Task


def given(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, value) of a command line; a value may be missing."""
    for arg, following in pairwise([*args, ""]):
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            yield name.removesuffix("+"), value if equals else following


def config_files(args: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, contents) of every ``--config`` that can be read; the parser says what is wrong."""
    for name, value in given(args):
        if name == "--config":
            try:
                found = yaml.safe_load(Path(value).read_text())
            except (OSError, ValueError, yaml.YAMLError):
                continue
            if isinstance(found, dict):
                yield value, found


def named_task(args: Sequence[str]) -> str | None:
    """Class of the task that the command line, or a config file on it, names."""
    tasks: list[Any] = [found.get("task") for _, found in config_files(args)]
    for name, value in given(args):
        if name == "--task.class_path":
            tasks.append(value)
        elif name == "--task":
            # A class, or {class_path: ..., init_args: ...}.
            try:
                tasks.append(yaml.safe_load(value))
            except yaml.YAMLError:
                tasks.append(value)
    for task in reversed(tasks):
        path = task.get("class_path") if isinstance(task, dict) else task
        if isinstance(path, str):
            return path
    return None


def import_task(path: str) -> None:
    """Import the module of a user's task.

    Raises:
        UserError: if there is none, it raises, or has no such task.
    """
    module, _, name = path.rpartition(".")
    if not module:
        known = {c.__name__: c for c in _built_in()}
        if path not in known:
            raise UserError(
                f"task {path!r} is unknown{_meant(path, known)} (built in are "
                f"{', '.join(sorted(known))}; one of your own is named module.Class)"
            )
        return
    try:
        found = importlib.import_module(module)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            raise UserError(
                f"task {path!r}: there is no module {missing!r}; start the command in the "
                "directory that holds it, or put that on PYTHONPATH"
            ) from error
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
        raise UserError(
            f"task {path!r}: importing the module {module!r} raised {said}; the traceback is in "
            f"{_logged(module, error)}"
        ) from error
    if not hasattr(found, name):
        tasks = [n for n, c in vars(found).items() if isinstance(c, type) and issubclass(c, Task)]
        raise UserError(f"task {path!r}: {module!r} has no {name}{_meant(name, tasks)}")


def _logged(module: str, error: Exception) -> str:
    """Name of a new file with the traceback."""
    text = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"{module}-", suffix=".log", delete=False, errors="backslashreplace"
    ) as stream:
        stream.write(text)
    return stream.name


def refusal(message: str, config_type: type, args: Sequence[str], prog: str) -> str:
    """One line for a parser's ``message``: an unknown option by its nearest name, else as it is."""
    known = set(_settings(config_type, args)) | {"config", "help", "version", "print_config"}
    read = known | {
        f"{old}{name.removeprefix(new)}"
        for old, new in RENAMED.items()
        for name in known
        if name.split(".")[0] == new
    }
    more = f"({prog} --help lists all)"
    for option, _ in given(args):
        name = option.removeprefix("--")
        if name and not _is_known(name, read):
            meant = _meant(name, known, "--")
            return f"unknown option {option}{meant} {more}"
    for file, found in config_files(args):
        for name in _flat(found):
            if not _is_known(name, read):
                return f"unknown setting {name} in {file}{_meant(name, known)} {more}"
    if single := re.match(r"unrecognized arguments: -(\w\S*)", message):
        return f"unknown option -{single[1]}{_meant(single[1], known, '--')} {more}"
    inside = re.search(
        r'Parser key "([^"]+)".*Option \'([^\']+)\' is not accepted', message, re.DOTALL
    )
    if inside:
        meant = _meant(f"{inside[1]}.{inside[2]}", known)
        return f"--{inside[1]} has an unknown setting {inside[2]}{meant} {more}"
    return f"{_plain(message)} {more}"


def _is_known(name: str, known: set[str]) -> bool:
    """Whether it is a setting, or an entry of one that holds a mapping."""
    if name in known:
        return True
    parent = name.rpartition(".")[0]
    return f"{parent}.*" in known


def _meant(name: str, known: Any, dashes: str = "") -> str:
    near = get_close_matches(name, [k for k in known if "*" not in k], 1, 0.6)
    return f"; did you mean {dashes}{near[0]}?" if near else ""


def _flat(found: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a config file."""
    for name, value in found.items():
        if name == "init_args" and isinstance(value, dict):
            yield from _flat(value, prefix)
            continue
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")


def _settings(cls: Any, args: Sequence[str], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a config class; ``name.*`` where any may follow."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        name, kind = f"{prefix}{f.name}", hints[f.name]
        yield name
        for part in _parts(kind):
            if part is dict:
                yield f"{name}.*"
            elif isinstance(part, type) and issubclass(part, Task):
                yield from (f"{name}.class_path", f"{name}.init_args", f"{name}.help")
                for task in _tasks(named_task(args)):
                    yield from _settings(task, args, f"{name}.")
                    yield from _settings(task, args, f"{name}.init_args.")
            elif is_dataclass(part):
                yield from _settings(part, args, f"{name}.")


def _parts(kind: Any) -> Iterator[Any]:
    """The classes in a type: those of ``list[A] | B | None`` are list, A, B and NoneType."""
    yield getattr(kind, "__origin__", kind)
    for part in get_args(kind):
        yield from _parts(part)


def _built_in() -> list[Any]:
    return [c for c in _subclasses(Task) if c.__module__.startswith(BUILT_IN)]


def _tasks(path: str | None) -> list[Any]:
    """The task of that name, or all built-in ones."""
    found = [
        c
        for c in _subclasses(Task)
        if path in (c.__name__, f"{c.__module__}.{c.__qualname__}") and is_dataclass(c)
    ]
    return found or _built_in()


def _subclasses(cls: Any) -> Iterator[Any]:
    children: list[Any] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


def _plain(message: str) -> str:
    """What jsonargparse says in many lines of types, in one line."""
    key = re.match(r'Parser key "([^"]+)":\s*', message)
    rest = message[key.end() :] if key else message
    tried = re.search(r"Errors:\n(.*)\n\s*Given value type:", rest, re.DOTALL)
    if tried:
        items = [i for i in re.split(r"^\s*- ", tried[1], flags=re.MULTILINE) if i.strip()]
        reasons = [i for i in items if "NoneType" not in i]
        value = rest.rpartition("Given value: ")[2]
        nested = re.fullmatch(r"NestedArg\(key='(.*?)', val=(.*)\)\s*", value, re.DOTALL)
        if nested and key:
            said = f"--{key[1]}.{nested[1]} is {nested[2]}"
        else:
            said = f"--{key[1]} is {value!r}" if key else json.dumps(value)
        text = f"{said}: {'; '.join(reasons)}"
    elif got := re.search(r"(.*)\. Got value: (.*)", rest, re.DOTALL):
        text = f"--{key[1]} is {got[2]!r}: {got[1]}" if key else rest
    else:
        text = f"--{key[1]}: {rest}" if key else rest
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = text.replace("Expected a ", "expected ")
    return " ".join(text.split())
