"""``data_gen.rollouts``: Monte-Carlo labels for every step of many solutions.

Seed solutions come from the base policy and, by share, from the prover. From every prefix at a step
boundary, step 0 (the problem itself) included, the rollout policies finish the solution ``n_mc``
times; the share of right answers estimates Q (PAV paper, Eq. 1 and Section 4.2).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from data_gen.data_card import write_data_card
from data_gen.health import print_health, write_health
from data_gen.label import Labeler, OutOfTime, Roller, Seed, label, owed
from data_gen.pool import WORKERS, Model, RemoteEngine
from data_gen.runs import Run, print_next
from data_gen.seeds import digest, given_rounds
from data_gen.store import MANIFEST, Store
from data_gen.strategies import Plan, Strategy
from data_gen.watch import Doubtful, watch_for
from data_gen.workers import open_pool
from pav.cli import run
from pav.engine import Engine, EngineConfig
from pav.errors import UserError
from pav.gpu_memory import share_gpu
from pav.guarded import DEFAULT_TIMEOUT, GRADER_LOG, GraderFailed, check_timeout, guarded
from pav.interrupt import interruptible
from pav.loading import check_model
from pav.opening import check_policies, print_opening, settle_cap, task_for
from pav.policy import (
    Policy,
    PolicyConfig,
    Sampler,
    asked,
    like,
    load_policy,
    tokenizer_fingerprint,
)
from pav.prompts import PROMPTS
from pav.rendered import refuse_clock, rendered, warn_clock
from pav.stats import few
from pav.tasks.base import Problem, Split, Task, task_spec


@dataclass(frozen=True)
class RolloutsConfig:
    """Monte-Carlo labels for every step of many solutions.

    Args:
        output: directory of the label run; the same command resumes it. A shard has one of its own
            in it.
        task: problems and grader. Without one, and with shipped models alone, the built-in tape.
        policy: the base policy, whose search the verifier will guide.
        prover: rollout policy whose advantages matter, or a list of several; all label the same
            prefixes as the base policy does. By default the base policy itself. Without a prompt of
            its own it is asked as the base policy is.
        sampler: how all of them sample; stored with the labels.
        problems: training problems.
        skip: training and validation problems to leave out at the start (to split a run by hand).
        validation_problems: problems of the validation split, for early stopping and calibration.
        seeds_from: ``.jsonl`` file of solutions to label in place of sampled seeds; a line has
            ``problem_id`` or ``question``, and ``text`` or token ``ids``.
        shard: ``i/n``: label every n-th problem from the i-th on (i from 0), for job arrays.
        n_seeds: seed solutions per problem (the paper's n_cov). A budget of rollouts buys seeds or
            ``n_mc``, their product stays about the same: coverage wins while it is small, sharp
            labels win when it is large (PAV paper, Fig. 13).
        prover_share: share of the seeds that the provers write, in equal parts.
        n_mc: rollouts per prefix and rollout policy; ``adaptive`` spends that on average at most.
            With 0 there are solutions only: for data_gen.likelihood, or labelled by their own
            endings under ``adaptive``.
        strategy: ``all_prefixes``; ``first_pit``: of wrong solutions no further than to the first
            prefix without a right rollout; ``adaptive``: how a solution ends counts as a rollout
            from each of its prefixes, more only where they teach more than a new solution does
            (see data_gen/strategies.py).
        max_labelled_prefixes: label at most so many prefixes of a solution, spread evenly over it,
            the problem and the last one always; by default all.
        branches: for data_gen.select_prover: in every state of the base's solutions, the next steps
            that so many of its rollouts took are labelled, too.
        concurrency: seed solutions in flight per worker, each with the rollouts of its prefixes.
        seed: run seed; every request's seed is a hash of it and of the request's key.
        hours: stop after so many hours, sealed; the same command goes on.
        grade_timeout: seconds that a grader of your own may take for one answer, which then counts
            as wrong; null for no limit. Its process is ended and started anew.
        dry_run: print what the run would take, from a small pilot, and write nothing.
        ignore_warnings: go on where most of the first few hundred solutions and rollouts are
            truncated or without an answer, or none is right.
        workers: processes with engines of their own. They share the visible GPUs,
            ``engine.tensor_parallel_size`` each, or the cores; requests and seeds are those of one.
        ray: address of a Ray cluster that the workers run on (``auto``, ``host:port``), or
            ``local``; needs the extra ``ray``.
        engine: device settings.
    """

    output: str
    # None only until __post_init__ has seen which models are named.
    task: Task = None  # type: ignore[assignment]
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    prover: PolicyConfig | list[PolicyConfig] | None = None
    sampler: Sampler = field(default_factory=Sampler)
    problems: int = 1000
    skip: int = 0
    validation_problems: int = 200
    seeds_from: str | None = None
    shard: str | None = None
    n_seeds: int = 8
    prover_share: float = 0.5
    n_mc: int = 1
    strategy: Strategy = "all_prefixes"
    max_labelled_prefixes: int | None = None
    branches: int = 0
    concurrency: int = 256
    seed: int = 0
    hours: float | None = None
    grade_timeout: float | None = DEFAULT_TIMEOUT
    dry_run: bool = False
    ignore_warnings: bool = False
    workers: int = 1
    ray: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        models = [policy.model for policy in self.policies]
        object.__setattr__(self, "task", task_for(self.task, models))
        if self.n_seeds < 1 or self.n_mc < 0:
            raise UserError(
                f"n_seeds is {self.n_seeds}, n_mc is {self.n_mc}; give at least one seed, and no "
                "negative number of rollouts"
            )
        most = self.max_labelled_prefixes
        if most is not None and most < 2:
            raise UserError(
                f"max_labelled_prefixes is {most}; give 2 (the problem and the last one) or more"
            )
        if not 0 <= self.branches <= self.n_mc:
            raise UserError(
                f"branches is {self.branches}; give a number from 0 to n_mc ({self.n_mc}): "
                "branches are the first steps of rollouts"
            )
        if self.branches and self.strategy != "all_prefixes":
            raise UserError(
                f"branches is {self.branches} with strategy {self.strategy!r}; data_gen."
                "select_prover needs strategy all_prefixes"
            )
        if not 0 <= self.prover_share <= 1:
            raise UserError(f"prover_share is {self.prover_share}; give a share from 0 to 1")
        if self.hours is not None and self.hours <= 0:
            raise UserError(f"hours is {self.hours}; give a time above 0, or leave it out")
        check_timeout(self.grade_timeout)
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}; give 1 or more")
        if self.shard is not None:
            _shard(self.shard)

    @property
    def policies(self) -> list[PolicyConfig]:
        """The rollout policies, the base first; provers have its prompt or their own."""
        given = self.prover if isinstance(self.prover, list) else [self.prover]
        provers = [like(p, self.policy) for p in given if p is not None]
        return [self.policy, *(p for p in provers if p != self.policy)]

    @property
    def plan(self) -> Plan:
        """How rollouts are spent."""
        names = tuple(policy.label for policy in self.policies)
        return Plan(names, self.n_mc, self.strategy, self.max_labelled_prefixes, self.branches)

    @property
    def directory(self) -> Path:
        """Where the labels lie: ``output``, or the shard's own directory in it."""
        if self.shard is None:
            return Path(self.output)
        i, n = _shard(self.shard)
        return Path(self.output) / f"shard-{i:0{len(str(n - 1))}d}-of-{n}"


def _shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f"shard is {text!r}; give i/n with i from 0 to n-1, e.g. 0/16")
    return int(i), int(n)


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
        if any(owed(rounds, config.plan, store, stepper)):
            log = config.directory / GRADER_LOG
            try:
                watch.recall([*store.traces.values(), *store.completions.values()], fingerprints)
                store.announce(sum(map(len, rounds)))
                with (
                    loaded(config, policies) as rollers,
                    guarded(config.task, log, config.grade_timeout) as grader,
                ):
                    labeler = Labeler(
                        grader, rollers, config.plan, config.seed, store, deadline, watch
                    )
                    label(labeler, rounds, config.concurrency * config.workers)
            except OutOfTime:
                stopped = True
            except Doubtful as error:
                doubtful = error
            except GraderFailed as error:
                broken = error
        left = [len(seeds) for seeds in owed(rounds, config.plan, store, stepper)]
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


