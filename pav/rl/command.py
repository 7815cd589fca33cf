"""``pav.rl``: what a run is opened with, and what it ends by saying."""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from lightning.fabric import Fabric

from pav.core.errors import UserError
from pav.core.files import json_text, read_object, replace_file
from pav.core.heads import ORM
from pav.core.lock import LOCK, Lock
from pav.core.manifest import PROMPTS, refuse_other
from pav.core.signals import interruptible
from pav.core.statistics import few
from pav.engine.loading import check_model
from pav.grading.sandbox import GRADER_LOG, guarded
from pav.policy.opening import print_opening, settle_cap, task_for, task_option
from pav.policy.policy import (
    Policy,
    PolicyConfig,
    Sampler,
    asked,
    like,
    load_policy,
    tokenizer_fingerprint,
)
from pav.policy.rendered import refuse_clock, rendered
from pav.reward_models.reward_model import PRM, RewardModel
from pav.rl.chain import Tags
from pav.rl.checkpoint import LAST
from pav.rl.config import RlConfig, check_sampler
from pav.rl.engines import Serving, serving
from pav.rl.loop import Run, iterate, train
from pav.rl.memory import settle
from pav.rl.references import References
from pav.rl.refresh import refreshed
from pav.rl.report import PAGE, SETTINGS
from pav.rl.reward import Rewarder
from pav.rl.rollout import Actor
from pav.rl.shards import set_up, strategy_of
from pav.tasks.base import Problem, Task, task_spec
from pav.train.launch import why_not
from pav.train.lightning_internals import be_first, be_quiet, rank
from pav.train.loggers import logger_at
from pav.verifier.checkpoint import VerifierMeta
from pav.verifier.library import LoadedVerifier, load_verifier
from pav.verifier.score import best_of, check_prover, provers

# What may change when a run goes on.
FREE = (
    "output", "engine", "accelerator", "strategy", "devices", "num_nodes", "workers", "ray",
    "checkpoint_every", "samples_every", "guards", "logger", "grade_timeout", "dry_run",
    "mismatch_limit", "truncation_limit", "tokens_per_batch", "gradient_checkpointing", "trunk",
)  # fmt: skip


def rl(config: RlConfig) -> None:
    """Train a policy (see :class:`RlConfig`).

    Raises:
        UserError: naming the setting that cannot be, and what to give.
    """
    if reason := why_not(config, os.environ, "pav.rl"):
        # Of many processes the first says it.
        raise SystemExit(2) if rank() else UserError(reason)
    if config.processes == 1:
        be_first()
    if rank():
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            _rl(config)
        return
    output = Path(config.output)
    if config.dry_run:
        _rl(config)
        return
    with Lock(output / LOCK, output):
        _rl(config)


def _rl(config: RlConfig) -> None:
    directory = Path(config.output)
    rewarder, policy, task, sampler = opened(config)
    problems, held_out = problems_of(config, task)
    sampler, cap = settle_cap(sampler, task, [policy], [*problems, *held_out])
    print_opening(
        task, f"{len(problems)} train, {len(held_out)} validation problems",
        [("policy", policy)], problems[0], sampler, cap,
    )  # fmt: skip
    print(_said(config, rewarder))
    gpu = torch.cuda.is_available() and config.accelerator != "cpu"
    scorers = [rewarder.reading, rewarder.reward_model, rewarder.orm]
    device = settle(config, policy, [s for s in scorers if s is not None], sampler, gpu)
    if not config.dry_run and not rank():
        _refuse_other(config, directory, rewarder, policy, task, sampler)
    check_model(policy.path, policy.config.dtype, sampler.max_length, device)
    be_quiet()
    # The order matters: an engine makes a process group of its own, and takes torch's seed.
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        precision=config.precision,
        strategy=strategy_of(config),
    )
    fabric.launch()
    references = rewarder.references
    assert references is not None
    engine = serving(config, policy, sampler, device, fabric.local_rank, references.endings)
    with interruptible(), guarded(task, directory / GRADER_LOG, config.grade_timeout) as grader:
        try:
            engine.start()
            if rewarder.reward_model is not None:
                rewarder.reward_model.start()
            actor = Actor(engine, policy, sampler, grader, references, config.seed)
            run = assembled(config, fabric, engine, actor, rewarder, problems, held_out)
            if config.dry_run:
                dry(run)
                return
            try:
                train(run)
            finally:
                for logger in run.loggers:
                    logger.finalize("success")
        finally:
            engine.shutdown()
    if run.is_first:
        _say_end(run, task)


