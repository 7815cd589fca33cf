"""What a search of one problem works with."""

from __future__ import annotations

from dataclasses import dataclass, field

from pav.policy.cost import Cost
from pav.policy.inference import Engine
from pav.policy.policy import Policy, Sampler
from pav.tasks.base import Problem


@dataclass(frozen=True)
class SearchContext:
    """What every search of one problem is given, whatever its method and its scorer.

    Attributes:
        problem: what is searched.
        engine: the policy's engine.
        policy: tokenizer, prompt and step rule.
        sampler: how to sample.
        seed: run seed; requests derive theirs from it.
        cost: charged as the search goes.
    """

    problem: Problem
    engine: Engine
    policy: Policy
    sampler: Sampler
    seed: int
    cost: Cost = field(default_factory=Cost)
