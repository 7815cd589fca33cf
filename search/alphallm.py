"""Command ``search.alphallm``; the search itself is in :mod:`search.methods.alphallm`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pav.cli.run import run
from pav.verifier.scoring import StepScorer
from search.methods.alphallm import WEIGHT
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
class AlphaLlmConfig(SearchConfig):
    """Beam search by Q_base and AlphaLLM's bonus for prefixes whose children differ.

    Args:
        samples: children per place and step.
        bonus: weight of the bonus.
    """

    samples: int = 3
    bonus: float = WEIGHT


def alphallm(config: AlphaLlmConfig) -> None:
    """Run beam search by Q and AlphaLLM's bonus (see :class:`AlphaLlmConfig`)."""
    opened = open_search(config, "pav")
    settings = beam_settings(scorer_of(opened), config.n, config.samples, 0.0, None, "q")

    def job(scorer: StepScorer) -> Search:
        return partial(
            beam_record,
            opened.session,
            scorer,
            settings,
            opened.rule,
            "alphallm",
            config.seed,
            bonus=config.bonus,
        )

    run_tree(config, opened, "alphallm", "AlphaLLM bonus", job)


def main() -> None:
    """Entry point of ``search.alphallm``."""
    run(alphallm, AlphaLlmConfig, "search.alphallm")


if __name__ == "__main__":
    main()
