"""Search recipes: what a served model's name stands for, e.g. ``pav-beam-16``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pav.tasks.base import Problem
from pav.verifier.pick import Pick, check_pick
from pav.verifier.scoring import Scorer
from search.run.records import Record
from search.run.session import Session
from search.run.solve import beam_record, beam_settings, traces_record

# Name -> what it does, for the help and /v1/models.
KINDS = {
    "pav-beam": "beam search by Q + alpha * A, N places",
    "pav-bon": "best of N solutions by the PAV",
    "pav-vote": "vote of N solutions weighted by the PAV",
    "orm-bon": "best of N solutions by the ORM",
    "orm-vote": "vote of N solutions weighted by the ORM",
    "majority": "majority vote of N solutions",
}
_NAME = re.compile(r"([a-z-]+)-([1-9][0-9]{0,5})", re.ASCII)


@dataclass(frozen=True)
class ServedModel:
    """A search and its N."""

    kind: str
    n: int

    @property
    def name(self) -> str:
        """Name of the served model."""
        return f"{self.kind}-{self.n}"


@dataclass(frozen=True)
class ServedModels:
    """Everything a recipe needs.

    Attributes:
        session: policy, task and engines.
        pav: the verifier of the ``pav-`` recipes.
        orm: that of the ``orm-`` recipes; None where there is none.
        samples, alpha, prover, pick: of the beam; None is the verifier's own.
    """

    session: Session
    pav: Scorer
    orm: Scorer | None
    samples: int = 3
    alpha: float | None = None
    prover: str | None = None
    pick: Pick | None = None

    @property
    def kinds(self) -> list[str]:
        """Kinds that can be served here."""
        return [k for k in KINDS if self.orm is not None or not k.startswith("orm-")]

    def warm_up(self) -> None:
        """Load every engine that some recipe samples from.

        Raises:
            UserError: if a setting does not fit the verifier, before anything is loaded.
        """
        card = self.pav.verifier.card
        beam_settings(card, 1, self.samples, self.alpha, self.prover)
        check_pick(self._pick, card.heads, card.base_head, str(self.pav.verifier.path))
        self.session.sampling_engine(self.pav)
        self.session.sampling_engine(self._voter)
        if self.orm is not None:
            self.session.sampling_engine(self.orm)
        self.session.start()

    @property
    def _voter(self) -> Scorer | None:
        # Fused scores are free, and spare a second copy of the policy.
        return self.pav if self.pav.fused else None

    async def run(
        self, recipe: ServedModel, problem: Problem, seed: int, max_length: int | None = None
    ) -> Record:
        """Search ``problem``; equal arguments give equal records on an engine of equal load.

        Args:
            recipe: what to run.
            problem: the question.
            seed: run seed.
            max_length: cap on prompt and solution below the sampler's, in tokens.
        """
        session = self.session
        if max_length is not None and max_length < session.sampler.max_length:
            session = replace(session, sampler=replace(session.sampler, max_length=max_length))
        if recipe.kind == "pav-beam":
            card = self.pav.verifier.card
            settings = beam_settings(card, recipe.n, self.samples, self.alpha, self.prover)
            return await beam_record(session, self.pav, settings, self._pick, "beam", seed, problem)
        scorer, rule = {
            "pav-bon": (self.pav, self._pick),
            "pav-vote": (self.pav, "vote"),
            "orm-bon": (self.orm, "orm"),
            "orm-vote": (self.orm, "orm_vote"),
            "majority": (self._voter, "majority"),
        }[recipe.kind]
        return await traces_record(
            session,
            scorer,
            recipe.n,
            rule,
            recipe.kind,
            seed,
            problem,
        )

    @property
    def _pick(self) -> Pick:
        return self.pick or self.pav.verifier.card.pick


def parse_model(name: str) -> ServedModel | None:
    """The recipe that ``name`` stands for; None if it is no such name."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in KINDS:
        return None
    return ServedModel(match[1], int(match[2]))