def _said(config: RlConfig, rewarder: Rewarder) -> str:
    """What is rewarded, in a line."""
    whole = "outcome" if config.orm is None else f"outcome by {config.orm}"
    parts = [whole if config.reward == "outcome" else config.reward]
    if config.dense == "likelihood":
        parts.append(f"likelihood progress of steps, alpha {config.alpha:g}")
    elif config.dense != "none":
        parts.append(
            f"dense reward {config.dense}, alpha {config.alpha:g}, prover {rewarder.prover}"
        )
    if config.reward_model is not None:
        parts[-1] += f" of {config.reward_model.model}"
    if config.verifier is not None:
        parts.append(f"verifier {config.verifier} (frozen)")
    return f"reward: {', '.join(parts)}"


def opened(config: RlConfig) -> tuple[Rewarder, Policy, Task, Sampler]:
    """Rewards, policy, task and sampler: by what the verifier remembers, or as they are given.

    Raises:
        UserError: if they do not belong together.
    """
    found = _opened_alone(config) if config.verifier is None else _opened(config, config.verifier)
    rewarder, policy, task, sampler = found
    if not task.is_graded and config.reward == "outcome" and config.orm is None:
        raise UserError(
            f"reward is outcome, and task {task.name!r} has no grader that says it; give --reward "
            "logprob, or another of the reference answer"
        )
    refuse_clock(policy)
    tags = Tags(*(config.answer_tags or task.answer_tags))
    if config.reward in ("base", "base_100") and not tags.opening:
        raise UserError(
            f"reward is {config.reward}, which reads an answer between tags; there are none: add "
            "--answer_tags '[<answer>, </answer>]' (with a prompt that asks for them)"
        )
    references = References(policy, task, tags, config.seed)
    rewarder = replace(
        rewarder, kind=config.reward, references=references, discount=config.discount
    )
    if (reward_model := _reward_model(config, policy)) is not None:
        rewarder = replace(rewarder, reward_model=reward_model, prover=PRM)
    if config.is_sharded and config.reads_references(task.is_graded):
        raise UserError(
            f"strategy is fsdp, and reference answers are read of the policy (reward "
            f"{config.reward}, dense {config.dense}, task {task.name!r}), which needs it whole; "
            "use --strategy ddp"
        )
    return rewarder, policy, task, sampler


def _opened_alone(config: RlConfig) -> tuple[Rewarder, Policy, Task, Sampler]:
    """Without a verifier."""
    assert config.policy is not None
    chosen = config.policy
    task = task_for(config.task, [chosen.model])
    if config.init is not None:
        chosen = like(PolicyConfig(config.init, dtype=chosen.dtype), chosen)
    policy = load_policy(asked(chosen, task), task.step_rule)
    return Rewarder(None, config.dense, ""), policy, task, config.sampler or Sampler()


