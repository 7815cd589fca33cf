"""Searches of questions that a notebook asks: what ``pav.Search`` is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

from pav.core.errors import UserError
from pav.core.progress import Reporter
from pav.engine.loading import EngineConfig, prepare_process
from pav.engine.loop import drive
from pav.grading.sandbox import DEFAULT_TIMEOUT
from pav.policy.policy import PolicyConfig, Sampler
from pav.tasks.base import Problem, problem_id
from pav.verifier.checkpoint import VerifierMeta
from pav.verifier.library import LoadedVerifier, load_verifier
from pav.verifier.pick import Pick, check_pick
from pav.verifier.score import Score
from search.found import Found, found_in
from search.methods.beam import Duplicates
from search.methods.smc import Resampling, SmcSettings, Weight
from search.run.opening import open_session
from search.run.records import Record
from search.run.session import Scoring, Session
from search.run.solve import beam_record, beam_settings, smc_record, traces_record

Question = str | Problem
Questions = list[str] | list[Problem] | list[Question] | tuple[Question, ...]
# vLLM's state is the process's: engines of one search end with those of another. So they are kept
# until none is open.
_open: list[Search] = []
_closed: list[Session] = []


class DvtsOptions(TypedDict, total=False):
    """Settings of :meth:`Search.dvts`."""

    samples: int
    alpha: float | None
    prover: str | None
    score: Score | None
    pick: Pick | None
    seed: int


class BeamOptions(DvtsOptions, total=False):
    """Settings of :meth:`Search.beam`."""

    duplicates: Duplicates


class SmcOptions(TypedDict, total=False):
    """Settings of :meth:`Search.smc`."""

    head: str | None
    weight: Weight
    resampling: Resampling
    pick: Pick | None
    seed: int


class Search:
    """Searches with a verifier; engines load at the first search, and once.

    Use it as a context manager, or call :meth:`close` in the end, which frees the device. It works
    in scripts and in notebooks, whose event loop stands still meanwhile. Results are those of the
    commands ``search.beam`` and so on: the same seed finds the same solutions.

    Several may be open at a time. On a GPU tell each how much memory it may take (``engine``); all
    of it is free when the last one is closed.

    Example:
        >>> import pav
        >>> with pav.Search("pav:reference") as search:
        ...     found = search.beam("37+8*3-15", n=8)
        >>> found.answer, len(found.tree), found.cost.policy_tokens

    Args:
        verifier: what :func:`pav.load_verifier` returned, or the name of a checkpoint.
        policy: another policy than the verifier was made for (warns).
        sampler: another sampler than the verifier was made for (warns).
        scoring: ``fused`` where the trunk is the policy, else ``separate``; ``auto`` decides.
        engine: device settings.
        concurrency: questions at a time.
        grade_timeout: seconds that a grader of your own may take for one answer, which then has no
            vote; None for no limit.
        quiet: show no progress.

    Raises:
        UserError: if the verifier, its policy or its task cannot be used here.
    """

    def __init__(
        self,
        verifier: LoadedVerifier | str | Path,
        *,
        policy: PolicyConfig | None = None,
        sampler: Sampler | None = None,
        scoring: Scoring = "auto",
        engine: EngineConfig | None = None,
        concurrency: int = 32,
        grade_timeout: float | None = DEFAULT_TIMEOUT,
        quiet: bool = False,
    ) -> None:
        prepare_process()
        if concurrency < 1:
            raise UserError(f"concurrency is {concurrency}; give a positive number")
        self.verifier = (
            verifier if isinstance(verifier, LoadedVerifier) else load_verifier(verifier)
        )
        self._concurrency, self._quiet = concurrency, quiet
        checkpoint = self.verifier.checkpoint
        self._session = open_session(
            checkpoint,
            self.verifier.task,
            policy,
            sampler,
            engine or EngineConfig(),
            grade_timeout=grade_timeout,
        )
        # Answers that cannot be graded have no vote; the searches go on.
        self._session.grader.stops = False
        self._scorer = self._session.scorer(
            checkpoint, scoring, self.verifier.surprise, self.verifier.trunk.path
        )
        self._session.sampling_engine(self._scorer)
        _open.append(self)

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engines; this search cannot be used any more."""
        if self not in _open:
            return
        _open.remove(self)
        _closed.append(self._session)
        while _closed and not _open:
            _closed.pop().shutdown()

    @overload
    def beam(self, question: Question, n: int = ..., **settings: Unpack[BeamOptions]) -> Found: ...

    @overload
    def beam(
        self, question: Questions, n: int = ..., **settings: Unpack[BeamOptions]
    ) -> list[Found]: ...

    def beam(
        self,
        question: Question | Questions,
        n: int = 4,
        *,
        samples: int = 3,
        alpha: float | None = None,
        prover: str | None = None,
        score: Score | None = None,
        duplicates: Duplicates = "weigh",
        pick: Pick | None = None,
        seed: int = 0,
    ) -> Found | list[Found]:
        """Beam search by Q_base + alpha * A_prover; with n 1 greedy step search.

        Args:
            question: a question, or a list of them; a :class:`pav.Problem` brings an id (which
                seeds derive from) and a reference answer along.
            n: places of the beam (N).
            samples: children per place and step (C).
            alpha: weight of the advantage; by default the verifier's.
            prover: a head such as ``q/prover``, ``bo4`` for Best-of-4 of the base policy, or a
                weighted mean such as ``q/a:0.5,q/b:0.5``; by default the verifier's.
            score: rank steps by Q + alpha * A (``q+a``, the default), by Q or by A alone.
            duplicates: ``weigh``: places share the draws of a round in proportion to how often
                their last step was drawn; ``merge``: alike.
            pick: rule of the final pick; by default the verifier's.
            seed: of all samples.

        Returns:
            What was found; a list where ``question`` is one.

        Raises:
            UserError: if a setting or a question cannot be used.
        """
        stepping = beam_settings(self._card("beam"), n, samples, alpha, prover, score, duplicates)
        rule = self._rule(pick)

        search = partial(beam_record, self._session, self._scorer, stepping, rule, "beam", seed)
        return self._run(question, n, search, "beam")

    @overload
    def dvts(self, question: Question, n: int = ..., **settings: Unpack[DvtsOptions]) -> Found: ...

    @overload
    def dvts(
        self, question: Questions, n: int = ..., **settings: Unpack[DvtsOptions]
    ) -> list[Found]: ...

    def dvts(
        self,
        question: Question | Questions,
        n: int = 4,
        *,
        samples: int = 3,
        alpha: float | None = None,
        prover: str | None = None,
        score: Score | None = None,
        pick: Pick | None = None,
        seed: int = 0,
    ) -> Found | list[Found]:
        """Diverse verifier tree search: n independent subtrees, each a greedy step search.

        Args:
            question: as in :meth:`beam`.
            n: subtrees.
            samples: children per subtree and step (C).
            alpha: as in :meth:`beam`.
            prover: as in :meth:`beam`.
            score: as in :meth:`beam`.
            pick: rule of the final pick; by default the verifier's.
            seed: of all samples.

        Returns:
            What was found; a list where ``question`` is one.

        Raises:
            UserError: if a setting or a question cannot be used.
        """
        stepping = beam_settings(self._card("dvts"), n, samples, alpha, prover, score)
        rule = self._rule(pick)

        search = partial(beam_record, self._session, self._scorer, stepping, rule, "dvts", seed)
        return self._run(question, n, search, "DVTS")

    @overload
    def smc(self, question: Question, n: int = ..., **settings: Unpack[SmcOptions]) -> Found: ...

    @overload
    def smc(
        self, question: Questions, n: int = ..., **settings: Unpack[SmcOptions]
    ) -> list[Found]: ...

    def smc(
        self,
        question: Question | Questions,
        n: int = 4,
        *,
        head: str | None = None,
        weight: Weight = "change",
        resampling: Resampling = "systematic",
        pick: Pick | None = None,
        seed: int = 0,
    ) -> Found | list[Found]:
        """Particle filtering (SMC): n particles, resampled by Q after every step.

        Args:
            question: as in :meth:`beam`.
            n: particles.
            head: the Q that weighs particles; by default the base policy's.
            weight: by the change of log Q (``change``), by Q (``q``) or by Q / (1 - Q) (``odds``).
            resampling: ``systematic`` or ``multinomial``.
            pick: rule of the final pick; by default the verifier's.
            seed: of all samples.

        Returns:
            What was found; a list where ``question`` is one.

        Raises:
            UserError: if a setting or a question cannot be used.
        """
        card = self._card("smc")
        chosen = head or card.base_head
        if chosen not in card.heads:
            raise UserError(f"head is {chosen!r}; the verifier has {', '.join(card.heads)}")
        particles = SmcSettings(n, chosen, weight, resampling)
        rule = self._rule(pick)
        ranks = beam_settings(card, 1, 1, None, None).score

        search = partial(
            smc_record, self._session, self._scorer, particles, rule, seed, score=ranks
        )
        return self._run(question, n, search, "particle filtering")

    @overload
    def best_of_n(
        self, question: Question, n: int = ..., *, pick: Pick | None = ..., seed: int = ...
    ) -> Found: ...

    @overload
    def best_of_n(
        self, question: Questions, n: int = ..., *, pick: Pick | None = ..., seed: int = ...
    ) -> list[Found]: ...

    def best_of_n(
        self,
        question: Question | Questions,
        n: int = 4,
        *,
        pick: Pick | None = None,
        seed: int = 0,
    ) -> Found | list[Found]:
        """Best-of-N: n independent solutions, ranked at their last position. An ORM can do it, too.

        Args:
            question: as in :meth:`beam`.
            n: solutions.
            pick: rule of the final pick; by default the verifier's.
            seed: of all samples.

        Returns:
            What was found; a list where ``question`` is one.

        Raises:
            UserError: if a setting or a question cannot be used.
        """
        card = self.verifier.checkpoint.card
        rule = self._rule(pick)
        ranks = beam_settings(card, 1, 1, None, None).score if card.base_head else None

        search = partial(
            traces_record, self._session, self._scorer, n, rule, "best-of-N", seed, score=ranks
        )
        return self._run(question, n, search, "best-of-N")

    def _card(self, method: str) -> VerifierMeta:
        """The verifier's card, of one that can guide a step search."""
        card = self.verifier.checkpoint.card
        if not card.base_head:
            raise UserError(
                f"{method} ranks steps by Q, and {str(self.verifier.checkpoint.path)!r} is a "
                f"verifier of recipe {card.recipe!r}; use one of recipe 'pav', or best_of_n"
            )
        return card

    def _rule(self, pick: Pick | None) -> Pick:
        """The rule of the final pick."""
        card = self.verifier.checkpoint.card
        rule: Pick = pick or card.pick
        check_pick(rule, card.heads, card.base_head, str(self.verifier.checkpoint.path))
        return rule

    def _run(
        self,
        question: Question | Questions,
        n: int,
        search: Callable[[Problem], Coroutine[Any, Any, Record]],
        what: str,
    ) -> Found | list[Found]:
        if self not in _open:
            raise UserError("this Search is closed; make another one")
        if n < 1:
            raise UserError(f"n is {n}; give a positive number")
        asked = [question] if isinstance(question, (str, Problem)) else question
        problems = [self._problem(q) for q in asked]
        session = self._session
        session.start()
        for engine in session.served:
            engine.reset_prefix_cache()  # what a search costs does not depend on the one before
        found: dict[int, Record] = {}

        async def numbered(number: int) -> tuple[int, Record]:
            return number, await search(problems[number])

        quiet = self._quiet or len(problems) < 2  # one question takes seconds
        with Reporter(f"{what} N={n}", len(problems), "questions", quiet) as reporter:

            def keep(result: tuple[int, Record]) -> None:
                found.update([result])
                reporter.update(len(found))

            jobs = [partial(numbered, i) for i in range(len(problems))]
            drive(session.served, jobs, keep, self._concurrency)
        failed = [r for r in found.values() if r.error is not None]
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(problems)} searches failed, e.g. of "
                f"{failed[0].question[:60]!r}: {failed[0].error}",
                stacklevel=3,
            )
        results = [found_in(found[i]) for i in range(len(problems))]
        return results[0] if isinstance(question, (str, Problem)) else results

    def _problem(self, question: object) -> Problem:
        """A question as a problem that fits into what the engines read."""
        if isinstance(question, str) and question.strip():
            question = Problem(problem_id(question), question)
        if not isinstance(question, Problem):
            raise UserError(f"question is {question!r}; give its text, or a list of texts")
        length, cap = len(self._session.policy.encode(question)), self._session.sampler.max_length
        if length >= cap:
            raise UserError(
                f"question {question.question[:60]!r} is a prompt of {length} tokens, and "
                f"sampler.max_length is {cap}; ask a shorter one, or give a sampler of a larger cap"
            )
        return question
