"""Settings of the search commands."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from pav.engine import EngineConfig
from pav.errors import UserError
from pav.guarded import DEFAULT_TIMEOUT, check_timeout
from pav.policy import PolicyConfig, Sampler, model_path, settled, weights_digest
from pav.tasks.base import Split, Task, task_spec
from pav.verifier import Verifier
from search.alphallm import WEIGHT
from search.beam import Duplicates
from search.pick import Pick
from search.rank import Score
from search.reward_text import RewardModelConfig
from search.session import Scoring, capped
from search.smc import Resampling, Weight
from search.workers import check_workers


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
        orm: a third-party reward model that scores in the verifier's place: a sequence classifier,
            or a PRM (see search/reward_text.py).
        concurrency: problems at a time, of each worker.
        workers: processes that search, each with engines of its own; they share the GPUs or cores.
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
    orm: RewardModelConfig | None = None
    concurrency: int = 32
    workers: int = 1
    grade_timeout: float | None = DEFAULT_TIMEOUT
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.n < 1 or self.problems < 1:
            raise UserError(f"n is {self.n}, problems is {self.problems}; both must be positive")
        check_workers(self.workers)
        check_timeout(self.grade_timeout)


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


@dataclass(frozen=True)
class BeamConfig(SearchConfig):
    """Beam search by Q_base + alpha * A_prover; with n 1 greedy step search.

    Args:
        samples: children per place and step (C).
        alpha: weight of the advantage; by default the verifier's.
        prover: a head such as q/prover, bo4 for Best-of-4 of the base policy, or a weighted mean
            such as q/a:0.5,q/b:0.5; by default the verifier's.
        score: rank steps by Q + alpha * A (``q+a``, the default), by Q or by A alone.
        duplicates: ``weigh`` (the default): places share the draws of a round in proportion to how
            often their last step was drawn, which is better where right steps hardly differ;
            ``merge``: alike.
        baseline: ``orm`` also runs best-of-N by the ORM, at the same N and at the tokens that beam
            spent, and majority vote.
        baseline_verifier: the ORM, a checkpoint or the directory of a third-party reward model; by
            default orm.ckpt beside the verifier.
    """

    samples: int = 3
    alpha: float | None = None
    prover: str | None = None
    score: Score | None = None
    duplicates: Duplicates = "weigh"
    baseline: Literal["orm"] | None = None
    baseline_verifier: str | None = None


@dataclass(frozen=True)
class AlphaLlmConfig(SearchConfig):
    """Beam search by Q_base and AlphaLLM's bonus for prefixes whose children differ.

    Args:
        samples: children per place and step.
        bonus: weight of the bonus.
    """

    samples: int = 3
    bonus: float = WEIGHT


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


@dataclass(frozen=True)
class BestOfNConfig(SearchConfig):
    """Best-of-N: independent solutions, ranked at their last position.

    Without verifier and reward model only ``pick: majority`` is left.
    """


def run_directory(config: SearchConfig, name: str, verifier: Path | None) -> Path:
    """Where a run goes: beside its verifier, or in ``runs`` where that is shipped or absent."""
    if config.output:
        return Path(config.output)
    shipped = verifier is None or "assets" in verifier.parts
    parent = Path("runs") if verifier is None or shipped else verifier.parent
    stem = "samples" if verifier is None else verifier.stem
    if config.orm is not None:
        stem = Path(config.orm.model).name
    return parent / "search" / f"{stem}-{name}-s{config.seed}"


def manifest(config: SearchConfig, verifier: Verifier | None) -> dict[str, Any]:
    """What a run directory is about: everything that changes records, models by digest."""
    plain: dict[str, Any] = {"verifier_digest": "" if verifier is None else verifier.digest}
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in ("output", "concurrency", "workers", "grade_timeout"):
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
    return plain
