"""Process advantage verifiers.

What a script or a notebook needs::

    import pav

    v = pav.load_verifier("pav:reference")  # or a path
    v.score("37+8*3-15", ["37+8=45", "45*3=36"])
    labels = pav.read_labels("runs/labels")
    with pav.Search(v) as search:
        found = search.beam("37+8*3-15", n=8)

Names are looked up where they are first used: importing this package imports no model library,
sets nothing and changes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Where each public name is.
_HOMES = {
    "Candidate": "pav.verifier.pick",
    "Child": "search.found",
    "Cost": "pav.policy.cost",
    "EngineConfig": "pav.engine.loading",
    "Found": "search.found",
    "Labels": "pav.labels.library",
    "LoadedVerifier": "pav.verifier.library",
    "PolicyConfig": "pav.policy.policy",
    "Problem": "pav.tasks.base",
    "Prompt": "pav.policy.policy",
    "Sampler": "pav.policy.policy",
    "Search": "search.library",
    "StepScores": "pav.verifier.library",
    "Task": "pav.tasks.base",
    "UserError": "pav.core.errors",
    "load_verifier": "pav.verifier.library",
    "read_labels": "pav.labels.library",
}

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pav.core.errors import UserError
    from pav.engine.loading import EngineConfig
    from pav.labels.library import Labels, read_labels
    from pav.policy.cost import Cost
    from pav.policy.policy import PolicyConfig, Prompt, Sampler
    from pav.tasks.base import Problem, Task
    from pav.verifier.library import LoadedVerifier, StepScores, load_verifier
    from pav.verifier.pick import Candidate
    from search.found import Child, Found
    from search.library import Search

__all__ = [
    "Candidate",
    "Child",
    "Cost",
    "EngineConfig",
    "Found",
    "Labels",
    "LoadedVerifier",
    "PolicyConfig",
    "Problem",
    "Prompt",
    "Sampler",
    "Search",
    "StepScores",
    "Task",
    "UserError",
    "load_verifier",
    "read_labels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pav' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