@contextmanager
def loaded(config: RolloutsConfig, policies: list[Policy]) -> Iterator[list[Roller]]:
    """An engine for each policy, shut down at the end, however that comes."""
    rollers: list[Roller] = []
    try:
        for p, engine in zip(policies, _engines(config, policies), strict=True):
            rollers.append(Roller(p, engine, config.sampler))
        yield rollers
    finally:
        for roller in rollers:
            roller.engine.shutdown()


def _engines(config: RolloutsConfig, policies: list[Policy]) -> Iterator[Engine | RemoteEngine]:
    """Engines in this process, one after the other, or those of workers."""
    length = config.sampler.max_length
    if config.workers == 1 and config.ray is None:
        served = [(p.path, p.config.dtype) for p in policies]
        shared = share_gpu(config.engine, served, length)
        for (path, dtype), settings in zip(served, shared, strict=True):
            engine = Engine(path, dtype, length, config=settings)
            engine.start()
            yield engine
        return
    models = [Model(p.path, p.config.dtype, length, config.engine, p.stepper) for p in policies]
    note = None if config.dry_run else config.directory / WORKERS
    yield from open_pool(models, config.workers, config.ray, note).engines


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
    given = config.seeds_from is not None
    return {
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
        "n_seeds": None if given else config.n_seeds,
        "prover_share": None if given else config.prover_share,
        "seeds_from": digest(config.seeds_from) if config.seeds_from is not None else None,
    }


def _rounds(config: RolloutsConfig, policies: list[Policy]) -> list[list[Seed]]:
    """The seed solutions of the run, one per problem in a round; the writers take turns."""
    problems = _problems(config)
    i, n = _shard(config.shard or "0/1")
    own = problems[i::n]
    if not own:
        raise UserError(
            f"shard is {config.shard!r}, but there are {len(problems)} problems; use fewer shards"
        )
    if config.seeds_from is not None:
        given = given_rounds(config.seeds_from, problems, policies[0], config.sampler.max_length)
        ids = {problem.id for _, problem in own}
        here = [[seed for seed in seeds if seed.problem.id in ids] for seeds in given]
        return [seeds for seeds in here if seeds]
    provers = len(policies) - 1
    from_provers = round(config.n_seeds * config.prover_share) if provers else 0
    counts = [config.n_seeds - from_provers]
    counts += [from_provers // provers + (i < from_provers % provers) for i in range(provers)]
    # A run that is stopped early has all writers by their share, too.
    turns = sorted(
        ((index + 0.5) / count, number, index)
        for number, count in enumerate(counts)
        for index in range(count)
    )
    return [
        [Seed(split, problem, policies[number].config.label, index) for split, problem in own]
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