def _opened(config: RlConfig, path: str) -> tuple[Rewarder, Policy, Task, Sampler]:
    """With a verifier."""
    verifier = load_verifier(path, task=config.task, trunk=config.trunk)
    card, source = verifier.checkpoint.card, f"verifier {path!r}"
    if torch.cuda.is_available():  # on a CPU single precision is the fast one
        verifier = replace(verifier, dtype=card.dtype)
    reads_heads = config.dense not in ("none", "likelihood") and config.reward_model is None
    if reads_heads and not card.base_head:
        raise UserError(
            f"{source} is an ORM, which says nothing of steps; give a verifier of recipe pav, or "
            f"--dense none --orm {path}"
        )
    prover = config.prover or card.prover_head
    if config.dense not in ("none", "q_base") and config.reward_model is None:
        check_prover(prover, card.heads)
    remembered = card.policy_config()
    chosen = remembered
    if config.init is not None:
        chosen = like(PolicyConfig(config.init, dtype=remembered.dtype), remembered)
    policy = load_policy(asked(chosen, verifier.task), verifier.task.step_rule)
    for who, tokens in (("policy", policy), ("trunk", verifier.trunk)):
        if tokenizer_fingerprint(tokens.tokenizer) != card.tokenizer:
            raise UserError(
                f"{who} {tokens.config.model!r} has another tokenizer than {source}; give one of "
                f"the tokenizer of {remembered.model!r}, or train a verifier for this one"
            )
    if config.refresh_labels_every:
        check_refreshable(config, prover, card)
    sampler = config.sampler or card.sampler_config()
    check_sampler(sampler, "sampler" if config.sampler else f"the sampler of {source}")
    if not sampler.max_length:
        sampler = replace(sampler, max_length=card.sampler["max_length"])
    orm = _orm(config, card)
    return Rewarder(verifier, config.dense, prover, orm), policy, verifier.task, sampler


def check_refreshable(config: RlConfig, prover: str, card: VerifierMeta) -> None:
    """Refuse to refresh labels that no reward is made of.

    Raises:
        UserError: naming the prover.
    """
    made_of = {name for name, _ in provers(prover)} - {card.base_head}
    if config.dense in ("none", "likelihood") or any(best_of(name) is None for name in made_of):
        raise UserError(
            f"refresh_labels_every makes labels of the policy itself, and the reward is dense "
            f"{config.dense} of prover {prover!r}; give --prover bo4 or {card.base_head}, or leave "
            "it out"
        )


def _orm(config: RlConfig, card: VerifierMeta) -> LoadedVerifier | None:
    """The learned outcome reward, if one is named."""
    if config.orm is None:
        return None
    orm = load_verifier(config.orm, task=config.task)
    if orm.checkpoint.card.base_head:
        raise UserError(f"orm {config.orm!r} is no ORM; give a checkpoint of recipe orm")
    if orm.checkpoint.card.tokenizer != card.tokenizer:
        raise UserError(
            f"orm {config.orm!r} has another tokenizer than {config.verifier!r}; train an ORM on "
            "the same labels"
        )
    return orm


def _reward_model(config: RlConfig, policy: Policy) -> RewardModel | None:
    """The third-party PRM that the dense reward is made of, if one is named."""
    if config.reward_model is None:
        return None
    found = RewardModel(config.reward_model, policy)
    if found.head == ORM:
        raise UserError(
            f"reward_model {config.reward_model.model!r} scores whole solutions (layout "
            f"{found.layout}), and --dense {config.dense} rewards steps; give a PRM"
        )
    return found


def problems_of(config: RlConfig, task: Task) -> tuple[list[Problem], list[Problem]]:
    """Training problems, and those that accuracy is measured on.

    Raises:
        UserError: if there are fewer than a batch, or none to measure on.
    """
    problems = list(islice(task.problems("train"), config.problems))
    if len(problems) < config.batch:
        raise UserError(
            f"task {task.name!r} has {len(problems)} training problems, fewer than batch "
            f"({config.batch}); lower batch, or give more problems"
        )
    held_out = list(islice(task.problems("validation"), config.eval_problems))
    if config.eval_problems and not held_out:
        raise UserError(f"task {task.name!r} has no validation problems; set eval_problems 0")
    if held_out and (warning := few(len(held_out), "validation", config.eval_problems)):
        print(f"WARNING: {warning}", file=sys.stderr)
    return problems, held_out


