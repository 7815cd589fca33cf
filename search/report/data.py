"""What a report holds of a run, as JSON: tables, searches and what every method picked of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from pav.core.errors import UserError
from pav.core.files import json_text, read_object
from pav.core.heads import ORM
from pav.core.printable import from_csv_text
from pav.core.statistics import bootstrap
from pav.core.tables import explained, result_row
from pav.verifier.pick import Candidate
from pav.verifier.score import Values, prover_q
from search.compare.efficiency import Ratio, ratio_rows, ratio_title
from search.compare.headline import headline
from search.compare.results import PICKS, difference_rows, shown_row
from search.report.tree import last_steps, tree
from search.run.records import Record, peek

PROBLEMS = 20
# A page of dozens of searches still opens quickly; a search that is larger holds fewer problems.
BYTES_PER_SEARCH = 1_000_000


@dataclass(frozen=True)
class View:
    """What one method picked from the searches of one file.

    Attributes:
        method: its name.
        n: width, or how many of the candidates it picks from.
        seed: run seed.
        pick: the rule.
        file: of the records.
        picked: problem -> index of the pick, -1 or None for none.
    """

    method: str
    n: int
    seed: int
    pick: str
    file: str
    picked: dict[str, int | None]


def report_data(
    directory: Path, problems: int | list[str] = PROBLEMS, seeds: list[int] | None = None
) -> dict[str, Any]:
    """All that a page shows, as JSON (read by ``report.js``)."""
    ids, views, records = _read(directory)
    wanted = ids[:problems] if isinstance(problems, int) else problems
    for problem in wanted:
        if problem not in ids:
            raise UserError(
                f"problems names {problem!r}, which {str(directory)!r} does not hold; it has "
                f"{', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}"
            )
    known = list(dict.fromkeys(v.seed for v in views))
    held = known[:1] if seeds is None else seeds
    shown = [v for v in views if v.seed in held]
    if not shown:
        raise UserError(f"seeds is {held}; {str(directory)!r} has {', '.join(map(str, known))}")
    for file in dict.fromkeys(v.file for v in shown):
        records[file] = records.get(file) or _records(directory / file)
    searches = {f: _search(f, records[f], wanted) for f in dict.fromkeys(v.file for v in shown)}
    limited = [f for f, s in searches.items() if len(s["problems"]) < len(wanted)]
    left_out = [f"{len(wanted)} of {len(ids)} problems are held here"]
    if limited:
        left_out.append(f"fewer of the largest searches ({', '.join(limited)})")
    if len(held) < len(known):
        left_out.append(f"seed {', '.join(map(str, held))} of {', '.join(map(str, known))}")
    return {
        "title": directory.resolve().name,
        **_tables(directory, shown, records),
        "leftOut": f"{'; '.join(left_out)}.",
        "command": f"search.report {quote(str(directory))} --problems 100",
        "searches": list(searches.values()),
        "views": [_view(v, list(searches).index(v.file), searches[v.file]) for v in shown],
    }


def _read(directory: Path) -> tuple[list[str], list[View], dict[str, list[Record]]]:
    """Problem ids in order, all views, and the records that were read to know them, by file."""
    ids: list[str] = []
    views: list[View] = []
    records: dict[str, list[Record]] = {}
    if (directory / PICKS).is_file():
        picks = read_object(directory / PICKS, "give the command that made the run again")
        ids = picks["problems"]
        for p in picks["points"]:
            for seed, file, picked in zip(picks["seeds"], p["files"], p["picked"], strict=True):
                chosen = dict(zip(ids, picked, strict=True))
                views.append(View(p["method"], p["n"], seed, p["pick"], file, chosen))
        return ids, views, records
    for path in sorted(directory.glob("*.jsonl")):
        if found := _records(path):
            records[path.name] = found
            ids = ids or [r.problem_id for r in found]
            one, chosen = found[0], {r.problem_id: r.picked for r in found}
            rule = one.settings.get("pick", "")
            views.append(View(path.stem, one.n, one.seed, rule, path.name, chosen))
    if not views:
        raise UserError(
            f"run {str(directory)!r} holds no records; name the output of a search command"
        )
    return ids, views, records


def _records(path: Path) -> list[Record]:
    try:
        return peek(path)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(path)!r} does not hold records of a search ({type(error).__name__}: {error}); "
            "name the output of a search command"
        ) from error


def _tables(
    directory: Path, views: Sequence[View], records: dict[str, list[Record]]
) -> dict[str, Any]:
    """The tables of the terminal, what their columns mean, and what was found in a sentence."""
    path = directory / "compare.csv"
    if not path.is_file():
        results = _results(views, records)
        return {"headline": "", "results": results, "differences": [], "ratios": [],
                "ratiosOf": "", "explained": explained(results[0])}  # fmt: skip
    with path.open(newline="") as stream:
        rows = [{**r, "method": from_csv_text(r["method"])} for r in csv.DictReader(stream)]
    differences = _plain(directory / "compare.json")
    ratios = [Ratio(**r) for r in _plain(directory / "efficiency.json")]
    results, compared = [shown_row(row) for row in rows], difference_rows(differences)
    return {
        "headline": headline(rows, differences),
        "results": results,
        "differences": compared,
        "ratios": ratio_rows(ratios),
        "ratiosOf": ratio_title(ratios) if ratios else "",
        "explained": explained([*results[0], *(compared[0] if compared else ())]),
    }


def _plain(path: Path) -> list[Any]:
    """The list in a file of the comparison; none where it has no such file."""
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, list):
            return found
        wrong = f"{type(found).__name__} in place of a list"
    except (OSError, ValueError, RecursionError) as error:
        wrong = f"{type(error).__name__}: {error}"
    raise UserError(
        f"{str(path)!r} cannot be read ({wrong}); give the command that made the run again"
    )


def _results(views: Sequence[View], records: dict[str, list[Record]]) -> list[dict[str, str]]:
    rows = []
    for view in views:
        own = records[view.file]
        picked = [view.picked.get(r.problem_id) for r in own]
        right = [
            k is not None and k >= 0 and r.candidates[k].correct
            for r, k in zip(own, picked, strict=True)
        ]
        rows.append(
            result_row(
                view.method,
                str(view.n),
                bootstrap(np.array(right, dtype=float)[:, None]),
                float(np.mean([any(c.correct for c in r.candidates[: view.n]) for r in own])),
                float(np.mean([r.policy_tokens for r in own])),
                float(np.mean([r.verifier_tokens for r in own])),
                math.nan,
            )
        )
    return rows


def _view(view: View, search: int, held: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": view.method,
        "n": view.n,
        "seed": view.seed,
        "pick": view.pick,
        "search": search,
        "picked": [view.picked.get(p["id"]) for p in held["problems"]],
    }


@dataclass(frozen=True)
class _Columns:
    """The values that are shown of a state: every head's, and a prover's that is none of them."""

    heads: list[str]
    base: str
    prover: str

    @property
    def names(self) -> list[str]:
        return [*self.heads, self.prover] if self.prover else self.heads

    def __call__(self, q: Values) -> list[float | None]:
        values = [_number(q.get(h)) for h in self.heads]
        if self.prover:
            values.append(_number(prover_q(self.prover, self.base, q)))
        return values


def _columns(records: Sequence[Record]) -> _Columns:
    known = [h for r in records for c in r.candidates for h in c.q]
    known += [h for r in records for children in r.nodes for n in children for h in n.q]
    heads = list(dict.fromkeys(known))
    settings = records[0].settings
    prover, base = settings.get("prover") or "", settings.get("base_head") or ""
    # Best-of-K and means of several heads are no head's Q, but steps are ranked by theirs.
    return _Columns(heads, base, prover if base in heads and prover not in heads else "")


def _search(file: str, records: Sequence[Record], wanted: Sequence[str]) -> dict[str, Any]:
    """The wanted problems of one file, as many as there is room for, and at least one."""
    by_id = {r.problem_id: r for r in records}
    columns = _columns(records)
    problems: list[dict[str, Any]] = []
    size = 0
    for record in (by_id[w] for w in wanted if w in by_id):
        plain = _problem(record, columns)
        size += len(json_text(plain, None))
        if problems and size > BYTES_PER_SEARCH:
            break
        problems.append(plain)
    settings = {k: v for k, v in records[0].settings.items() if k != "pick"}
    return {
        "file": file,
        "columns": [{"name": name, "advantage": name != ORM} for name in columns.names],
        "settings": json_text(settings),
        "problems": problems,
    }


def _problem(record: Record, columns: _Columns) -> dict[str, Any]:
    steps = tree(record)
    ends = last_steps(record, steps)
    states = [_states(c) for c in record.candidates]
    root = next((columns(s[0]) for s in states if len(s) > 1), None)
    return {
        "id": record.problem_id,
        "question": record.question,
        "gold": record.gold,
        "error": record.error,
        "spent": {
            "policy tokens": record.policy_tokens,
            "verifier tokens": record.verifier_tokens,
            "truncated": record.truncated,
            "merged": record.merged,
        },
        "root": root,
        "steps": [
            [s.parent, s.places, s.finished, _number(s.score), s.text, columns(s.q)] for s in steps
        ],
        "candidates": [
            {
                "answer": c.answer,
                "correct": c.correct,
                "finished": c.finished,
                "q": columns(s[-1]) if s else [],
                "step": end,
                # The tree tells it step by step.
                "text": c.text if end is None else "",
            }
            for c, s, end in zip(record.candidates, states, ends, strict=True)
        ],
    }


def _states(candidate: Candidate) -> list[Values]:
    """Values after the steps that were valued: from step 0 on, or the last one's alone."""
    q = candidate.q
    return [dict(zip(q, row, strict=True)) for row in zip(*q.values(), strict=False)]


def _number(value: float | None) -> float | None:
    """To 4 digits; JSON has no NaN and no infinity."""
    return None if value is None or not math.isfinite(value) else round(value, 4)
