"""``pav.train``: train a verifier (or its ORM baseline) on labels.

One forward pass over a trace scores all its prefixes; heads are fitted with BCE on counts (k of n),
both classes of Q weighted equally (PAV paper, Appendix D); calibrators are then fitted on one half
of unbalanced validation and everything is reported on the other half.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from pav.core.errors import FULL, UserError, unwritable
from pav.core.files import json_text, replace_file
from pav.core.heads import LIK, ORM, q_head
from pav.core.lock import Lock, beside
from pav.core.manifest import PROMPTS
from pav.core.printable import one_line
from pav.core.signals import interruptible
from pav.core.statistics import few
from pav.evaluate.calibration_plot import draw
from pav.evaluate.report import fit_and_report, print_report
from pav.export.vllm import ensure_export
from pav.labels.check import check_ids
from pav.labels.examples import hardened, orm_examples, pav_examples
from pav.labels.files import SOURCES, demand
from pav.labels.tables import LabelSet, read_labels
from pav.policy.opening import print_opening, task_option
from pav.policy.policy import (
    Policy,
    PolicyConfig,
    Prompt,
    asked,
    load_policy,
    model_path,
    settled,
    tokenizer_fingerprint,
    vocabulary_size,
    weights_digest,
)
from pav.policy.rendered import refuse_clock, rendered
from pav.tasks.base import Problem, Task, task_spec
from pav.train.checkpoints import resume_or_refuse, save_whole
from pav.train.config import TrainConfig
from pav.train.fit import fit, label_data
from pav.train.launch import why_not
from pav.train.lightning_internals import be_first, rank
from pav.train.loggers import logger_of
from pav.train.planning import plan
from pav.verifier.checkpoint import (
    FORMAT,
    VerifierMeta,
    card_json,
    load_verifier,
    not_finite,
    prompt_from,
    resolve_task,
)
from pav.verifier.lora import adapters_of, merge_into
from pav.verifier.trunk import HeadedTrunk, load_trunk


def train(config: TrainConfig) -> VerifierMeta | None:
    """Train, calibrate, report, save and export (see :class:`TrainConfig`).

    Returns:
        The card; None in a dry run, and in all processes but the first.

    Raises:
        UserError: if a launcher started other processes than were asked for, or a disk is full.
    """
    if reason := why_not(config, os.environ):
        # Of many processes the first says it.
        raise SystemExit(2) if rank() else UserError(reason)
    try:
        return _as_one_of_many(config)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise unwritable(error.filename or config.output, error) from error


def _as_one_of_many(config: TrainConfig) -> VerifierMeta | None:
    """The first process says what it does, the others are silent."""
    if config.processes == 1:
        be_first()
    if rank():
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            return _train(config)
    if config.dry_run:
        return _train(config)
    output = Path(config.output)
    check_output(config, output)
    with Lock(beside(output), output), interruptible():
        return _train(config)


def _train(config: TrainConfig) -> VerifierMeta | None:
    output, working = Path(config.output), Path(config.output).with_suffix(".training")
    check_output(config, output)
    labels = read_labels(config.labels)
    demand(labels.manifest, SOURCES, f"{config.labels[0]}/manifest.json")
    for warning in labels.warnings:
        print(f"WARNING: {one_line(warning)}")
    if config.processes > 1 and not labels.sealed:
        raise UserError(
            f"labels {config.labels} are not sealed, and {config.processes} processes may find "
            "journals of different length; let data_gen.rollouts seal them first"
        )
    task = resolve_task(labels.manifest["task_spec"], config.task, f"labels {config.labels[0]!r}")
    check_task(task, labels, config.labels[0])
    card = new_card(config, labels, task)
    path = model_path(card.trunk)
    policy = load_policy(
        PolicyConfig(card.trunk, prompt=prompt_from(card.prompt), dtype=config.dtype),
        task.step_rule,
    )
    if tokenizer_fingerprint(policy.tokenizer) != card.tokenizer:
        raise UserError(
            f"trunk {card.trunk!r} has another tokenizer than the labels' policy "
            f"{card.policy['model']!r}; use a trunk of the same tokenizer"
        )
    check_ids(labels.traces, labels.completions, vocabulary_size(path), str(config.labels))
    refuse_clock(policy)
    card = replace(card, trunk_prompt=rendered(policy))
    cap = card.sampler["max_length"]
    train_set, validation = (
        orm_examples(labels, split, policy, cap)
        if config.recipe == "orm"
        else pav_examples(labels, split, card.heads, policy, cap)
        for split in ("train", "validation")
    )
    if not train_set or not validation:
        raise UserError(
            f"labels {config.labels} hold {len(train_set)} training and {len(validation)} "
            "validation traces; both are needed: raise problems or validation_problems"
        )
    for split, part in (("training", train_set), ("validation", validation)):
        if too_few := few(len({e.problem_id for e in part}), split):
            print(f"WARNING: {too_few}", file=sys.stderr)
    if config.loss == "hard":
        train_set, validation = hardened(train_set), hardened(validation)
    print(
        f"{len(train_set)} training and {len(validation)} validation solutions, heads "
        f"{one_line(', '.join(card.heads))} on {one_line(card.trunk)} ({config.trunk_mode})"
    )
    say_opening(task, policy, labels, card)
    gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    plan(config, path, [*train_set, *validation], gpu)
    resume = None
    if not config.dry_run:
        resume = resume_or_refuse(config, card, working, [*train_set, *validation])
    logger_of(config)  # a package that is missing is found before the trunk is loaded
    L.seed_everything(config.seed, verbose=False)
    half = config.trunk_mode == "lora" and not config.precision.startswith("32")
    # On a GPU a frozen trunk computes as it is served; on a CPU single precision is the fast one.
    served = getattr(torch, config.dtype) if gpu else torch.float32
    loaded = {"lora": torch.bfloat16 if half else torch.float32, "frozen": served}
    trunk = load_trunk(path, loaded.get(config.trunk_mode, torch.float32))
    model = HeadedTrunk(trunk, len(card.heads))
    del trunk
    data = label_data(config, model, train_set, validation, policy)
    state = fit(config, model, data, working, resume=resume)
    del data
    if config.dry_run:
        print("dry run: planned, loaded, one batch trained and one validated; nothing was written")
    if state is None:
        return None
    if found := not_finite(card.heads, state):
        raise UserError(
            f"training diverged: {found}; lower lr (now {config.rate:g}), and remove "
            f"{str(working)!r} to train from the beginning"
        )
    adapters = None
    if config.frozen:
        model.load_state_dict(state, strict=False)
    else:
        del model
        model, adapters = trained_model(card, path, state, served)
    if gpu:
        model.cuda()
    # Calibration and report need whole base traces: an ORM is judged on them too.
    judged = pav_examples(labels, "validation", card.heads, policy, cap)
    base_name = PolicyConfig(**{**card.policy, "prompt": Prompt()}).label
    known = (
        pav_examples(labels, "train", card.heads, policy, cap)
        if config.frozen and config.calibrate_on != "validation"
        else []
    )
    card = fit_and_report(card, model.eval(), judged, known, labels, policy, task, base_name)
    save(card, model.cpu(), output, adapters)
    shutil.rmtree(working, ignore_errors=True)
    print_report(card, config.verbose)
    metrics = json_text(card.validation).encode()
    replace_file(output.with_suffix(".json"), metrics)
    draw(card.validation, output.with_suffix(".png"), f"{output.name}: validation")
    print(
        f"verifier: {output} ({output.stat().st_size / 1e3:.0f} kB); all metrics: "
        f"{output.with_suffix('.json')}, {output.with_suffix('.png')}"
    )
    directory, _ = ensure_export(load_verifier(str(output)), path)
    print(f"export for vLLM: {directory}")
    following = f"search.beam --verifier {shlex.quote(str(output))}{task_option(card.task)}"
    if config.recipe == "orm":
        following = "search.compare --help"
    print(f"next: {following}")
    return card


def say_opening(task: Task, policy: Policy, labels: LabelSet, card: VerifierMeta) -> None:
    """Say on what, how asked, the trunk is trained."""
    base = card.policy_config()
    sampler = card.sampler_config()
    if policy.config.prompt != base.prompt:
        print(f"the trunk is asked with another prompt than the policy {base.model!r} was")
    first = labels.traces[0]
    counts = Counter({t.problem_id: t.split for t in labels.traces}.values())
    said = ", ".join(f"{n} {split}" for split, n in sorted(counts.items())) + " problems"
    problem = Problem(first.problem_id, first.question, first.gold)
    cap = f"length cap: {sampler.max_length} tokens, prompt and solution"
    print_opening(task, said, [("trunk", policy)], problem, sampler, cap)


def trained_model(
    card: VerifierMeta, path: str, state: dict[str, Tensor], dtype: torch.dtype
) -> tuple[HeadedTrunk, dict[str, Tensor] | None]:
    """The trained model as it will be served, adapters merged, and the adapters alone."""
    model = HeadedTrunk(load_trunk(path, dtype), len(card.heads))
    if not card.lora:
        model.load_state_dict(state)
        return model, None
    adapters = adapters_of({k.removeprefix("trunk."): v for k, v in state.items()})
    merge_into(model.trunk, adapters, card.lora)
    model.load_state_dict({k: v for k, v in state.items() if k.startswith("head.")}, strict=False)
    return model, adapters


def check_output(config: TrainConfig, output: Path) -> None:
    """Never write over a checkpoint, and find out early where nothing can be written."""
    if output.exists():
        raise UserError(f"output {config.output!r} exists; choose another name or remove it")
    if config.dry_run:
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(output.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"output {config.output!r} cannot be written there; choose another place")


def check_task(task: Task, labels: LabelSet, where: str) -> None:
    """The task must be the one that the labels are about."""
    if task.fingerprint != labels.manifest["task"]:
        raise UserError(
            f"labels {where!r} were made for another setting of the task (theirs: "
            f"{labels.manifest['task']}, given: {task.fingerprint}); give the same --task settings"
        )


def new_card(config: TrainConfig, labels: LabelSet, task: Task) -> VerifierMeta:
    """The card of a verifier about to be trained."""
    manifest = labels.manifest
    policy = manifest["policy"]
    base = PolicyConfig(**{**policy, "prompt": prompt_from(policy["prompt"])})
    is_pav = config.recipe != "orm"
    heads = heads_of(config, labels, base.label) if is_pav else [ORM]
    prompt = base.prompt
    if config.prompt is not None:
        prompt = settled(asked(PolicyConfig(prompt=config.prompt), task)).prompt
    trunk = config.trunk or base.model
    digest = weights_digest(model_path(trunk))
    return VerifierMeta(
        heads=heads,
        recipe="pav" if is_pav else "orm",
        trunk=trunk,
        trunk_digest=digest,
        frozen=config.frozen,
        prompt=asdict(prompt),
        dtype=config.dtype,
        task=task_spec(task),
        task_fingerprint=task.fingerprint,
        policy=asdict(base),
        policy_fingerprint=manifest["policy_fingerprint"],
        tokenizer=manifest["tokenizer"],
        sampler=manifest["sampler"],
        base_head=heads[0] if is_pav else "",
        prover_head=next((h for h in heads[1:] if h.startswith("q/")), heads[0]) if is_pav else "",
        alpha=0.0 if config.recipe == "pqv" else config.alpha,
        pick="last" if is_pav else ORM,
        lora={"rank": config.lora.rank, "alpha": config.lora.alpha}
        if config.trunk_mode == "lora"
        else {},
        loss=config.loss,
        policy_prompt=manifest.get(PROMPTS, {}).get(base.label, {}),
    )


def heads_of(config: TrainConfig, labels: LabelSet, base: str) -> list[str]:
    """Heads of a PAV or PQV, that of the base policy first.

    Q of every rollout policy, likelihoods where their table lies beside the labels, and the ORM's
    where solutions are graded. A PQV has Q of the base policy and ORM.

    Raises:
        UserError: if nothing is known of the base policy, or the loss does not fit the labels.
    """
    rolled_out, likely = labels.policies, labels.likelihood_policies
    provers = [] if config.recipe == "pqv" else [name for name in rolled_out if name != base]
    heads = [q_head(name) for name in [base, *provers] if name in rolled_out]
    if config.recipe == "pav":
        heads += [LIK + name for name in sorted(likely, key=lambda name: (name != base, name))]
    if not heads or heads[0] not in (q_head(base), LIK + base):
        raise UserError(
            f"labels {config.labels} have no rollouts under the base policy {base!r}, and no "
            "likelihoods; Q_base cannot be learned from them"
        )
    if config.loss == "hard" and any(h.startswith(LIK) for h in heads):
        raise UserError(
            f"loss is {config.loss!r}, which is about counts, but labels {config.labels} hold "
            "likelihoods as well; use --loss bce or mse"
        )
    return [*heads, ORM] if labels.graded else heads


def save(
    card: VerifierMeta, model: HeadedTrunk, output: Path, adapters: dict[str, Tensor] | None = None
) -> None:
    """Write the checkpoint in Lightning's format.

    Args:
        card: what the verifier remembers.
        model: trunk and heads; a frozen or adapted trunk is not written.
        output: the file.
        adapters: what changed of an adapted trunk.
    """
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    if card.frozen or adapters is not None:
        state = {k: v for k, v in state.items() if not k.startswith("model.trunk.")}
    state |= {f"model.adapters.{k}": v for k, v in (adapters or {}).items()}
    checkpoint = {
        "state_dict": state,
        "verifier": card_json(card),
        "format": FORMAT,
        "pytorch-lightning_version": L.__version__,
    }
    save_whole(checkpoint, output)
