"""Options that had another name.

The command line reads the old names for one version more, with a warning. Manifests keep them, so
that runs of before still open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {"n_seeds": "n_traces", "seeds_from": "traces_from", "orm": "reward_model"}
_ON_DISK = {new: old for old, new in RENAMED.items()}


def on_disk(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names that manifests know them by."""
    return {_ON_DISK.get(name, name): value for name, value in settings.items()}
