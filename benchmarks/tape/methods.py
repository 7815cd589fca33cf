"""All searches beside beam search on the calculator tape, from two finished comparisons.

Run first (each resumes; on two cores side by side with OMP_NUM_THREADS=1)::

    search.compare --config configs/tape/main/methods.yaml
    search.compare --config configs/tape/main/remedies.yaml
    python -m benchmarks.tape.methods

``tape_methods``: every search minus the beam of the same budget, paired, on test problems;
``tape_remedies``: the same on validation problems, three seeds. Each as
``benchmarks/results/<name>.{json,csv,png}``.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tape.main import (
    RESULTS,
    accuracies,
    beside_beam,
    read_csv,
    read_json,
    write_result,
)
from pav.cli.run import run

COMMAND = "python -m benchmarks.tape.methods"


@dataclass(frozen=True)
class MethodsConfig:
    """Collect all searches.

    Args:
        methods: finished run of configs/tape/main/methods.yaml.
        remedies: finished run of configs/tape/main/remedies.yaml.
    """

    methods: str = "runs/tape_main/methods"
    remedies: str = "runs/tape_main/remedies"


def collect(config: MethodsConfig) -> None:
    """Write both results."""
    for name, where in (("tape_methods", config.methods), ("tape_remedies", config.remedies)):
        directory = Path(where)
        rows, manifest = read_csv(directory), read_json(directory / "manifest.json")
        metrics = [*beside_beam(directory), *accuracies(rows)]
        write_result(name, metrics, rows, manifest, COMMAND)
        shutil.copy(directory / "compare.png", RESULTS / f"{name}.png")


if __name__ == "__main__":
    run(collect, MethodsConfig, "benchmarks.tape.methods")
