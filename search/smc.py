"""Command ``search.smc``; the search itself is in :mod:`search.methods.smc`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pav.cli.run import run
from pav.core.errors import UserError
from pav.verifier.scoring import StepScorer
from search.methods.smc import Resampling, SmcSettings, Weight
from search.run.command import run_tree
from search.run.config import SearchConfig
from search.run.setup import open_search, scorer_of
from search.run.solve import smc_record
from search.run.workers import Search

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class SmcConfig(SearchConfig):
    """Particle filtering (SMC): N particles, resampled by Q after every step.

    Args:
        head: the Q that weights particles; by default the base policy's.
        weight: by the change of log Q (``change``), by Q (``q``) or by Q / (1 - Q) (``odds``).
        resampling: ``systematic`` or ``multinomial``.
    """

    head: str | None = None
    weight: Weight = "change"
    resampling: Resampling = "systematic"


def smc(config: SmcConfig) -> None:
    """Run particle filtering (see :class:`SmcConfig`)."""
    opened = open_search(config, "pav")
    card = scorer_of(opened)
    head = config.head or card.base_head
    if head not in card.heads:
        raise UserError(f"head is {head!r}; the verifier has {', '.join(card.heads)}")
    settings = SmcSettings(config.n, head, config.weight, config.resampling)

    def job(scorer: StepScorer) -> Search:
        return partial(
            smc_record,
            opened.session,
            scorer,
            settings,
            opened.rule,
            config.seed,
            score=opened.score,
        )

    run_tree(config, opened, "smc", "particle filtering", job)


def main() -> None:
    """Entry point of ``search.smc``."""
    run(smc, SmcConfig, "search.smc")


if __name__ == "__main__":
    main()
