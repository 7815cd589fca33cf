"""The study of label budgets: who buys which labels with how many tokens.

Rollouts are keyed by (prefix, policy, index), and what a strategy asks for depends on finished
outcomes alone (:func:`data_gen.strategies.next_rollouts`). So one pool of rollouts serves all
strategies, budgets and replicates: each is *replayed* on it and gets what a run of its own would
have got.

A replicate is a set of training problems of its own; a share of the budget has the first problems
of it. There an arm labels one solution per problem, then a second one, and so on, until it has
spent the tokens that the reference (``all_prefixes``, ``n_mc`` 4, ``n_traces`` 4) takes on the same
problems, or has 20 of each: what is spent less on a solution buys more solutions. Tokens are those
of seeds and rollouts, each sampled once.

All that a verifier needs is bought: half of the problems train the heads, the other half stops the
training and fits the calibrators. The recipe is the reference verifier's: heads on the frozen
``pav:strong``. Such heads alone know little (AUC about .6), the calibrator that reads surprise
knows most: labels of validation matter at least as much as those of training, and a study with a
validation set for nothing finds that no budget matters.

Everything is under one policy, ``pav:prover``: right about half the time, it has the contrast that
the base policy (right one time in ten) lacks; with the latter nearly all labels are 0.

Tokens, about 7 million in all (17 minutes at 7000 a second): a solution has about 8.5 prefixes and
67 tokens, a rollout 36 on average, where solutions share no prefixes. Held-out: 125 x 8.5 x 64 x 36
= 2.5 million. Budget of a replicate of 128 problems: 128 x 4 x (67 + 6.4 distinct prefixes x 4 x
30) = 0.43 million; the pool holds 3.5 times that for each of three, as the arms share rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

from data_gen.strategies import Plan, Strategy, next_rollouts
from pav.labels.tables import Completion, Key, LabelSet, Trace, count
from pav.policy.policy import PolicyConfig, Sampler
from pav.tasks.base import Problem
from pav.tasks.tape import Tape

SHARES = (0.125, 0.25, 0.5, 1.0)
REFERENCE_SEEDS = 4
# What costs little per solution runs out of new ones.
MOST_SEEDS = 20


@dataclass(frozen=True)
class Arm:
    """One way of spending tokens.

    Attributes:
        strategy: as in data_gen.rollouts.
        n_mc: as there.
        endings: a solution's own ending counts as a rollout from each of its prefixes, as it does
            under ``adaptive``: what rollouts add to it.
    """

    strategy: Strategy
    n_mc: int
    endings: bool = False

    @property
    def name(self) -> str:
        """What tables and plots call it."""
        return f"{self.strategy}, n_mc {self.n_mc}" + (" and own endings" if self.endings else "")

    @property
    def traces_count(self) -> bool:
        """Whether endings of solutions are labels."""
        return self.endings or self.strategy == "adaptive"


REFERENCE = Arm("all_prefixes", 4)
SWEEP = tuple(Arm("all_prefixes", n_mc) for n_mc in (1, 2, 4, 8, 16))
PITS = (Arm("first_pit", 4), Arm("first_pit", 16))
ADAPTIVE = (Arm("adaptive", 4), Arm("adaptive", 0))
ENDINGS = (Arm("all_prefixes", 1, True),)
ARMS = (*SWEEP, *PITS, *ADAPTIVE, *ENDINGS)


@dataclass(frozen=True)
class StudyConfig:
    """What pool and measurement have in common.

    Args:
        directory: where label runs and measurements lie.
        policy: writes the solutions and the rollouts.
        task: the tape.
        sampler: how it samples.
        replicates: disjoint sets of training problems.
        problems: training problems of a replicate.
        seed: run seed of the pool.
    """

    directory: str = "runs/labels"
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig("pav:prover"))
    task: Tape = field(default_factory=Tape)
    sampler: Sampler = field(default_factory=lambda: Sampler(max_length=160))
    replicates: int = 3
    problems: int = 128
    seed: int = 0

    @property
    def pool(self) -> Path:
        """The label run that all arms are replayed on."""
        return Path(self.directory) / "pool"

    def groups(self) -> Iterator[tuple[int, float, list[Problem]]]:
        """(replicate, share, its problems)."""
        stream = list(islice(self.task.problems("train"), self.replicates * self.problems))
        for r in range(self.replicates):
            own = stream[r * self.problems : (r + 1) * self.problems]
            for share in SHARES:
                yield r, share, own[: round(share * self.problems)]


@dataclass(frozen=True)
class Bought:
    """What an arm has for its tokens: solutions and rollouts."""

    traces: list[Trace]
    completions: dict[Key, Completion]
    tokens: int


class Replays:
    """Replays strategies on finished solutions and rollouts, each solution once per arm."""

    def __init__(
        self, policy: str, traces: Mapping[str, Trace], completions: Mapping[Key, Completion]
    ) -> None:
        self.policy, self.traces, self.completions = policy, traces, completions
        self._known: dict[tuple[Arm, str], dict[Key, Completion]] = {}

    def plan(self, arm: Arm) -> Plan:
        """How the arm spends."""
        return Plan((self.policy,), arm.n_mc, arm.strategy)

    def rollouts(self, arm: Arm, trace: Trace) -> dict[Key, Completion]:
        """All rollouts that the arm asks for, for this solution.

        Raises:
            KeyError: if one of them is not there.
        """
        if (arm, trace.trace_id) not in self._known:
            done: dict[Key, Completion] = {}
            while requests := next_rollouts(self.plan(arm), trace, done):
                keys = [(r.key, r.policy, r.index) for r in requests]
                done |= {key: self.completions[key] for key in keys}
            self._known[arm, trace.trace_id] = done
        return self._known[arm, trace.trace_id]

    def buy(
        self, arm: Arm, problems: Sequence[Problem], budget: float, rounds: int = MOST_SEEDS
    ) -> Bought:
        """Solutions round by round until ``budget`` tokens are spent, or ``rounds`` are over.

        The solution that crosses the budget is the last one.

        Raises:
            KeyError: if a solution or rollout is not there.
        """
        traces: list[Trace] = []
        completions: dict[Key, Completion] = {}
        tokens = 0
        for number in range(rounds):
            for problem in problems:
                trace = self.traces[f"{problem.id}/{self.policy}/{number}"]
                own = self.rollouts(arm, trace)
                tokens += len(trace.ids)
                tokens += sum(len(c.ids) for key, c in own.items() if key not in completions)
                traces.append(trace)
                completions |= own
                if tokens >= budget:
                    return Bought(traces, completions, tokens)
        return Bought(traces, completions, tokens)

    def price(self, arm: Arm, traces: Sequence[Trace]) -> int:
        """Tokens that the arm takes for these solutions."""
        rollouts = {key: c for trace in traces for key, c in self.rollouts(arm, trace).items()}
        return sum(len(t.ids) for t in traces) + sum(len(c.ids) for c in rollouts.values())

    def budget(self, problems: Sequence[Problem]) -> int:
        """Tokens that the reference takes on these problems."""
        return self.buy(REFERENCE, problems, inf, REFERENCE_SEEDS).tokens


def label_set(bought: Bought, manifest: dict[str, Any], endings: bool) -> LabelSet:
    """What ``pav.train`` would read, had the arm been a run of its own (endings: see :class:`Arm`).

    Every second problem is one of validation.
    """
    counts = count(bought.completions.values(), bought.traces if endings else [])
    watched = set(list(dict.fromkeys(t.problem_id for t in bought.traces))[1::2])
    traces = [
        replace(t, split="validation") if t.problem_id in watched else t for t in bought.traces
    ]
    return LabelSet(manifest, traces, counts, list(bought.completions.values()))