def _refuse_other(
    config: RlConfig,
    directory: Path,
    rewarder: Rewarder,
    policy: Policy,
    task: Task,
    sampler: Sampler,
) -> None:
    """Write down what is trained; a run of another configuration is not resumed."""
    settings = {k: v for k, v in asdict(config).items() if k not in FREE}
    settings |= {
        "task": task_spec(task),
        "sampler": asdict(sampler),
        "verifier_digest": rewarder.verifier and rewarder.verifier.checkpoint.digest,
        "policy": asdict(policy.config),
        "policy_fingerprint": policy.fingerprint,
        PROMPTS: {"the policy": rendered(policy)},
    }
    if rewarder.reward_model is not None:
        settings["reward_model_digest"] = rewarder.reward_model.digest
    plain = json.loads(json_text(settings))
    path = directory / SETTINGS
    if (directory / LAST).exists() and path.exists():
        found = read_object(path, "restore it, or choose another output")
        refuse_other(f"the run in {str(directory)!r}", found, plain)
        return
    if any((directory / name).exists() for name in ("config.json", "manifest.json")):
        raise UserError(f"output {str(directory)!r} holds something else; choose another directory")
    replace_file(path, json_text(plain))


def assembled(
    config: RlConfig,
    fabric: Fabric,
    engine: Serving,
    actor: Actor,
    rewarder: Rewarder,
    problems: list[Problem],
    held_out: list[Problem],
) -> Run:
    """The run, at its start or where its checkpoint left it."""
    directory = Path(config.output)
    path, temperature = actor.policy.path, actor.sampler.temperature
    state, learner, wrapped, optimizer, reference, start = set_up(
        config, fabric, path, temperature, directory / LAST
    )
    if state.refreshed is not None and rewarder.verifier is not None:
        rewarder = replace(rewarder, verifier=refreshed(rewarder.verifier, state.refreshed))
    if state.iteration:
        print(f"resuming after iteration {state.iteration}")
    loggers = []
    if config.logger != "none" and not config.dry_run and fabric.is_global_zero:
        loggers = [
            logger_at(config.logger, directory / "logs", directory.name, directory / "wandb_id")
        ]
    return Run(
        config, directory, fabric, engine, actor, rewarder, learner, wrapped, optimizer, reference,
        problems, held_out, state, loggers=loggers, start=start,
    )  # fmt: skip


def dry(run: Run) -> None:
    """One iteration, of which nothing is kept; says what it took."""
    _, _, metrics = iterate(run)
    total = sum(run.seconds.values())
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in run.seconds.items())
    hours = total * run.config.iterations / 3600
    print(
        f"dry run: one iteration of {run.config.batch} x {run.config.group} traces took "
        f"{total:.1f} s ({parts}); reward {metrics['train/outcome']:.3g}, "
        f"{metrics['train/tokens']:.0f} tokens and {metrics['train/steps']:.1f} steps a trace, "
        f"truncated {metrics['train/truncated']:.3f}, groups all alike "
        f"{metrics['train/dead_groups']:.3f}, log-probability mismatch "
        f"{metrics['mismatch/mean']:.2g}; {run.config.iterations} iterations: about {hours:.1f} h; "
        "nothing was written"
    )


def _say_end(run: Run, task: Task) -> None:
    """Where the results are, and what to type next."""
    directory, state = run.directory, run.state
    best = directory / "best" if (directory / "best").exists() else directory / "last"
    if state.best >= 0:
        what = "accuracy" if task.is_graded else "probability of a token of the reference"
        print(f"best held-out {what} {state.best:.3f}, after iteration {state.best_iteration}")
    if run.config.verifier is None:
        print(f"policies: {directory / 'last'}, {best}; report: {directory / PAGE}")
        return
    print(
        f"policies: {directory / 'last'}, {best}; report: {directory / PAGE}\n"
        f"next: search.beam --verifier {shlex.quote(run.config.verifier)} --policy "
        f"{shlex.quote(str(best))}{task_option(task_spec(task))}"
    )
