"""``data_gen.merge DIR ... --output OUT``: several label runs, shards say, as one.

Traces, rollouts and counts, and the tables of ``data_gen.likelihood`` beside them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_gen.inspect.card import write_data_card
from data_gen.inspect.health import print_health, write_health
from data_gen.label_run import Run, part_of, print_train_command, read_run
from data_gen.likelihood.command import write_part
from data_gen.store import MANIFEST, Store
from pav.cli.directories import run_on_directories
from pav.core.errors import UserError
from pav.core.files import json_text, replace_file
from pav.core.manifest import PROMPTS
from pav.core.signals import interruptible
from pav.labels.files import two_askers
from pav.labels.tables import LIKELIHOODS, check_agreement, likelihood_rows
from pav.labels.unfinished import COMMON, lacking, said


@dataclass(frozen=True)
class MergeConfig:
    """Merge label runs of one task, tokenizer, sampler and base policy into a new directory.

    Args:
        labels: the runs (``data_gen.merge A B`` is short for ``--labels '[A, B]'``).
        output: directory of the merged run.
        partial: merge also where shards are missing, or runs that are not finished.
    """

    output: str
    labels: list[str] = field(default_factory=list)
    partial: bool = False


def merge(config: MergeConfig) -> None:
    """Write the union of label runs (see :class:`MergeConfig`); nothing counts twice."""
    if not config.labels:
        raise UserError("labels is empty; give the directories to merge")
    runs: dict[str, Run] = {}
    for directory in config.labels:
        if Path(directory).resolve() == Path(config.output).resolve():
            raise UserError(f"output {config.output!r} is one of the runs to merge; choose another")
        runs[directory] = read_run(directory)
        check_agreement({name: run.manifest for name, run in runs.items()})
        if not runs[directory].traces:
            raise UserError(f"labels {directory!r} hold no traces; let it run, or leave it out")
    parts = list(runs.values())
    manifest = _manifest(parts)
    lack = lacking(map(part_of, parts))
    if lack and not config.partial:
        raise UserError(
            f"labels are not complete: {said(lack)}; let the commands that make them finish, or "
            "merge what is there with --partial true"
        )
    output = Path(config.output)
    likelihoods = _likelihoods([output, *(run.directory for run in parts)])
    with interruptible(), Store(output, manifest) as store:
        if lack:
            manifest["partial"] = lack
        # Before the tables: they are never without it. The parts may have gone on since last time.
        replace_file(output / MANIFEST, json_text(manifest))
        for run in parts:
            store.traces.update(run.traces)
            store.completions.update(run.completions)
        store.seal(manifest["rollout_policies"], changed=True)
        # Those of the output come first: the same command once more adds nothing.
        if more := likelihoods[len(likelihood_rows(output)) :]:
            write_part(output / LIKELIHOODS, more)
        repeated = sum(len(r.completions) for r in parts) - len(store.completions)
        print(
            f"{len(runs)} runs: {len(store.traces)} traces, {len(store.completions)} rollouts in "
            f"{config.output}; {repeated} rollouts stand in several runs and count once"
        )
        if likelihoods:
            print(f"  {len(likelihoods)} likelihoods")
        if lack:
            print(f"WARNING: the merged run is partial: {said(lack)}", file=sys.stderr)
        seconds = sum(r.seconds for r in parts)
        merged = Run(output, manifest, store.traces, store.completions, seconds=seconds)
        print_health(write_health(merged), output)
        write_data_card(merged)
    print_train_command(merged)


def _likelihoods(directories: list[Path]) -> list[dict[str, Any]]:
    """Rows of several tables of likelihoods, one for every prefix and policy.

    Raises:
        UserError: if they call two policies by one name.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    named: dict[str, tuple[dict[str, Any], Path]] = {}
    for directory in directories:
        for row in likelihood_rows(directory):
            name = row["policy"]
            known, where = named.get(name, (row, directory))
            if differ := two_askers(known, row):
                raise UserError(
                    f"labels {str(where)!r} and {str(directory)!r} hold likelihoods of two "
                    f"policies called {name!r} ({differ}); remove {LIKELIHOODS}/ in one of them, "
                    "or make it again with another policy.name"
                )
            if not known.get("prompt_ids"):  # a row that tells more may follow
                known, where = row, directory
            named[name] = known, where
            found.setdefault((row["prefix_key"], name), row)
    return list(found.values())


def _manifest(runs: list[Run]) -> dict[str, Any]:
    """What the runs agree on; ``merged`` keeps what each of them was."""
    first = runs[0].manifest
    return {
        **{key: first[key] for key in COMMON},
        "rollout_policies": {name: f for run in runs for name, f in run.policies.items()},
        PROMPTS: {n: p for run in runs for n, p in run.manifest.get(PROMPTS, {}).items()},
        "merged": [
            {k: v for k, v in run.manifest.items() if k not in (*COMMON, PROMPTS, "partial")}
            | {"directory": str(run.directory)}
            for run in runs
        ],
    }


def main() -> None:
    """Entry point of ``data_gen.merge``."""
    run_on_directories(merge, MergeConfig, "data_gen.merge", many=True)


if __name__ == "__main__":
    main()
