"""What a search command needs: policy, verifiers, problems and one load of every engine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from pav.core.errors import UserError
from pav.core.manifest import Rendering
from pav.core.printable import one_line
from pav.core.progress import Reporter
from pav.engine.gpu_memory import share_gpu
from pav.engine.loading import EngineConfig, check_model, on_cpu
from pav.engine.loop import drive
from pav.engine.vllm import VllmEngine
from pav.grading.sandbox import DEFAULT_TIMEOUT, GuardedGrader
from pav.policy.inference import Engine
from pav.policy.policy import (
    Dtype,
    Policy,
    PolicyConfig,
    Sampler,
    load_policy,
    weights_digest,
)
from pav.policy.rendered import rendered, warn_clock, warn_other_prompt
from pav.reward_models.text import RewardModelConfig
from pav.tasks.base import Problem, Split, Task
from pav.verifier.checkpoint import (
    Verifier,
    VerifierMeta,
    checkpoint_name,
    load_verifier,
    prompt_from,
    trunk_path,
)
from pav.verifier.scoring import Scorer, StepScorer
from search.run.failures import (
    ERRORS,
    check_failures,
    check_truncation,
    failed_shares,
    troubles,
    truncated_share,
)
from search.run.records import Record, append, flush, read, read_seconds, rewrite, write_seconds
from search.run.workers import Search, Workers

if TYPE_CHECKING:
    from pav.reward_models.reward_model import RewardModel

Scoring = Literal["auto", "fused", "separate"]


@dataclass
class Session:
    """Policy, task and engines; engines are loaded once, when something is to be searched.

    Use it as a context manager: however that ends, devices are free again.

    Attributes:
        task: problems and grader.
        policy: the base policy.
        sampler: how it samples.
        engine_config: device settings.
        workers: who searches; None for this process.
        engines: by model directory. With workers these are never started: theirs are.
        origins: of each engine the model whose weights it has, its dtype, and the checkpoint that
            its directory is the export of, by that directory.
        readers: third-party reward models, by model directory.
        trunks: trunks of verifiers as they are asked, by checkpoint and directory.
        cut: search -> share of what it sampled that was cut by the length cap.
        failed: search -> how much of it failed.
        grader: the task's.
        grade_in_thread: grade beside the engines' loop, not in it. Where others wait for it.
        expected: (model, dtype) of every engine that will be loaded, by what it serves; on a GPU
            all of them share it.
    """

    task: Task
    policy: Policy
    sampler: Sampler
    engine_config: EngineConfig
    workers: Workers | None = None
    engines: dict[str, VllmEngine] = field(default_factory=dict)
    origins: dict[str, tuple[str, Dtype, Path | None]] = field(default_factory=dict)
    readers: dict[str, RewardModel] = field(default_factory=dict)
    trunks: dict[tuple[Path, str], Policy] = field(default_factory=dict)
    cut: dict[str, float] = field(default_factory=dict)
    failed: dict[str, dict[str, float]] = field(default_factory=dict)
    grade_in_thread: bool = False
    expected: dict[str, tuple[str, Dtype]] = field(default_factory=dict)
    grade_timeout: InitVar[float | None] = DEFAULT_TIMEOUT
    grader: GuardedGrader = field(init=False)

    def __post_init__(self, grade_timeout: float | None) -> None:
        self.grader = GuardedGrader(self.task, timeout=grade_timeout)

    def __getstate__(self) -> dict[str, Any]:
        # What arrives at a worker is a session that has engines, and scorers that have trunks.
        return {**self.__dict__, "workers": None, "trunks": {}}

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
        return found

    def sampling_engine(self, scorer: StepScorer | None, policy: Policy | None = None) -> Engine:
        """The engine that samples: a fused verifier's own, else the plain policy's."""
        if isinstance(scorer, Scorer) and scorer.fused:
            return scorer.engine
        policy = policy or self.policy
        self.expect(policy)
        return self._engine(policy.path, policy.path, policy.config.dtype, [])

    def expect(self, policy: Policy | None = None) -> None:
        """Say, before any engine is loaded, that ``policy`` (the base policy) will be sampled."""
        policy = policy or self.policy
        self.expected[f"policy {policy.path}"] = (policy.path, policy.config.dtype)

    def expect_scorer(self, verifier: Verifier, scoring: Scoring, trunk: str | None) -> None:
        """:meth:`expect` a verifier's engine, and the policy's where the verifier has its own.

        Raises:
            UserError: if the verifier has no trunk here, or cannot be fused as asked.
        """
        path = trunk_path(verifier, trunk)
        self.expected[f"verifier {verifier.path}"] = (path, verifier.card.dtype)
        if not self._fused(verifier, scoring, trunk):
            self.expect()

    def check_models(self) -> None:
        """Refuse what cannot be served here, before an output directory is this run's.

        Raises:
            UserError: with the reason.
        """
        if self._is_elsewhere:
            return  # the machines of the workers may serve other models than this one
        for model, dtype in dict.fromkeys(self.expected.values()):
            check_model(model, dtype, self.sampler.max_length, self.engine_config)

    @property
    def _is_elsewhere(self) -> bool:
        """Whether the engines may be on other machines than this process."""
        return self.workers is not None and self.workers.is_elsewhere

    @cached_property
    def _shares(self) -> dict[tuple[str, Dtype], EngineConfig]:
        return {} if self._is_elsewhere else self._share(say=True)

    def _share(self, say: bool) -> dict[tuple[str, Dtype], EngineConfig]:
        """Settings of every (model, dtype) that will be loaded, as they share the GPU here."""
        readers = [] if on_cpu() else [reader.planned for reader in self.readers.values()]
        served = list(self.expected.values())
        shared = share_gpu(self.engine_config, served, self.sampler.max_length, readers, say)
        return dict(zip(served, shared, strict=True))

    def settle_here(self) -> None:
        """In a worker: what only the machine knows that has the engines.

        Raises:
            UserError: if they do not fit on a GPU here, or an export is not here and cannot be.
        """
        shares = self._share(say=False)
        for directory, (model, dtype, checkpoint) in self.origins.items():
            if checkpoint is not None and not Path(directory).is_dir():
                from pav.export.vllm import ensure_export

                here, _ = ensure_export(load_verifier(str(checkpoint)), model)
                if str(here) != directory:
                    raise UserError(
                        f"the export of {str(checkpoint)!r} is at {str(here)!r} on this machine "
                        f"and at {directory!r} where the search is led; set XDG_CACHE_HOME to the "
                        "same directory on both, or put the checkpoint where both can write"
                    )
            self.engines[directory].config = shares.get((model, dtype), self.engine_config)

    def _engine(
        self,
        directory: str,
        model: str,
        dtype: Dtype,
        score_ids: list[int],
        checkpoint: Path | None = None,
    ) -> VllmEngine:
        """The engine of a directory, which holds the weights of ``model``."""
        if directory not in self.engines:
            self.origins[directory] = model, dtype, checkpoint
            settings = self._shares.get((model, dtype), self.engine_config)
            made_with = (directory, dtype, self.sampler.max_length, score_ids, settings)
            self.engines[directory] = VllmEngine(*made_with)
        return self.engines[directory]

    @property
    def served(self) -> list[VllmEngine | RewardModel]:
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
        self.expect_scorer(verifier, scoring, trunk)
        policy = self.trunk(verifier, trunk)
        fused = self._fused(verifier, scoring, trunk)
        from pav.export.vllm import ensure_export

        directory, score_ids = ensure_export(verifier, policy.path)
        engine = self._engine(str(directory), policy.path, card.dtype, score_ids, verifier.path)
        # The engine has the trunk's weights; they need not cross to workers.
        bare = replace(verifier, trunk_state=None, adapters=None)
        return Scorer(bare, engine, fused, with_surprise, policy)

    def trunk(self, verifier: Verifier, override: str | None = None) -> Policy:
        """A verifier's trunk as it is asked; warns where that is not how it was trained."""
        key = verifier.path, override or verifier.card.trunk
        if key not in self.trunks:
            card, path = verifier.card, trunk_path(verifier, override)
            config = PolicyConfig(path, prompt=prompt_from(card.prompt), dtype=card.dtype)
            policy = self.trunks[key] = load_policy(config, self.task.step_rule)
            source = f"verifier {str(verifier.path)!r}"
            warn_other_prompt(card.trunk_prompt, policy, source, "its trunk")
            if path != self.policy.path:
                warn_clock(policy)
        return self.trunks[key]

    def prompts(self) -> dict[str, Rendering]:
        """How policy, trunks and reward models in service are asked, for a run's manifest."""
        found = {"the policy": rendered(self.policy)}
        for (path, _), trunk in self.trunks.items():
            found[f"the trunk of {checkpoint_name(path)!r}"] = rendered(trunk)
        return found | {f"the model {m!r}": r.rendered for m, r in self.readers.items()}

    def reward_model(self, config: RewardModelConfig) -> RewardModel:
        """Put a third-party reward model into service."""
        from pav.reward_models.reward_model import RewardModel

        if config.model not in self.readers:
            self.readers[config.model] = RewardModel(config, self.policy)
        return self.readers[config.model]

    def _fused(self, verifier: Verifier, scoring: Scoring, trunk: str | None) -> bool:
        if scoring == "separate":
            return False
        why_not = self._why_not_fused(verifier.card, self.trunk(verifier, trunk))
        if scoring == "fused" and why_not:
            raise UserError(
                f"scoring fused needs the policy itself as frozen trunk, but for "
                f"{str(verifier.path)!r} {why_not}; use --scoring separate"
            )
        return not why_not

    def _why_not_fused(self, card: VerifierMeta, trunk: Policy) -> str:
        """Why the policy's own pass does not give this verifier's scores; empty if it does."""
        if not card.frozen:
            return "its trunk was trained"
        if weights_digest(self.policy.path) != card.trunk_digest:
            return f"its trunk is {card.trunk!r}"
        config = self.policy.config
        if prompt_from(card.prompt) != prompt_from(asdict(config.prompt)):
            return "its trunk has another prompt than the policy"
        if rendered(trunk) != rendered(self.policy):
            return "its trunk has another chat template than the policy"
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
        whose search or grader raised counts as wrong, is named at the end, and is owed at the next
        start; the tracebacks are in :data:`~search.run.failures.ERRORS` beside ``path``.

        Args:
            path: file of records.
            problems: what is searched.
            search: called with a problem, and with its record of ``samples`` where there are some.
            concurrency: problems at a time, of each worker.
            what: for progress and warnings.
            samples: records by problem.

        Raises:
            UserError: if the search raised for every problem, or the grader for too many answers.
        """
        self.grader.log = path.parent / ERRORS
        found = read(path)
        done = {r.problem_id: r for r in found if r.error is None and not r.ungraded}
        if len(done) < len(found):
            rewrite(path, list(done.values()))
        owed = [p for p in problems if p.id not in done]
        given = [(p,) if samples is None else (p, samples[p.id]) for p in owed]
        before = read_seconds(path, len(found))
        if self.workers and owed:
            if type(self.task).__module__ == "__main__":
                raise UserError(
                    "the task is defined in the script that was started, which workers do not "
                    "have; define it in a module, or use --workers 1 without --ray"
                )
            self.workers.open(self, search)
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
                    self.workers.run(given, concurrency, keep)
                elif owed:
                    for engine in self.served:
                        engine.reset_prefix_cache()
                    drive(self.served, [partial(search, *g) for g in given], keep, concurrency)
            finally:
                seconds = before + (monotonic() - started if owed else 0.0)
                flush(path)
                write_seconds(path, len(done), seconds)
        records = [done[p.id] for p in problems]
        for trouble in troubles(records, path, self.sampler.max_length):
            warn(f"{what}: {trouble}")
        self.failed[what] = failed_shares(records)
        if samples is None:
            self.cut[what] = truncated_share(records)
        return records, seconds

    def check(self) -> None:
        """The last thing a command does, when its results are written and shown.

        Raises:
            UserError: if failures or the length cap decided them.
        """
        check_failures(self.failed)
        check_truncation(self.cut, self.sampler.max_length)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Free all devices."""
        self.grader.close()
        if self.workers:
            self.workers.close()
            return
        for reader in self.readers.values():
            reader.shutdown()
        for engine in self.engines.values():
            engine.shutdown()


def warn(message: str) -> None:
    """A warning that stands out in a log."""
    print(f"WARNING: {one_line(message)}", file=sys.stderr)
