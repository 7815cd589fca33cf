"""Settings of the search commands."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from pav.core.errors import UserError
from pav.core.renamed import on_disk
from pav.engine.loading import EngineConfig
from pav.engine.pool import check_workers
from pav.grading.sandbox import DEFAULT_TIMEOUT, check_timeout
from pav.policy.policy import PolicyConfig, Sampler, model_path, settled, weights_digest
from pav.reward_models.text import RewardModelConfig
from pav.tasks.base import Split, Task, task_spec
from pav.verifier.checkpoint import Verifier
from pav.verifier.pick import Pick
from search.run.opening import capped
from search.run.session import Scoring


@dataclass(frozen=True)
class SearchConfig:
    """Fields of every search command.

    Args:
        verifier: checkpoint that pav.train wrote, or ``pav:reference``. It remembers task, policy
            and sampler; without one these are given, or the built-in ones.
        n: beam width, or number of solutions.
        problems: how many problems of ``split``.
        split: never choose settings on ``test``.
        pick: rule for the final pick; by default the one chosen on validation.
        scoring: ``fused`` where the trunk is the policy, else ``separate``; ``auto`` decides.
        surprise: use the calibrators that read the trunk's log-probabilities.
        seed: run seed.
        output: run directory; by default beside the verifier.
        task: needed only where the verifier's task is not built in.
        policy: another policy than the verifier was made for (warns).
        sampler: another sampler than the verifier was made for (warns).
        trunk: new place of the trunk, if it moved.
        reward_model: a third-party one that scores in the verifier's place: a sequence classifier,
            or a PRM (see pav/reward_models/text.py).
        concurrency: problems at a time, of each worker.
        workers: processes that search, each with engines of its own; they share the GPUs or cores.
        ray: address of a Ray cluster of your own that the workers run on (``auto``, ``host:port``),
            or ``local``; needs the extra ``ray``. Ray runs code for whoever reaches its ports.
        grade_timeout: seconds that a grader of your own may take for one answer, which then counts
            as wrong; null for no limit.
        engine: device settings.
    """

    verifier: str | None = None
    n: int = 4
    problems: int = 64
    split: Split = "test"
    pick: Pick | None = None
    scoring: Scoring = "auto"
    surprise: bool = True
    seed: int = 0
    output: str | None = None
    task: Task | None = None
    policy: PolicyConfig | None = None
    sampler: Sampler | None = None
    trunk: str | None = None
    reward_model: RewardModelConfig | None = None
    concurrency: int = 32
    workers: int = 1
    ray: str | None = None
    grade_timeout: float | None = DEFAULT_TIMEOUT
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.n < 1 or self.problems < 1:
            raise UserError(f"n is {self.n}, problems is {self.problems}; both must be positive")
        check_workers(self.workers, self.ray)
        check_timeout(self.grade_timeout)


def run_directory(config: SearchConfig, name: str, verifier: Path | None) -> Path:
    """Where a run goes: beside its verifier, or in ``runs`` where that is shipped or absent."""
    if config.output:
        return Path(config.output)
    shipped = verifier is None or "assets" in verifier.parts
    parent = Path("runs") if verifier is None or shipped else verifier.parent
    stem = "samples" if verifier is None else verifier.stem
    if config.reward_model is not None:
        stem = Path(config.reward_model.model).name
    return parent / "search" / f"{stem}-{name}-s{config.seed}"


def manifest(config: SearchConfig, verifier: Verifier | None) -> dict[str, Any]:
    """What a run directory is about: everything that changes records, models by digest."""
    plain: dict[str, Any] = {"verifier_digest": "" if verifier is None else verifier.digest}
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in ("output", "concurrency", "workers", "ray", "grade_timeout"):
            continue
        if isinstance(value, RewardModelConfig):
            value = {**asdict(value), "digest": weights_digest(model_path(value.model))}
        elif isinstance(value, Task):
            value = task_spec(value)
        elif isinstance(value, PolicyConfig):
            value = settled(value)
        elif isinstance(value, Sampler) and verifier is not None:
            value = capped(value, verifier.card)
        if is_dataclass(value) and not isinstance(value, type):
            value = {k.name: str(getattr(value, k.name)) for k in fields(value)}
        plain[f.name] = value
    return on_disk(plain)
