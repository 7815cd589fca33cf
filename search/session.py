"""What a search command needs: policy, verifiers, problems and one load of every engine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, cast

from pav.drive import drive
from pav.engine import Engine, EngineConfig
from pav.errors import UserError
from pav.policy import (
    Policy,
    PolicyConfig,
    Prompt,
    Sampler,
    load_policy,
    model_path,
    tokenizer_fingerprint,
    weights_digest,
)
from pav.progress import Reporter
from pav.stats import few
from pav.tasks.base import Problem, Split, Task
from pav.verifier import Card, Verifier, load_verifier, prompt_from, resolve_task, trunk_path
from search.failures import check_truncation, troubles, truncated_share
from search.records import Record, append, read, read_seconds, rewrite, write_seconds
from search.reward_text import RewardModelConfig
from search.scoring import Scorer, StepScorer
from search.worker import Search
from search.workers import Elsewhere, Workers

if TYPE_CHECKING:
    from search.reward_models import RewardModel

Scoring = Literal["auto", "fused", "separate"]


@dataclass
class Session:
    """Policy, task and engines; engines are loaded once, when something is to be searched.

    Attributes:
        task: problems and grader.
        policy: the base policy.
        sampler: how it samples.
        engine_config: device settings.
        workers: who searches; None for this process.
        engines: by model directory. With workers these only stand for theirs.
        readers: third-party reward models, by model directory.
        cut: search -> share of what it sampled that was cut by the length cap.
        grade_in_thread: grade beside the engines' loop, not in it. Where others wait for it.
    """

    task: Task
    policy: Policy
    sampler: Sampler
    engine_config: EngineConfig
    workers: Workers | None = None
    engines: dict[str, Engine] = field(default_factory=dict)
    readers: dict[str, RewardModel] = field(default_factory=dict)
    cut: dict[str, float] = field(default_factory=dict)
    grade_in_thread: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # What arrives at a worker is a session that has engines.
        return {**self.__dict__, "workers": None}

    def problems(self, split: Split, count: int, skip: int = 0) -> list[Problem]:
        """``count`` problems of ``split`` after the first ``skip``.

        Raises:
            UserError: if there is none.
        """
        found = list(islice(self.task.problems(split), skip, skip + count))
        if not found:
            after = f" after the first {skip}" if skip else ""
            raise UserError(
                f"task {self.task.name!r} has no {split} problems{after}; check task.data"
            )
        # Few of a test set are the user's choice, and their intervals are shown.
        chosen = split == "test" and len(found) == count
        if not chosen and (warning := few(len(found), split, count)):
            warn(warning)
        return found

    def sampling_engine(self, scorer: StepScorer | None, policy: Policy | None = None) -> Engine:
        """The engine that samples: a fused verifier's own, else the plain policy's."""
        if isinstance(scorer, Scorer) and scorer.fused:
            return scorer.engine
        policy = policy or self.policy
        return self._engine(policy.path, policy.config.dtype, [])

    def _engine(self, directory: str, dtype: Any, score_ids: list[int]) -> Engine:
        if directory not in self.engines:
            made_with = (directory, dtype, self.sampler.max_length, score_ids, self.engine_config)
            self.engines[directory] = (
                cast(Engine, Elsewhere(*made_with)) if self.workers else Engine(*made_with)
            )
        return self.engines[directory]

    @property
    def served(self) -> list[Engine | RewardModel]:
        """All engines and reward models."""
        return [*self.engines.values(), *self.readers.values()]

    def start(self) -> None:
        """Load all engines and reward models that are not loaded, those first that load faster."""
        for reader in self.readers.values():
            reader.start()
        for engine in self.engines.values():
            engine.start()

    def scorer(
        self, verifier: Verifier, scoring: Scoring, with_surprise: bool, trunk: str | None
    ) -> Scorer:
        """Put a verifier into service.

        Raises:
            UserError: if fused scoring was asked for and the trunk is not the frozen policy.
        """
        card = verifier.card
        path = trunk_path(verifier, trunk)
        why_not = self._why_not_fused(card)
        if scoring == "fused" and why_not:
            raise UserError(
                f"scoring fused needs the policy itself as frozen trunk, but for "
                f"{str(verifier.path)!r} {why_not}; use --scoring separate"
            )
        fused = not why_not and scoring != "separate"
        from pav.export import ensure_export

        directory, score_ids = ensure_export(verifier, path)
        policy = load_policy(
            PolicyConfig(path, prompt=prompt_from(card.prompt), dtype=card.dtype),  # type: ignore[arg-type]
            self.task.step_rule,
        )
        engine = self._engine(str(directory), card.dtype, score_ids)
        # The engine has the trunk's weights; they need not cross to workers.
        bare = replace(verifier, trunk_state=None, adapters=None)
        return Scorer(bare, engine, fused, with_surprise, policy)

    def reward_model(self, config: RewardModelConfig) -> RewardModel:
        """Put a third-party reward model into service."""
        from search.reward_models import RewardModel

        if config.model not in self.readers:
            self.readers[config.model] = RewardModel(config, self.policy)
        return self.readers[config.model]

    def _why_not_fused(self, card: Card) -> str:
        """Why the policy's own pass does not give this verifier's scores; empty if it does."""
        if not card.frozen:
            return "its trunk was trained"
        if weights_digest(self.policy.path) != card.trunk_digest:
            return f"its trunk is {card.trunk!r}"
        config = self.policy.config
        if prompt_from(card.prompt) != prompt_from(asdict(config.prompt)):
            return "its trunk has another prompt than the policy"
        if card.dtype != config.dtype:
            return f"its trunk is served in {card.dtype} and the policy in {config.dtype}"
        return ""

    def run(
        self,
        path: Path,
        problems: list[Problem],
        search: Search,
        concurrency: int,
        what: str,
        samples: Mapping[str, Record] | None = None,
    ) -> tuple[list[Record], float]:
        """Search what ``path`` lacks; (records in problem order, seconds of all starts).

        Seconds are NaN where an earlier start died before it could write down its own. A problem
        whose search raised counts as wrong, is named at the end, and is owed at the next start.

        Args:
            path: file of records.
            problems: what is searched.
            search: called with a problem, and with its record of ``samples`` where there are some.
            concurrency: problems at a time, of each worker.
            what: for progress and warnings.
            samples: records by problem.

        Raises:
            UserError: if the search raised for every problem.
        """
        found = read(path)
        done = {r.problem_id: r for r in found if r.error is None}
        if len(done) < len(found):
            rewrite(path, list(done.values()))
        owed = [p for p in problems if p.id not in done]
        given = [(p,) if samples is None else (p, samples[p.id]) for p in owed]
        before = read_seconds(path, len(found))
        if self.workers and owed:
            self.workers.open(self, search, len(owed), concurrency)
        elif owed:
            self.start()
        started = monotonic()
        with Reporter(what, len(problems), "problems") as reporter:

            def keep(record: Record) -> None:
                append(path, record)
                done[record.problem_id] = record
                right = sum(r.correct for r in done.values()) / len(done)
                lines = self.workers.lines if self.workers else []
                reporter.update(len(done), f"{right:.3f} right", lines)

            try:
                if self.workers and owed:
                    self.workers.run(given, keep)
                elif owed:
                    for engine in self.served:
                        engine.reset_prefix_cache()
                    drive(self.served, [partial(search, *g) for g in given], keep, concurrency)
            finally:
                seconds = before + (monotonic() - started if owed else 0.0)
                write_seconds(path, len(done), seconds)
        records = [done[p.id] for p in problems]
        for trouble in troubles(records, path, self.sampler.max_length):
            warn(f"{what}: {trouble}")
        if samples is None:
            self.cut[what] = truncated_share(records)
        return records, seconds

    def check(self) -> None:
        """The last thing a command does, when its results are written and shown.

        Raises:
            UserError: if the length cap decided them.
        """
        check_truncation(self.cut, self.sampler.max_length)

    def shutdown(self) -> None:
        """Free all devices."""
        if self.workers:
            self.workers.close()
            return
        for reader in self.readers.values():
            reader.shutdown()
        for engine in self.engines.values():
            engine.shutdown()


def plain_session(
    task: Task, policy: PolicyConfig, sampler: Sampler, engine: EngineConfig, workers: int = 1
) -> Session:
    """Session without a verifier of ours that would remember task, policy and sampler."""
    loaded = load_policy(policy, task.step_rule)
    return Session(task, loaded, sampler, engine, _workers(workers, engine))


def _workers(count: int, engine: EngineConfig) -> Workers | None:
    return None if count == 1 else Workers(count, engine)


def open_session(
    verifier: Verifier,
    task: Task | None,
    policy: PolicyConfig | None,
    sampler: Sampler | None,
    engine: EngineConfig,
    workers: int = 1,
) -> Session:
    """Session for what a verifier remembers; what is given overrides it, with a warning."""
    card = verifier.card
    source = f"verifier {str(verifier.path)!r}"
    found = resolve_task(card.task, task, source)
    if found.fingerprint != card.task_fingerprint:
        warn(f"{source} was made for task {card.task_fingerprint}, searching {found.fingerprint}")
    remembered = card.policy_config()
    if policy is None:
        try:
            model_path(remembered.model)
        except UserError as error:
            raise UserError(
                f"the policy of {source} is not at {remembered.model!r} any more; name its new "
                "place with --policy"
            ) from error
    if policy is not None and policy.prompt == Prompt() != remembered.prompt:
        print(f"policy {policy.model!r} is asked with the prompt that {source} remembers")
        policy = replace(policy, prompt=remembered.prompt)
    chosen = load_policy(policy or remembered, found.step_rule)
    if tokenizer_fingerprint(chosen.tokenizer) != card.tokenizer:
        raise UserError(
            f"policy {chosen.config.model!r} has another tokenizer than {source} "
            f"({tokenizer_fingerprint(chosen.tokenizer)}, expected {card.tokenizer}); use the "
            f"policy it was made for ({remembered.model!r}) or train a verifier for this one"
        )
    if chosen.fingerprint != card.policy_fingerprint:
        warn(
            f"{source} was made for policy {remembered.model!r}, searching with "
            f"{chosen.config.model!r} (fingerprints {card.policy_fingerprint} and "
            f"{chosen.fingerprint})"
        )
    used = sampler or card.sampler_config()
    if asdict(used) != card.sampler:
        warn(f"{source} was made for sampler {card.sampler}, searching with {asdict(used)}")
    return Session(found, chosen, used, engine, _workers(workers, engine))


def sibling_orm(path: Path) -> str:
    """The ORM baseline that belongs to a checkpoint: ``orm.ckpt`` beside it."""
    for name in (f"{path.stem}_orm.ckpt", "orm.ckpt"):
        if (path.parent / name).is_file():
            return str(path.parent / name)
    raise UserError(
        f"no ORM baseline beside {str(path)!r} (looked for orm.ckpt); train one with pav.train "
        "--recipe orm, or name it with --baseline_verifier"
    )


def load_checked(name: str, recipe: str) -> Verifier:
    """Load a verifier of a recipe."""
    verifier = load_verifier(name)
    if verifier.card.recipe != recipe:
        raise UserError(
            f"{name!r} is a verifier of recipe {verifier.card.recipe!r}; this needs {recipe!r}"
        )
    return verifier


def warn(message: str) -> None:
    """A warning that stands out in a log."""
    print(f"WARNING: {message}", file=sys.stderr)
