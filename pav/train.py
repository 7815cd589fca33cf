"""``pav.train``: train a verifier (or its ORM baseline) on labels.

One forward pass over a trace scores all its prefixes; heads are fitted with BCE on counts (k of n),
both classes of Q weighted equally (PAV paper, Appendix D); calibrators are then fitted on one half
of unbalanced validation and everything is reported on the other half.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from transformers import AutoConfig

from pav.batches import MAX_WASTE
from pav.checkpoints import resume_or_refuse
from pav.cli import run
from pav.data import (
    TOKENS_PER_BATCH,
    Example,
    batches,
    hardened,
    orm_examples,
    padding_waste,
    pav_examples,
)
from pav.errors import UserError
from pav.export import ensure_export
from pav.fit import fit, label_data
from pav.labels import LabelSet, read_labels
from pav.loggers import logger_of
from pav.lora import adapters_of, check_targets, merge_into
from pav.memory import GIB, MemoryPlan, Work, device_memory, plan_memory, shape_of, ways_out
from pav.policy import (
    PolicyConfig,
    Prompt,
    load_policy,
    model_path,
    tokenizer_fingerprint,
    weights_digest,
)
from pav.reliability import draw
from pav.report import fit_and_report, print_report
from pav.stats import few
from pav.tasks.base import Task, task_spec
from pav.train_config import TrainConfig
from pav.trunk import HeadedTrunk, load_trunk, refuse_unservable
from pav.verifier import (
    FORMAT,
    LIK,
    ORM,
    Card,
    card_json,
    load_verifier,
    prompt_from,
    q_head,
    resolve_task,
)


def train(config: TrainConfig) -> Card | None:
    """Train, calibrate, report, save and export (see :class:`TrainConfig`).

    Returns:
        The card; None in a dry run, and in all processes but the first.
    """
    if config.processes == 1:
        # A task of a bigger job (SLURM_PROCID) is first among one.
        setattr(rank_zero_only, "rank", 0)  # noqa: B010
    if getattr(rank_zero_only, "rank", 0):
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            return _train(config)
    return _train(config)


def _train(config: TrainConfig) -> Card | None:
    output, working = Path(config.output), Path(config.output).with_suffix(".training")
    check_output(config, output)
    labels = read_labels(config.labels)
    task = resolve_task(labels.manifest["task_spec"], config.task, f"labels {config.labels[0]!r}")
    check_task(task, labels, config.labels[0])
    card = new_card(config, labels, task)
    path = model_path(config.trunk)
    policy = load_policy(
        PolicyConfig(config.trunk, prompt=prompt_from(card.prompt), dtype=config.dtype),
        task.step_rule,
    )
    if tokenizer_fingerprint(policy.tokenizer) != card.tokenizer:
        raise UserError(
            f"trunk {config.trunk!r} has another tokenizer than the labels' policy "
            f"{card.policy['model']!r}; use a trunk of the same tokenizer"
        )
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
        if warning := few(len({e.problem_id for e in part}), split):
            print(f"WARNING: {warning}", file=sys.stderr)
    if config.loss == "hard":
        train_set, validation = hardened(train_set), hardened(validation)
    print(
        f"{len(train_set)} training and {len(validation)} validation solutions, heads "
        f"{', '.join(card.heads)} on {config.trunk} ({config.trunk_mode})"
    )
    gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    plan(config, path, [*train_set, *validation], gpu)
    if not config.dry_run:
        resume_or_refuse(config, card, working, [*train_set, *validation])
    logger_of(config)  # a package that is missing is found before the trunk is loaded
    L.seed_everything(config.seed, verbose=False)
    half = config.trunk_mode == "lora" and not config.precision.startswith("32")
    # On a GPU a frozen trunk computes as it is served; on a CPU single precision is the fast one.
    served = getattr(torch, config.dtype) if gpu else torch.float32
    loaded = {"lora": torch.bfloat16 if half else torch.float32, "frozen": served}
    trunk = load_trunk(path, loaded.get(config.trunk_mode, torch.float32))
    model = HeadedTrunk(trunk, len(card.heads), config.head)
    del trunk
    data = label_data(config, model, train_set, validation, policy)
    state = fit(config, model, data, working)
    del data
    if config.dry_run:
        print("dry run: planned, loaded, one batch trained and one validated; nothing was written")
    if state is None:
        return None
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
    print_report(card)
    # Undefined metrics are NaN here and null there: NaN is no JSON.
    plain = json.loads(json.dumps(card.validation), parse_constant=lambda _: None)
    output.with_suffix(".json").write_text(json.dumps(plain, indent=1))
    draw(card.validation, output.with_suffix(".png"), f"{output.name}: validation")
    print(f"verifier: {output} ({output.stat().st_size / 1e6:.1f} MB)")
    if config.head == "mlp":
        print(
            f"an mlp head is not served by vLLM: what it buys is in {output.with_suffix('.json')}"
            "\nnext: pav.train --head linear"
        )
        return card
    directory, _ = ensure_export(load_verifier(str(output)), path)
    print(f"export for vLLM: {directory}")
    following = (
        "search.compare --help" if config.recipe == "orm" else f"search.beam --verifier {output}"
    )
    print(f"next: {following}")
    return card


def trained_model(
    card: Card, path: str, state: dict[str, Tensor], dtype: torch.dtype
) -> tuple[HeadedTrunk, dict[str, Tensor] | None]:
    """The trained model as it will be served, adapters merged, and the adapters alone."""
    model = HeadedTrunk(load_trunk(path, dtype), len(card.heads), card.head)
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


def plan(config: TrainConfig, path: str, examples: list[Example], gpu: bool) -> MemoryPlan:
    """Print padding and memory, and refuse what does not fit.

    Raises:
        UserError: naming settings that would fit.
    """
    longest = max(len(e.ids) for e in examples)
    if not config.frozen:
        parts = list(batches(examples, None, config.tokens_per_batch, MAX_WASTE))
        print(
            f"{len(parts)} batches of up to {max(config.tokens_per_batch, longest)} tokens, "
            f"{padding_waste(parts):.1%} of them padding"
        )
    if config.trunk_mode == "full" and config.precision == "bf16-true":
        print(
            "WARNING: bf16-true keeps 8 bits of a weight: updates below 1/256 of it are lost; "
            "bf16-mixed keeps them"
        )
    described = AutoConfig.from_pretrained(path, trust_remote_code=False)
    refuse_unservable(described)
    shape = shape_of(described)
    if config.trunk_mode == "lora":
        check_targets(config.lora, shape.linear_widths)
    work = Work(
        config.trunk_mode,
        config.precision,
        config.dtype if gpu else "float32",
        max(TOKENS_PER_BATCH if config.frozen else config.tokens_per_batch, longest),
        longest,
        config.gradient_checkpointing,
        shape.adapter_parameters(config.lora) if config.trunk_mode == "lora" else 0,
        config.processes if config.strategy == "fsdp" else 1,
    )
    planned = plan_memory(shape, work)
    budget = int(config.memory_gib * GIB) if config.memory_gib else device_memory(gpu)
    print(f"memory: about {planned} of {budget / GIB:.1f} GiB")
    if planned.total > budget:
        ways = ways_out(shape, work, config.lora, budget)
        raise UserError(
            f"training {config.trunk!r} needs about {planned}, and a device has "
            f"{budget / GIB:.1f} GiB (memory_gib); "
            + (f"these fit: {'; '.join(ways)}" if ways else "take a smaller trunk")
        )
    return planned


def check_task(task: Task, labels: LabelSet, where: str) -> None:
    """The task must be the one that the labels are about."""
    if task.fingerprint != labels.manifest["task"]:
        raise UserError(
            f"labels {where!r} were made for another setting of the task (theirs: "
            f"{labels.manifest['task']}, given: {task.fingerprint}); give the same --task settings"
        )


def new_card(config: TrainConfig, labels: LabelSet, task: Task) -> Card:
    """The card of a verifier about to be trained."""
    manifest = labels.manifest
    policy = manifest["policy"]
    base = PolicyConfig(**{**policy, "prompt": prompt_from(policy["prompt"])})
    is_pav = config.recipe != "orm"
    heads = heads_of(config, labels, base.label) if is_pav else [ORM]
    prompt = config.prompt or base.prompt
    digest = weights_digest(model_path(config.trunk))
    return Card(
        heads=heads,
        recipe="pav" if is_pav else "orm",
        trunk=config.trunk,
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
        head=config.head,
        loss=config.loss,
    )


def heads_of(config: TrainConfig, labels: LabelSet, base: str) -> list[str]:
    """Heads of a PAV or PQV, that of the base policy first.

    Q of every rollout policy, likelihoods where their table lies beside the labels, and the ORM's
    where solutions are graded. A PQV has Q of the base policy and ORM.

    Raises:
        UserError: if nothing is known of the base policy, or the loss does not fit the labels.
    """
    told, likely = labels.policies, labels.likelihood_policies
    provers = [] if config.recipe == "pqv" else [name for name in told if name != base]
    heads = [q_head(name) for name in [base, *provers] if name in told]
    if config.recipe == "pav":
        heads += [LIK + name for name in sorted(likely, key=lambda name: (name != base, name))]
    if not heads or heads[0] not in (q_head(base), LIK + base):
        raise UserError(
            f"labels {config.labels} have no rollouts under the base policy {base!r}, and no "
            "likelihoods; Q_base cannot be learned from them"
        )
    if config.loss in ("hard", "beta_binomial") and any(h.startswith(LIK) for h in heads):
        raise UserError(
            f"loss is {config.loss!r}, which is about counts, but labels {config.labels} hold "
            "likelihoods as well; use --loss bce or mse"
        )
    return [*heads, ORM] if labels.graded else heads


def save(
    card: Card, model: HeadedTrunk, output: Path, adapters: dict[str, Tensor] | None = None
) -> None:
    """Write the checkpoint in Lightning's format.

    Args:
        card: what the verifier remembers.
        model: trunk and heads; a frozen or adapted trunk is not written.
        output: the file.
        adapters: what changed of an adapted trunk.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
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
    temporary = output.with_suffix(".tmp")
    torch.save(checkpoint, temporary)
    temporary.replace(output)


def main() -> None:
    """Entry point of ``pav.train``."""
    run(train, TrainConfig, "pav.train")


if __name__ == "__main__":
    main()
