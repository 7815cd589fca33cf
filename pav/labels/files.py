"""The files of a label run as they are read: whole, of the right columns, of one model's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pav.core.errors import UserError
from pav.core.files import read_object

RESTORE = "restore it, or make the labels again"
# What must agree before labels of several runs, or labels and a verifier, may be mixed.
AGREE = ("task", "tokenizer", "sampler", "policy_fingerprint")
LIKELIHOOD = pa.schema(
    [
        ("prefix_key", pa.string()),
        ("problem_id", pa.string()),
        ("policy", pa.string()),
        ("policy_fingerprint", pa.string()),
        ("answer", pa.string()),
        ("answer_tokens", pa.int32()),
        ("logprob", pa.float64()),
    ]
)
# Last column, a digest of the rendered prompt; parts of older versions do not tell it.
PROMPT_IDS = pa.field("prompt_ids", pa.string())
# What names the task and the base policy.
SOURCES = ("task_spec", "policy")


def checked_manifest(path: Path) -> dict[str, Any]:
    """A label run's manifest.

    Raises:
        UserError: if it is damaged.
    """
    found = read_object(path, RESTORE)
    demand(found, AGREE, str(path))
    return found


def demand(manifest: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """Refuse a manifest without one of ``keys``.

    Raises:
        UserError: naming it.
    """
    for key in keys:
        if key not in manifest:
            raise UserError(f"{where!r} is no manifest of labels: it lacks {key!r}; {RESTORE}")


def read_tables(
    folder: Path, schema: pa.Schema, later: Sequence[pa.Field] = ()
) -> list[dict[str, Any]]:
    """Rows of all Parquet files of a table; none without a folder.

    Args:
        folder: of a label run.
        schema: its columns; others are left out.
        later: columns that files of older versions do not have.

    Raises:
        UserError: if a file is damaged.
    """
    files = sorted(folder.glob("*.parquet"))
    return [row for file in files for row in _rows(file, schema, later)]


def _rows(file: Path, schema: pa.Schema, later: Sequence[pa.Field]) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(file)
        for field in later:
            schema = schema.append(field) if field.name in table.schema.names else schema
        table = table.select(schema.names).cast(schema)
        rows: list[dict[str, Any]] = table.to_pylist()
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = str(error).strip().splitlines()[0].strip("'\"")
        raise UserError(f"{str(file)!r} is damaged ({reason}); {RESTORE}") from error
    for name in set(schema.names) - {"gold", "answer", *(field.name for field in later)}:
        if table[name].null_count:
            raise UserError(
                f"{str(file)!r} is damaged: {name} has no value in {table[name].null_count} rows; "
                f"{RESTORE}"
            )
    return rows


def two_askers(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """How rows of likelihoods differ in policy or prompt; empty where they do not.

    Rows of older versions do not tell the prompt.
    """
    for key, what in (("policy_fingerprint", "fingerprints"), ("prompt_ids", "prompt ids")):
        one, other = a.get(key), b.get(key)
        if one != other and None not in (one, other):
            return f"{what} {one} and {other}"
    return ""
