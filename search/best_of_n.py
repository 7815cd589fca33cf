"""Command ``search.best_of_n``; the search itself is in :mod:`search.methods.best_of_n`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pav.cli.run import run
from search.run.config import SearchConfig
from search.run.oracle import by_oracle, pass_at
from search.run.setup import Row, create_run_dir, load_scorer, open_search, print_rows
from search.run.solve import pick_again, traces_record

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class BestOfNConfig(SearchConfig):
    """Best-of-N: independent solutions, ranked at their last position.

    Without verifier and reward model only ``pick: majority`` is left.
    """


def best_of_n(config: BestOfNConfig) -> None:
    """Run best-of-N (see :class:`BestOfNConfig`)."""
    opened = open_search(config, None)
    session, rule = opened.session, opened.rule
    scorer = None
    if opened.card is None:
        session.sampling_engine(None)
    else:
        scorer = load_scorer(config, opened)
    problems = session.problems(config.split, config.problems)
    with create_run_dir(config, opened, f"best-of-{config.n}") as directory:
        search = partial(
            traces_record,
            session,
            scorer,
            config.n,
            rule,
            "best-of-N",
            config.seed,
            score=opened.score,
        )
        records, seconds = session.run(
            directory / "best_of_n.jsonl",
            problems,
            search,
            config.concurrency,
            f"best-of-{config.n}",
        )
        rows = [Row(f"best-of-N ({rule})", config.n, records, seconds)]
        rows.append(
            Row("majority vote", config.n, [pick_again(r, "majority") for r in records], seconds)
        )
        rows.append(Row("oracle (pass@N)", config.n, [by_oracle(r) for r in records], seconds))
        print_rows(rows, directory, config.split)
        counts = [2**i for i in range(config.n.bit_length())]
        line = ", ".join(f"{k}: {pass_at(records, k).mean():.3f}" for k in counts)
        print(f"oracle pass@k, unbiased from {config.n} samples: {line}")
        session.check()


def main() -> None:
    """Entry point of ``search.best_of_n``."""
    run(best_of_n, BestOfNConfig, "search.best_of_n")


if __name__ == "__main__":
    main()
