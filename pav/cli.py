"""Command lines: a typed config, ``--config x.yaml``, any field overridable, one-line errors."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

import pav.tasks
from pav.errors import UserError

Config = TypeVar("Config")


def quiet() -> None:
    """Keep other libraries' start-up chatter out of the way of one-line errors and progress."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for text in (".*treespec.*", ".*in eval mode at the start.*", ".*many workers.*"):
        warnings.filterwarnings("ignore", text)
    for name in ("torch._library.triton", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # else it obeys the variable
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _names_task(args: Sequence[str]) -> bool:
    """Whether the command line, or a config file on it, names the class of the task."""
    if any(a == "--task" or a.startswith(("--task=", "--task.class_path")) for a in args):
        return True
    files = [b for a, b in pairwise(args) if a == "--config"]
    files += [a.removeprefix("--config=") for a in args if a.startswith("--config=")]
    for file in files:
        try:
            found = yaml.safe_load(Path(file).read_text())
        except (OSError, ValueError, yaml.YAMLError):  # the parser says what is wrong
            continue
        task = found.get("task") if isinstance(found, dict) else None
        if isinstance(task, str) or (isinstance(task, dict) and "class_path" in task):
            return True
    return False


def run(
    function: Callable[[Config], Any],
    config_type: type[Config],
    prog: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse ``argv`` into ``config_type`` and call ``function`` with it.

    A :class:`~pav.errors.UserError` becomes one line on stderr and exit code 2; Ctrl-C exits 130.
    """
    # Stdlib default is block-buffered when output is a file: a night's log must be readable live.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    quiet()
    # Built-in tasks go by their class names: --task Gsm8k.
    for module in iter_modules(pav.tasks.__path__):
        import_module(f"pav.tasks.{module.name}")
    parser = ArgumentParser(prog=prog, description=(config_type.__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_type, as_group=False)
    args = list(sys.argv[1:] if argv is None else argv)
    # "--task.data x.jsonl" alone means the built-in task that reads such a file.
    if any(a.startswith("--task.data") for a in args) and not any(
        a == "--task" or a.startswith("--task=") for a in args
    ):
        args = ["--task", "pav.tasks.jsonl.Jsonl", *args]
    if _names_task(args) and "task" in config_type.__dataclass_fields__:  # type: ignore[attr-defined]
        # jsonargparse would carry the default task's settings over to the named one.
        parser.set_defaults({"task": None})
    # A policy or a reward model is mostly named by its model alone.
    # In search a prover is a head or bo<K>, which is text.
    fields = config_type.__dataclass_fields__  # type: ignore[attr-defined]
    named_by_model = [
        f"--{name}"
        for name in ("policy", "prover", "orm")
        if name in fields and fields[name].type not in ("str", "str | None")
    ]
    for i, arg in enumerate(args):
        for flag in named_by_model:
            # A list of several is given as such.
            value = args[i + 1] if arg == flag and i + 1 < len(args) else arg.partition("=")[2]
            if (arg == flag or arg.startswith(f"{flag}=")) and not value.startswith("["):
                args[i] = f"{flag}.model{arg.removeprefix(flag)}"
    # A user's task module lies where the command is started.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    parsed = parser.parse_args(args)
    try:
        values = parser.instantiate_classes(parsed)
        del values["config"]
        config = config_type(**vars(values))
        function(config)
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ValueError as error:
        # jsonargparse wraps what a setting's own check raises.
        if not isinstance(error.__cause__, UserError):
            raise
        print(f"{prog}: error: {error.__cause__}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
