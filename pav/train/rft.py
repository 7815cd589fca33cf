"""``pav.sft --from_traces``: fine-tune a policy on the correct traces of a label run (RFT).

The start of RL in the PAV paper (Appendix E). The loss is that of the next token over solution
tokens; what is kept is the best epoch on correct traces of validation problems.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import PreTrainedTokenizerBase

from pav.core.errors import UserError
from pav.core.files import damage, json_text, read_object, replace_file
from pav.core.lock import LOCK, Lock
from pav.core.manifest import PROMPTS, other_prompt, refuse_other
from pav.core.printable import one_line
from pav.core.signals import interruptible
from pav.core.statistics import few
from pav.labels.check import check_ids
from pav.labels.files import SOURCES, demand
from pav.labels.tables import LabelSet, Trace, read_labels
from pav.policy.policy import (
    PolicyConfig,
    Prompt,
    encode_prompt,
    load_tokenizer,
    model_path,
    tokenizer_fingerprint,
    vocabulary_size,
    weights_digest,
)
from pav.policy.rendered import rendering
from pav.train.checkpoints import BEFORE, BEST, LAST, whole_checkpoint
from pav.train.rft_fit import Solution, fit
from pav.train.sft import next_command, save_policy, writing
from pav.train.sft_config import OF_TRACES, SftConfig
from pav.verifier.checkpoint import prompt_from
from pav.verifier.lora import adapters_of, merge_into, save_adapter
from pav.verifier.trunk import load_trunk

# Directory of the PEFT adapter, beside the merged weights.
ADAPTER = "adapter"


def rft(config: SftConfig) -> None:
    """Fine-tune and write a policy (see :class:`SftConfig`).

    With ``rft.mode: lora`` the output holds the merged weights, as search and vLLM take them, and
    in ``adapter/`` the adapter as PEFT takes it.

    Raises:
        UserError: if the label run has no correct traces to learn from or to stop by, or the start
            has another tokenizer.
    """
    output = Path(config.output)
    with Lock(output / LOCK, output), interruptible():
        _rft(config, output)


def _rft(config: SftConfig, output: Path) -> None:
    started = any((output / name).exists() for name in (LAST, BEFORE, BEST))
    # A death while the policy was written leaves both: it is written again.
    if (output / "config.json").exists() and not started:
        raise UserError(f"output {config.output!r} already holds a model; choose another directory")
    where = str(config.from_traces)
    labels = read_labels([where])
    for warning in labels.warnings:
        print(f"WARNING: {one_line(warning)}")
    demand(labels.manifest, SOURCES, f"{where}/manifest.json")
    source = labels.manifest["policy"]
    asked = PolicyConfig(**{**source, "prompt": prompt_from(source["prompt"])})
    start = config.init or asked.model
    path = model_path(start)
    tokenizer = load_tokenizer(path)
    if tokenizer_fingerprint(tokenizer) != labels.manifest["tokenizer"]:
        raise UserError(
            f"init {start!r} has another tokenizer than the policy {asked.model!r} of the label "
            f"run {where!r}, whose token ids it would be taught; use a model of the same tokenizer"
        )
    prompts = {asked.label: rendering(tokenizer, asked.prompt)}
    if said := other_prompt(labels.manifest.get(PROMPTS, {}), prompts):
        raise UserError(
            f"init {start!r} is asked otherwise than the label run {where!r}: {said}; put back the "
            "chat template, or use a model of the same template"
        )
    chosen = {split: correct(labels, split) for split in ("train", "validation")}
    refuse_none(chosen, labels, where)
    check_ids([*chosen["train"], *chosen["validation"]], [], vocabulary_size(path), where)
    train, held_out = (solutions_of(traces, tokenizer, asked.prompt) for traces in chosen.values())
    print(
        f"{config.rft.mode} fine-tuning of {one_line(start)} on {_said(chosen['train'])} training "
        f"problems, stopped by {_said(chosen['validation'])} validation problems"
    )
    digest = hashlib.sha256(repr((train, held_out)).encode()).hexdigest()[:16]
    settings = {k: v for k, v in asdict(config).items() if k in OF_TRACES}
    settings |= {"traces": digest, "start": weights_digest(path), PROMPTS: prompts}
    last = resume_or_refuse(config, settings, output, started)
    L.seed_everything(config.seed, verbose=False)
    model = fit(config, path, train, held_out, output, last)
    if config.rft.mode == "lora":
        with writing(output):
            save_adapter(output / ADAPTER, model, config.rft.lora)
        adapters = adapters_of(model.state_dict())
        model = load_trunk(path)
        merge_into(model, adapters, asdict(config.rft.lora))
    model.to(getattr(torch, asked.dtype))
    save_policy(model, tokenizer, output)
    for name in (LAST, BEFORE, BEST):
        (output / name).unlink(missing_ok=True)
    adapter = f"; adapter: {output / ADAPTER}" if config.rft.mode == "lora" else ""
    # What an open chat renders is the same.
    prompt = replace(asked.prompt, chat=asked.prompt.chat or None)
    following = next_command(output, prompt, labels.manifest["task_spec"])
    following += "" if asked.dtype == PolicyConfig.dtype else f" --policy.dtype {asked.dtype}"
    print(f"policy: {output}{adapter}\nnext: {following} --output runs/labels_rft")


def correct(labels: LabelSet, split: str) -> list[Trace]:
    """Whole correct traces of a split, each text of a problem once, in an order of their own."""
    whole = [t for t in labels.traces if t.split == split and t.correct and not t.truncated]
    once = {(t.problem_id, *t.ids): t for t in whole}
    return [once[key] for key in sorted(once)]


def refuse_none(chosen: dict[str, list[Trace]], labels: LabelSet, where: str) -> None:
    """Refuse labels with nothing to learn from, or nothing to stop by; warn of few.

    Raises:
        UserError: saying which.
    """
    names = {"train": "training", "validation": "validation"}
    options = {"train": "problems", "validation": "validation_problems"}
    for split, traces in chosen.items():
        if traces:
            problems = len({t.problem_id for t in traces})
            if said := few(problems, f"solved {names[split]}"):
                print(f"WARNING: {said}", file=sys.stderr)
            continue
        there = len({t.problem_id for t in labels.traces if t.split == split})
        why = f"no correct trace of its {there} {names[split]} problems" if there else (
            f"no {names[split]} problems"
        )  # fmt: skip
        need = "to learn from" if split == "train" else "to know when to stop"
        raise UserError(
            f"labels {where!r} hold {why}, and correct traces of some are needed {need}; label "
            f"more ({options[split]}, n_traces), or with a policy that is right more often"
        )


def _said(traces: Sequence[Trace]) -> str:
    return f"{len(traces)} correct traces of {len({t.problem_id for t in traces})}"


def solutions_of(
    traces: Sequence[Trace], tokenizer: PreTrainedTokenizerBase, prompt: Prompt
) -> list[Solution]:
    """Traces behind their prompts."""
    prompts = {t.question: encode_prompt(tokenizer, prompt, t.question) for t in traces}
    return [Solution([*prompts[t.question], *t.ids], len(prompts[t.question])) for t in traces]


def resume_or_refuse(
    config: SftConfig, settings: dict[str, Any], output: Path, started: bool
) -> Path | None:
    """The checkpoint to go on from; a run under other settings or on other traces is refused."""
    plain = json.loads(json_text(settings))
    path = output / "sft.json"
    if not started or not path.exists():
        replace_file(path, json_text(plain))
        return None
    found = read_object(path, "restore it, or choose another output")
    refuse_other(f"the unfinished run in {config.output!r}", found, plain)
    last, best = whole_checkpoint(output), output / BEST
    if last is not None and best.exists() and (wrong := damage(best)):
        raise UserError(
            f"the best epoch so far, {str(best)!r}, is damaged ({wrong}); restore it, or choose "
            "another output"
        )
    return last
