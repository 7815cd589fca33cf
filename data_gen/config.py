"""Settings of ``data_gen.rollouts``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_gen.strategies import Plan, Strategy
from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.engine.pool import check_workers
from pav.grading.sandbox import DEFAULT_TIMEOUT, check_timeout
from pav.policy.opening import task_for
from pav.policy.policy import (
    PolicyConfig,
    Sampler,
    like,
)
from pav.tasks.base import Task

# No task: __post_init__ has to see first which models are named.
_CHOSEN_LATER: Any = None


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
        traces_from: ``.jsonl`` file of solutions to label in place of sampled ones; a line has
            ``problem_id`` or ``question``, and ``text`` or token ``ids``.
        shard: ``i/n``: label every n-th problem from the i-th on (i from 0), for job arrays.
        n_traces: solutions per problem (the paper's n_cov). A budget of rollouts buys solutions or
            ``n_mc``, their product stays about the same: coverage wins while it is small, sharp
            labels win when it is large (PAV paper, Fig. 13).
        prover_share: share of the solutions that the provers write, in equal parts.
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
        concurrency: solutions in flight per worker, each with the rollouts of its prefixes.
        seed: run seed; every request's seed is a hash of it and of the request's key.
        hours: stop after so many hours, sealed; the same command goes on.
        grade_timeout: seconds that a grader of your own may take for one answer, which then counts
            as wrong; null for no limit. Its process is ended and started anew.
        dry_run: print what the run would take, from a small pilot, and write nothing.
        ignore_warnings: go on where most of the first few hundred solutions and rollouts are
            truncated or without an answer, or none is right.
        workers: processes with engines of their own. They share the visible GPUs,
            ``engine.tensor_parallel_size`` each, or the cores; requests and seeds are those of one.
        ray: address of a Ray cluster of your own that the workers run on (``auto``, ``host:port``),
            or ``local``; needs the extra ``ray``. Ray runs code for whoever reaches its ports.
        engine: device settings.
    """

    output: str
    task: Task = _CHOSEN_LATER
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    prover: PolicyConfig | list[PolicyConfig] | None = None
    sampler: Sampler = field(default_factory=Sampler)
    problems: int = 1000
    skip: int = 0
    validation_problems: int = 200
    traces_from: str | None = None
    shard: str | None = None
    n_traces: int = 8
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
        if self.n_traces < 1 or self.n_mc < 0:
            raise UserError(
                f"n_traces is {self.n_traces}, n_mc is {self.n_mc}; give at least one trace, and "
                "no negative number of rollouts"
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
        check_workers(self.workers, self.ray)
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
