"""Command ``search.dvts``; the search itself is in :mod:`search.methods.dvts`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pav.cli.run import run
from pav.verifier.score import Score
from pav.verifier.scoring import StepScorer
from search.run.command import run_tree
from search.run.config import SearchConfig
from search.run.setup import open_search, scorer_of
from search.run.solve import beam_record, beam_settings
from search.run.workers import Search

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class DvtsConfig(SearchConfig):
    """Diverse verifier tree search: N independent subtrees, each a greedy step search.

    Args:
        samples: children per place and step (C).
        alpha: weight of the advantage; by default the verifier's.
        prover: a head such as q/prover, bo4 for Best-of-4 of the base policy, or a weighted mean
            such as q/a:0.5,q/b:0.5; by default the verifier's.
        score: rank steps by Q + alpha * A (``q+a``, the default), by Q or by A alone.
    """

    samples: int = 3
    alpha: float | None = None
    prover: str | None = None
    score: Score | None = None


def dvts(config: DvtsConfig) -> None:
    """Run diverse verifier tree search (see :class:`DvtsConfig`)."""
    opened = open_search(config, "pav")
    settings = beam_settings(
        scorer_of(opened), config.n, config.samples, config.alpha, config.prover, config.score
    )

    def job(scorer: StepScorer) -> Search:
        return partial(
            beam_record, opened.session, scorer, settings, opened.rule, "dvts", config.seed
        )

    run_tree(config, opened, "dvts", "DVTS", job)


def main() -> None:
    """Entry point of ``search.dvts``."""
    run(dvts, DvtsConfig, "search.dvts")


if __name__ == "__main__":
    main()
