"""``data_gen.rollouts``: Monte-Carlo labels for every step of many solutions.

Seed solutions come from the base policy and, by share, from the prover. From every prefix at a step
boundary, step 0 (the problem itself) included, the rollout policies finish the solution ``n_mc``
times; the share of right answers estimates Q (PAV paper, Eq. 1 and Section 4.2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_gen.store import Store
from pav.cli import run
from pav.engine import Engine, EngineConfig, drive, seed_of
from pav.errors import UserError
from pav.labels import Completion, Trace, prefix_key
from pav.policy import Policy, PolicyConfig, Sampler, load_policy, tokenizer_fingerprint
from pav.progress import Reporter
from pav.tasks.base import Problem, Split, Task, task_spec
from pav.tasks.tape import Tape


@dataclass(frozen=True)
class RolloutsConfig:
    """Monte-Carlo labels for every step of many solutions.

    Args:
        output: directory of the label run; the same command resumes it.
        task: problems and grader.
        policy: the base policy, whose search the verifier will guide.
        prover: rollout policy whose advantages matter; by default the base policy itself.
        sampler: how all of them sample; stored with the labels.
        problems: training problems.
        skip: training and validation problems to leave out at the start (to split a run by hand).
        validation_problems: problems of the validation split, for early stopping and calibration.
        n_seeds: seed solutions per problem.
        prover_share: share of the seeds that the prover writes.
        n_mc: rollouts per prefix and rollout policy.
        concurrency: problems in flight.
        seed: run seed; every request's seed is a hash of it and of the request's key.
        engine: device settings.
    """

    output: str
    task: Task = field(default_factory=Tape)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    prover: PolicyConfig | None = None
    sampler: Sampler = field(default_factory=Sampler)
    problems: int = 1000
    skip: int = 0
    validation_problems: int = 200
    n_seeds: int = 8
    prover_share: float = 0.5
    n_mc: int = 1
    concurrency: int = 64
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.n_seeds < 1 or self.n_mc < 1:
            raise UserError(
                f"n_seeds is {self.n_seeds}, n_mc is {self.n_mc}; both must be positive"
            )
        if not 0 <= self.prover_share <= 1:
            raise UserError(f"prover_share is {self.prover_share}; give a share from 0 to 1")


@dataclass(frozen=True)
class Roller:
    """A policy with its engine."""

    policy: Policy
    engine: Engine
    sampler: Sampler

    async def finish(
        self, problem: Problem, prefix: list[int], seed: int
    ) -> tuple[list[int], bool]:
        """Sample from ``prefix`` to the end; (new ids, whether it was truncated).

        Truncated: by the length cap, or by a cut step that is not scored, at which search stops.
        """
        ids = self.policy.encode(problem) + prefix
        room = self.sampler.max_length - len(ids)
        if room <= 0:
            return [], True
        out = await self.engine.sample(
            ids,
            self.sampler,
            stop_ids=sorted(self.policy.stepper.eos_ids),
            max_tokens=room,
            seed=seed,
        )
        stepper = self.policy.stepper
        whole = prefix + out.ids
        is_cut = not stepper.rule.score_cut and stepper.step_ends(whole)[-1:] != [len(whole)]
        return out.ids, is_cut or not out.stopped


def rollouts(config: RolloutsConfig) -> None:
    """Make or resume a label run (see :class:`RolloutsConfig`)."""
    policies = [load_policy(config.policy, config.task.step_rule)]
    if config.prover is not None and config.prover != config.policy:
        policies.append(load_policy(config.prover, config.task.step_rule))
        check_policies(*policies)
    problems = _problems(config)
    manifest = _manifest(config, policies)
    with Store(Path(config.output), manifest) as store:
        owed = len(problems) - len(_finished(config, policies, problems, store))
        if owed:
            rollers = [
                Roller(
                    p,
                    Engine(p.path, p.config.dtype, config.sampler.max_length, config=config.engine),
                    config.sampler,
                )
                for p in policies
            ]
            _work(config, rollers, problems, store)
            for roller in rollers:
                roller.engine.shutdown()
        store.seal({p.config.label: p.fingerprint for p in policies})
        _summary(config, policies, store)


def check_policies(base: Policy, prover: Policy) -> None:
    """Two policies must share a tokenizer (solution ids are exchanged) and differ in name."""
    if tokenizer_fingerprint(base.tokenizer) != tokenizer_fingerprint(prover.tokenizer):
        raise UserError(
            f"prover {prover.config.model!r} has another tokenizer than policy "
            f"{base.config.model!r}; choose a prover of the same tokenizer"
        )
    if base.config.label == prover.config.label:
        raise UserError(f"policy and prover are both called {base.config.label!r}; set prover.name")


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
    return {
        "format": 1,
        "task": config.task.fingerprint,
        "task_spec": task_spec(config.task),
        "tokenizer": tokenizer_fingerprint(base.tokenizer),
        "policy": asdict(config.policy),
        "policy_fingerprint": base.fingerprint,
        "rollout_policies": {p.config.label: p.fingerprint for p in policies},
        "sampler": asdict(config.sampler),
        "seed": config.seed,
        **{
            key: getattr(config, key)
            for key in (
                "problems",
                "skip",
                "validation_problems",
                "n_seeds",
                "prover_share",
                "n_mc",
            )
        },
    }


def _seed_plan(config: RolloutsConfig, policies: list[Policy]) -> list[tuple[int, int]]:
    """(policy number, index among its seeds) of every seed of a problem."""
    from_prover = round(config.n_seeds * config.prover_share) if len(policies) > 1 else 0
    return [(0, i) for i in range(config.n_seeds - from_prover)] + [
        (1, i) for i in range(from_prover)
    ]


def _trace_id(problem: Problem, policy: Policy, index: int) -> str:
    return f"{problem.id}/{policy.config.label}/{index}"


def prefixes(trace: Trace) -> list[list[int]]:
    """Solution ids of every prefix to label: step 0 and every step but the one that ends it."""
    ends = trace.step_ends if trace.truncated else trace.step_ends[:-1]
    return [[], *(trace.ids[:end] for end in ends)]


def _finished(
    config: RolloutsConfig,
    policies: list[Policy],
    problems: list[tuple[Split, Problem]],
    store: Store,
) -> set[str]:
    """Ids of problems of which nothing is owed."""
    done = set()
    for _, problem in problems:
        ids = [_trace_id(problem, policies[p], i) for p, i in _seed_plan(config, policies)]
        traces = [store.traces.get(trace_id) for trace_id in ids]
        if any(t is None for t in traces):
            continue
        keys = {prefix_key(problem.id, ids) for t in traces if t for ids in prefixes(t)}
        if all(
            (key, p.config.label, i) in store.completions
            for key in keys
            for p in policies
            for i in range(config.n_mc)
        ):
            done.add(problem.id)
    return done


def _work(
    config: RolloutsConfig,
    rollers: list[Roller],
    problems: list[tuple[Split, Problem]],
    store: Store,
) -> None:
    done = _finished(config, [r.policy for r in rollers], problems, store)
    finished = len(done)
    jobs: list[Callable[[], Coroutine[Any, Any, None]]] = [
        partial(label_problem, config, rollers, split, problem, store)
        for split, problem in problems
        if problem.id not in done
    ]
    with Reporter("rollouts", len(problems), "problems") as reporter:
        reporter.update(finished)

        def advance(_: None) -> None:
            nonlocal finished
            finished += 1
            reporter.update(finished, f"{len(store.completions)} rollouts")

        drive([r.engine for r in rollers], jobs, advance, config.concurrency)


async def label_problem(
    config: RolloutsConfig, rollers: list[Roller], split: Split, problem: Problem, store: Store
) -> None:
    """Seeds of one problem, then rollouts from all their distinct prefixes; skips what is there."""
    plan = _seed_plan(config, [r.policy for r in rollers])
    traces = await asyncio.gather(
        *(_seed(config, rollers[p], i, split, problem, store) for p, i in plan)
    )
    distinct = {prefix_key(problem.id, ids): ids for t in traces for ids in prefixes(t)}
    await asyncio.gather(
        *(
            _rollout(config, roller, index, key, ids, problem, store)
            for key, ids in distinct.items()
            for roller in rollers
            for index in range(config.n_mc)
        )
    )


async def _seed(
    config: RolloutsConfig, roller: Roller, index: int, split: Split, problem: Problem, store: Store
) -> Trace:
    trace_id = _trace_id(problem, roller.policy, index)
    if trace_id in store.traces:
        return store.traces[trace_id]
    key = prefix_key(problem.id, [])
    name = roller.policy.config.label
    ids, truncated = await roller.finish(
        problem, [], seed_of(config.seed, "seed", name, key, index)
    )
    grade = config.task.grade(roller.policy.text(ids), problem)
    trace = Trace(
        trace_id=trace_id,
        problem_id=problem.id,
        question=problem.question,
        gold=problem.gold,
        split=split,
        policy=name,
        seed_index=index,
        ids=ids,
        step_ends=roller.policy.stepper.step_ends(ids),
        answer=grade.answer,
        correct=grade.correct and not truncated,
        truncated=truncated,
    )
    store.add(trace)
    return trace


async def _rollout(
    config: RolloutsConfig,
    roller: Roller,
    index: int,
    key: str,
    prefix: list[int],
    problem: Problem,
    store: Store,
) -> None:
    name = roller.policy.config.label
    if (key, name, index) in store.completions:
        return
    ids, truncated = await roller.finish(
        problem, prefix, seed_of(config.seed, "rollout", name, key, index)
    )
    grade = config.task.grade(roller.policy.text(prefix + ids), problem)
    # A truncated rollout is a failure, whatever its text says.
    store.add(
        Completion(
            key,
            problem.id,
            name,
            index,
            prefix,
            ids,
            grade.answer,
            grade.correct and not truncated,
            truncated,
        )
    )


def _summary(config: RolloutsConfig, policies: list[Policy], store: Store) -> None:
    print(f"{len(store.traces)} traces, {len(store.completions)} rollouts in {config.output}")
    for policy in policies:
        name = policy.config.label
        own = [t.correct for t in store.traces.values() if t.policy == name]
        rolled = [c for c in store.completions.values() if c.policy == name]
        cut = sum(c.truncated for c in rolled) / max(1, len(rolled))
        print(
            f"  {name}: {sum(own) / max(1, len(own)):.3f} of {len(own)} seeds right, "
            f"{sum(c.correct for c in rolled) / max(1, len(rolled)):.3f} of {len(rolled)} "
            f"rollouts, {cut:.1%} truncated"
        )
        if cut > 0.05:
            print(
                f"  WARNING: {cut:.1%} of the rollouts of {name} hit sampler.max_length "
                f"({config.sampler.max_length}); raise it"
            )
    print(f"next: pav.train --labels '[{config.output}]' --output runs/pav.ckpt")


def main() -> None:
    """Entry point of ``data_gen.rollouts``."""
    run(rollouts, RolloutsConfig, "data_gen.rollouts")


if __name__ == "__main__":
    main()
