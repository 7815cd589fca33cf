"""Run one step search over its problems and print its row."""

from __future__ import annotations

from collections.abc import Callable

from pav.verifier.scoring import StepScorer
from search.run.config import SearchConfig
from search.run.setup import OpenedSearch, Row, create_run_dir, load_scorer, print_rows
from search.run.solve import pick_again
from search.run.workers import Search


def run_tree(
    config: SearchConfig,
    opened: OpenedSearch,
    name: str,
    label: str,
    job: Callable[[StepScorer], Search],
) -> None:
    """Run one search of its own directory and print its row."""
    scorer = load_scorer(config, opened)
    session = opened.session
    problems = session.problems(config.split, config.problems)
    with create_run_dir(config, opened, f"{name}-n{config.n}") as directory:
        records, seconds = session.run(
            directory / f"{name}.jsonl",
            problems,
            job(scorer),
            config.concurrency,
            f"{label} N={config.n}",
        )
        rows = [Row(f"{label} ({opened.rule})", config.n, records, seconds)]
        voted = [pick_again(r, "majority") for r in records]
        rows.append(Row(f"{label} (majority)", config.n, voted, seconds))
        print_rows(rows, directory, config.split)
        session.check()
