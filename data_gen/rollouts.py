"""``data_gen.rollouts``: Monte-Carlo labels for every step of many solutions.

Solutions come from the base policy and, by share, from the prover. From every prefix at a step
boundary, step 0 (the problem itself) included, the rollout policies finish the solution ``n_mc``
times; the share of right answers estimates Q (PAV paper, Eq. 1 and Section 4.2).
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from math import inf
from time import monotonic
from typing import Any

from data_gen.config import RolloutsConfig, _shard
from data_gen.engines import loaded
from data_gen.importers.traces import digest, given_rounds
from data_gen.inspect.card import write_data_card
from data_gen.inspect.health import print_health, write_health
from data_gen.inspect.watch import Doubtful, watch_for
from data_gen.label_run import Run, print_next
from data_gen.labeler import Labeler, OutOfTime, PlannedTrace, label, missing
from data_gen.store import MANIFEST, Store
from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.manifest import PROMPTS
from pav.core.renamed import on_disk
from pav.core.signals import interruptible
from pav.core.statistics import few
from pav.engine.loading import check_model
from pav.grading.sandbox import GRADER_LOG, GraderFailed, guarded
from pav.policy.opening import check_policies, print_opening, settle_cap
from pav.policy.policy import (
    Policy,
    Sampler,
    asked,
    load_policy,
    tokenizer_fingerprint,
)
from pav.policy.rendered import refuse_clock, rendered, warn_clock
from pav.tasks.base import Problem, Split, task_spec


def rollouts(config: RolloutsConfig) -> None:
    """Make or resume a label run (see :class:`RolloutsConfig`)."""
    deadline = inf if config.hours is None else monotonic() + config.hours * 3600
    policies = [load_policy(asked(p, config.task), config.task.step_rule) for p in config.policies]
    check_policies(policies)
    is_new = not (config.directory / MANIFEST).exists()
    for policy in policies:
        # A run of an older version goes on.
        (refuse_clock if is_new else warn_clock)(policy)
    config = replace(config, sampler=say_opening(config, policies))
    rounds = _rounds(config, policies)
    if config.dry_run:
        from data_gen.pilot import print_plan

        with interruptible():
            print_plan(config, policies, rounds)
        return
    manifest = _manifest(config, policies)
    fingerprints = {p.config.label: p.fingerprint for p in policies}
    if not (config.directory / MANIFEST).exists() and config.ray is None:
        # Before the directory is this run's: another model would be another run.
        for p in policies:
            check_model(p.path, p.config.dtype, config.sampler.max_length, config.engine)
    stopped, doubtful, broken = False, None, None
    stepper = policies[0].stepper
    watch = watch_for(config.task, stops=not config.ignore_warnings)
    with interruptible(), Store(config.directory, manifest) as store:
        if any(missing(rounds, config.plan, store, stepper)):
            log = config.directory / GRADER_LOG
            try:
                watch.recall([*store.traces.values(), *store.completions.values()], fingerprints)
                store.announce(sum(map(len, rounds)))
                with (
                    loaded(config, policies) as rollout_policies,
                    guarded(config.task, log, config.grade_timeout) as grader,
                ):
                    labeler = Labeler(
                        grader, rollout_policies, config.plan, config.seed, store, deadline, watch
                    )
                    label(labeler, rounds, config.concurrency * config.workers)
            except OutOfTime:
                stopped = True
            except Doubtful as error:
                doubtful = error
            except GraderFailed as error:
                broken = error
        left = [len(traces) for traces in missing(rounds, config.plan, store, stepper)]
        store.seal(fingerprints, owed=sum(left))
        records = Run(config.directory, manifest, store.traces, store.completions,
                      seconds=store.seconds)  # fmt: skip
        _summary(config, records, left, stopped)
        if not (doubtful or broken):
            print_next(records)
    if broken:
        raise UserError(
            f"{broken}. What is finished is sealed; when the grader is mended, data_gen.regrade "
            f"{config.directory} grades it anew and the same command goes on"
        ) from broken
    if doubtful:
        raise UserError(
            f"stopped early: {doubtful}. What is finished is sealed in {str(config.directory)!r}; "
            "mend it and choose another output, or give the same command with --ignore_warnings "
            "true to go on"
        )


def say_opening(config: RolloutsConfig, policies: list[Policy]) -> Sampler:
    """Say what the run is about; the sampler, with a length cap where none is given."""
    problems = _problems(config)
    everything = [problem for _, problem in problems]
    # That of all shards: labels of different samplers cannot be merged.
    sampler, cap = settle_cap(config.sampler, config.task, policies, everything)
    counts = Counter(split for split, _ in problems)
    asked_for: dict[Split, int] = {
        "train": config.problems,
        "validation": config.validation_problems,
    }
    for split, count in asked_for.items():
        if count and (warning := few(counts[split], split, count)):
            print(f"WARNING: {warning}", file=sys.stderr)
    roles = [("policy" if i == 0 else "prover", p) for i, p in enumerate(policies)]
    said = ", ".join(f"{n} {split}" for split, n in counts.items()) + " problems"
    print_opening(config.task, said, roles, everything[0], sampler, cap)
    return sampler


def _problems(config: RolloutsConfig) -> list[tuple[Split, Problem]]:
    wanted: list[tuple[Split, int]] = [
        ("train", config.problems),
        ("validation", config.validation_problems),
    ]
    found: list[tuple[Split, Problem]] = []
    for split, count in wanted:
        if not count:
            continue
        part = islice(config.task.problems(split), config.skip, config.skip + count)
        found += [(split, problem) for problem in part]
    if not any(split == "train" for split, _ in found):
        raise UserError(
            f"task {config.task.name!r} has no training problems after skip={config.skip}; "
            "check task.data and problems"
        )
    return found


def _manifest(config: RolloutsConfig, policies: list[Policy]) -> dict[str, Any]:
    base = policies[0]
    # None where the run does not depend on it: runs of older versions have no such key.
    given = config.traces_from is not None
    manifest: dict[str, Any] = {
        "format": 1,
        "task": config.task.fingerprint,
        "task_spec": task_spec(config.task),
        "tokenizer": tokenizer_fingerprint(base.tokenizer),
        "policy": asdict(base.config),
        "policy_fingerprint": base.fingerprint,
        "rollout_policies": {p.config.label: p.fingerprint for p in policies},
        PROMPTS: {p.config.label: rendered(p) for p in policies},
        "sampler": asdict(config.sampler),
        "seed": config.seed,
        **{
            key: getattr(config, key)
            for key in (
                "problems",
                "skip",
                "validation_problems",
                "n_mc",
                "shard",
                "max_labelled_prefixes",
            )
        },
        "strategy": None if config.strategy == "all_prefixes" else config.strategy,
        "branches": config.branches or None,
        "n_traces": None if given else config.n_traces,
        "prover_share": None if given else config.prover_share,
        "traces_from": digest(config.traces_from) if config.traces_from is not None else None,
    }
    return on_disk(manifest)


def _rounds(config: RolloutsConfig, policies: list[Policy]) -> list[list[PlannedTrace]]:
    """The solutions of the run, one per problem in a round; the writers take turns."""
    problems = _problems(config)
    i, n = _shard(config.shard or "0/1")
    own = problems[i::n]
    if not own:
        raise UserError(
            f"shard is {config.shard!r}, but there are {len(problems)} problems; use fewer shards"
        )
    if config.traces_from is not None:
        given = given_rounds(config.traces_from, problems, policies[0], config.sampler.max_length)
        ids = {problem.id for _, problem in own}
        here = [[t for t in traces if t.problem.id in ids] for traces in given]
        return [traces for traces in here if traces]
    provers = len(policies) - 1
    from_provers = round(config.n_traces * config.prover_share) if provers else 0
    counts = [config.n_traces - from_provers]
    counts += [from_provers // provers + (i < from_provers % provers) for i in range(provers)]
    # A run that is stopped early has all writers by their share, too.
    turns = sorted(
        ((index + 0.5) / count, number, index)
        for number, count in enumerate(counts)
        for index in range(count)
    )
    return [
        [
            PlannedTrace(split, problem, policies[number].config.label, index)
            for split, problem in own
        ]
        for _, number, index in turns
    ]


def _summary(config: RolloutsConfig, records: Run, left: list[int], stopped: bool) -> None:
    directory = config.directory
    if stopped:
        whole = sum(not any(left[: number + 1]) for number in range(len(left)))
        print(
            f"stopped after {config.hours} hours: {whole} of {len(left)} rounds are complete, "
            f"{sum(left)} solutions owed; the same command goes on"
        )
    print(f"{len(records.traces)} traces, {len(records.completions)} rollouts in {directory}")
    print_health(write_health(records), directory)
    write_data_card(records)


def main() -> None:
    """Entry point of ``data_gen.rollouts``."""
    run(rollouts, RolloutsConfig, "data_gen.rollouts")


if __name__ == "__main__":
    main()
