"""The data card of a label run: ``README.md`` with the metadata that a data set hub reads.

``hf upload --repo-type dataset`` of the directory is then enough, and
``load_dataset(DIRECTORY, "labels")`` finds each table by name.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from data_gen.label_run import Run
from pav.core.files import replace_file
from pav.labels.tables import own_endings

CARD = "README.md"
_TABLES = {
    "labels": "a prefix under a rollout policy: `k` right of `n` rollouts",
    "traces": "a solution: token ids (prompt excluded), step ends, answer, right or wrong",
    "completions": "a rollout: the prefix it started from, its ids, answer, right or wrong",
}
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))


def write_data_card(run: Run) -> None:
    """Write the card beside the tables of a sealed run."""
    replace_file(run.directory / CARD, data_card(run))


def data_card(run: Run) -> str:
    """Metadata and text of the card."""
    from huggingface_hub import DatasetCard, DatasetCardData  # not at the top: --help stays fast

    rows = len({(c.prefix_key, c.policy) for c in run.completions.values()})
    data = DatasetCardData(
        configs=[
            {"config_name": name, "data_files": f"{name}/*.parquet", "default": name == "labels"}
            for name in _TABLES
        ],
        size_categories=[next((name for size, name in _SIZES if rows < size), "1M<n<10M")],
        tags=["process-reward-model", "monte-carlo-rollouts", "pav-engine"],
        pretty_name=f"Step labels of {_short(run.base)}",
    )
    text = "\n".join(
        [
            f"# Step labels of {_short(run.base)}",
            "",
            "Made by pav-engine: how often a policy ends right from the end of every step of many "
            "solutions (Monte-Carlo estimates of Q).",
            "",
            "| table | a row is |",
            "|---|---|",
            *(f"| `{name}` | {what} |" for name, what in _TABLES.items()),
            "",
            "```python",
            "from datasets import load_dataset",
            "",
            'labels = load_dataset("parquet", data_files="DIRECTORY/labels/*.parquet")',
            "```",
            "",
            "Ids are those of the tokenizer below; a prefix is `ids[:end]` for every `end` of "
            "`step_ends`, and the empty one. `manifest.json` holds every setting.",
            "",
            *_facts(run),
            "",
        ]
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}").content)


def _short(name: str) -> str:
    """Of a path the last part: a card is no place for a machine's directories."""
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) else name


def _facts(run: Run) -> list[str]:
    manifest: dict[str, Any] = run.manifest
    splits = Counter({t.problem_id: t.split for t in run.traces.values()}.values())
    writers = Counter(t.policy for t in run.traces.values())
    rollouts = Counter(c.policy for c in run.completions.values())
    right = Counter(c.policy for c in run.completions.values() if c.correct)
    sampler = ", ".join(f"{key} {value}" for key, value in manifest["sampler"].items())
    imported = manifest.get("imported")
    lines = [
        f"* task: {manifest['task_spec']['class_path'].rsplit('.', 1)[-1]}",
        f"* policy: {_short(manifest['policy']['model'])}, tokenizer `{manifest['tokenizer']}`",
        f"* sampled with {sampler}",
        f"* problems: {', '.join(f'{n} {split}' for split, n in sorted(splits.items()))}",
        f"* solutions: {', '.join(f'{n} by {_short(who)}' for who, n in sorted(writers.items()))}",
    ]
    if imported:
        lines[2] = (
            f"* imported from a file of the layout `{imported['format']}`: a label is one "
            "judgement of a step, n = 1, and has no rollout behind it"
        )
    if own_endings(manifest, run.traces.values()):
        lines.append(
            "* endings count: a solution is one more rollout of its writer from each of its "
            "prefixes, which is not in the table `labels`"
        )
    for policy, n in sorted(rollouts.items()):
        what = "labels" if imported else "rollouts"
        lines.append(f"* {what} of {_short(policy)}: {n}, {right[policy] / n:.3f} right")
    return lines
