"""How a run opens: on which task, with which prompts and length cap, and the block that says so."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from heapq import nlargest
from typing import Any

from pav.core.errors import UserError
from pav.core.printable import one_line, printable
from pav.policy.policy import ASSET_PREFIX, Policy, Sampler, tokenizer_fingerprint
from pav.tasks.base import BUILT_IN, Problem, Task, task_spec
from pav.tasks.ledger import Ledger
from pav.tasks.tape import Tape

# Long questions have long prompts; encoding a hundred thousand of them would take minutes.
PROBED = 100
MOST_SHOWN = 3000


def task_for(task: Task | None, models: Sequence[str]) -> Task:
    """The task of a run of ``models``: where none is named, that of the models, if all are shipped.

    Raises:
        UserError: if a model is the user's own and no task is named.
    """
    if task is not None:
        return task
    own = next((m for m in models if not m.startswith(ASSET_PREFIX)), None)
    if own is None:
        return Ledger() if "pav:ledger" in models else Tape()
    raise UserError(
        f"model {own!r} is named, and no task; add one, e.g. --task.data problems.jsonl or --task "
        "Gsm8k (--task Tape is the built-in calculator tape)"
    )


def check_policies(policies: Sequence[Policy]) -> None:
    """Policies must share a tokenizer (solution ids are exchanged) and differ in name."""
    base, *provers = policies
    names = {base.config.label: "policy"}
    for prover in provers:
        if tokenizer_fingerprint(base.tokenizer) != tokenizer_fingerprint(prover.tokenizer):
            raise UserError(
                f"prover {prover.config.model!r} has another tokenizer than policy "
                f"{base.config.model!r}; choose a prover of the same tokenizer"
            )
        name = prover.config.label
        if name in names:
            raise UserError(f"{names[name]} and prover are both called {name!r}; set prover.name")
        names[name] = f"prover {prover.config.model!r}"


def settle_cap(
    sampler: Sampler, task: Task, policies: Sequence[Policy], problems: Sequence[Problem]
) -> tuple[Sampler, str]:
    """(sampler with a length cap, a sentence about the cap).

    Without a cap of its own it is the longest prompt and the task's room for a solution, or as much
    of it as the models can read.

    Raises:
        UserError: if that leaves no room for a solution.
    """
    few = nlargest(PROBED, problems, key=lambda p: len(p.question))
    longest = max(len(policy.encode(p)) for p in few for policy in policies)
    note = "sampler.max_length"
    if not sampler.max_length:
        cap, note = task.length_cap(longest), "by default"
        reads = {p.config.model: n for p in policies if (n := positions(p.path)) is not None}
        model = min(reads, key=lambda name: reads[name], default="")
        if model and reads[model] < cap:
            cap, note = reads[model], f"all that {model} reads"
        if cap <= longest:
            raise UserError(
                f"prompts of up to {longest} tokens leave no room for a solution: the model "
                f"{model!r} reads {cap}; shorten the prompt or take a model of longer context"
            )
        sampler = replace(sampler, max_length=cap)
    cap = sampler.max_length
    return sampler, (
        f"length cap: {cap} tokens ({note}) = prompt (longest {longest}) + solution {cap - longest}"
    )


def positions(path: str) -> int | None:
    """Tokens that the model at ``path`` can read; None where its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else None


def print_opening(
    task: Task,
    problems: str,
    policies: Sequence[tuple[str, Policy]],
    first: Problem,
    sampler: Sampler,
    cap: str,
) -> None:
    """The block at the start of a run.

    Args:
        task: problems and grader.
        problems: how many, by split.
        policies: (role, policy), the base first.
        first: its prompt is shown, once for all that are asked alike.
        sampler: how they sample.
        cap: sentence of :func:`settle_cap`.
    """
    changed = _changed(task_spec(task))
    print(f"task: {task.name}{f' {json.dumps(changed)}' if changed else ''}; {problems}")
    base = policies[0][1]
    for role, policy in policies:
        kind = "chat" if policy.config.prompt.chat else "raw"
        differs = (
            "" if policy.config.prompt == base.config.prompt else ", another than the policy's"
        )
        model = one_line(policy.config.model)
        print(f"{role}: {model} ({kind} prompt{differs}), {policy.config.dtype}")
    shown: set[str] = set()
    for role, policy in policies:
        text = policy.tokenizer.decode(policy.encode(first))
        if text not in shown:
            print(f"first prompt of {role}:\n{block(str(text))}")
        shown.add(text)
    settings = asdict(sampler)
    del settings["max_length"]
    print("sampler: " + ", ".join(f"{k} {v:g}" for k, v in settings.items()))
    print(cap)


def block(text: str, most: int | None = MOST_SHOWN) -> str:
    """Text as an indented block in which a terminal finds nothing to obey.

    Args:
        text: any text.
        most: characters that are shown, of both ends; None for all.
    """
    if most is not None and len(text) > most:
        half = most // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
    return "\n".join("  | " + line for line in printable(text).split("\n"))


def task_option(spec: dict[str, Any], always: bool = False) -> str:
    """The option that names a task on a command line, for a task that is not built in.

    Args:
        spec: class path and settings (:func:`~pav.tasks.base.task_spec`).
        always: also for a built-in task.
    """
    path = str(spec["class_path"])
    built_in = path.startswith(BUILT_IN)
    if built_in and not always:
        return ""
    changed = _changed(spec)
    whole = json.dumps({"class_path": path, "init_args": changed})
    named = path.rpartition(".")[2] if built_in else path
    return f" --task {shlex.quote(whole) if changed else named}"


def _changed(spec: dict[str, Any]) -> dict[str, Any]:
    """Settings of a task that are not its defaults; all of them where its class is not imported."""
    module, _, name = str(spec["class_path"]).rpartition(".")
    try:
        usual = task_spec(getattr(sys.modules[module], name)())["init_args"]
    except (KeyError, AttributeError, TypeError):  # TypeError: a setting has no default
        usual = {}
    return {k: v for k, v in spec["init_args"].items() if k not in usual or v != usual[k]}
