"""What a comparison compares: its methods and settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.engine.pool import check_workers
from pav.grading.sandbox import DEFAULT_TIMEOUT, check_timeout
from pav.policy.policy import PolicyConfig, Sampler
from pav.reward_models.text import RewardModelConfig
from pav.tasks.base import Split, Task
from pav.verifier.pick import Pick
from pav.verifier.score import Score
from search.methods.beam import Duplicates
from search.methods.smc import Resampling, Weight
from search.run.session import Scoring

Kind = Literal["beam", "greedy", "dvts", "alphallm", "smc", "best_of_n"]


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Args:
        name: what table and plot call it.
        kind: ``beam``, ``dvts``, ``alphallm`` or ``smc``, as the commands of these names;
            ``greedy``, one place with the children of N; or ``best_of_n`` (independent solutions
            and a pick).
        verifier: checkpoint; not needed with ``reward_model``, or where the pick is ``majority``.
        reward_model: a third-party one in the verifier's place (best_of_n), e.g. ``{model: DIR}``.
        pick: final pick; by default the verifier's.
        alpha: weight of the advantage (beam, dvts); by default the verifier's.
        prover: head or bo<K> (beam, dvts); by default the verifier's.
        samples: children per place and step (all but smc and best_of_n).
        n: widths to run (all but best_of_n); by default the comparison's.
        surprise: use the calibrators with surprise.
        scoring: fused, separate or auto.
        policy: sample from another policy (best_of_n by majority), e.g. the prover.
        score: rank steps by ``q+a`` (Q + alpha * A, the default), ``q`` or ``a`` (beam, dvts).
        duplicates: ``weigh`` (the default) or ``merge``, as in search.beam (beam).
        weight: how Q weights particles (smc): ``change`` (the default), ``q`` or ``odds``.
        resampling: ``systematic`` (the default) or ``multinomial`` (smc).
    """

    name: str
    kind: Kind = "beam"
    verifier: str | None = None
    pick: Pick | None = None
    alpha: float | None = None
    prover: str | None = None
    samples: int = 3
    n: list[int] | None = None
    surprise: bool = True
    scoring: Scoring = "auto"
    policy: PolicyConfig | None = None
    score: Score | None = None
    duplicates: Duplicates | None = None
    weight: Weight | None = None
    resampling: Resampling | None = None
    reward_model: RewardModelConfig | None = None

    def __post_init__(self) -> None:
        if self.duplicates is not None and self.kind != "beam":
            raise UserError(
                f"method {self.name!r} has duplicates {self.duplicates!r}, which is for kind beam; "
                f"leave it out for kind {self.kind}"
            )
        if self.reward_model is not None:
            if self.kind != "best_of_n" or self.verifier is not None:
                raise UserError(
                    f"method {self.name!r} has a reward_model, which takes a verifier's place "
                    "in kind best_of_n alone; give that kind and no verifier (a PRM can guide "
                    "search.beam --reward_model)"
                )
        elif self.verifier is None and (self.kind != "best_of_n" or self.pick != "majority"):
            raise UserError(
                f"method {self.name!r} has no verifier; give one, or kind best_of_n "
                "with a reward_model or with pick majority"
            )


@dataclass(frozen=True)
class Investment:
    """What was spent on a verifier before the first search.

    Args:
        verifier: its checkpoint, spelled as in ``methods``.
        labels: the label runs that it was trained on.
        rollouts: count the runs' rollouts from prefixes; an ORM can do with the solutions.
        epochs: passes over the training solutions, where the trunk was trained too.
        models: rollout policies of another size than the base policy, as ``name: model``.
    """

    verifier: str
    labels: list[str]
    rollouts: bool = True
    epochs: float = 1.0
    models: dict[str, str] = field(default_factory=dict)


Selectable = Literal["alpha", "K"]


@dataclass(frozen=True)
class Selection:
    """How alpha and the prover are chosen on validation problems (``search/select.py``).

    Args:
        n: beam width.
        problems: how many validation problems.
        seeds: run seeds.
        alphas: values to try; by default the paper's two stages, up to 18 of them.
        ks: Best-of-K provers to try; heads of other policies compete with them.
    """

    n: int = 16
    problems: int = 200
    seeds: list[int] = field(default_factory=lambda: [0])
    alphas: list[float] | None = None
    ks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise UserError(f"selection.ks is {self.ks}; give numbers of 1 or more")
        if self.alphas is not None and (not self.alphas or min(self.alphas) < 0):
            raise UserError(f"selection.alphas is {self.alphas}; give weights of 0 or more")


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods over N on the same problems.

    Args:
        methods: what to compare; the first beam sets the token budgets of best-of-N.
        output: run directory; the same command resumes it.
        n: widths and sample counts.
        seeds: run seeds.
        problems: how many problems of ``split``.
        skip: leave out the first so many problems of ``split``, e.g. those already looked at.
        split: never choose settings on ``test``.
        task: needed only where the verifiers' task is not built in.
        sampler: another sampler than the verifiers were made for (warns).
        concurrency: problems at a time, of each worker.
        workers: processes that search, each with engines of its own; they share the GPUs or cores.
        ray: address of a Ray cluster of your own that the workers run on (``auto``, ``host:port``),
            or ``local``; needs the extra ``ray``. Ray runs code for whoever reaches its ports.
        grade_timeout: seconds that a grader of your own may take for one answer, which then counts
            as wrong; null for no limit.
        max_traces: upper limit on the solutions of a best-of-N sample set.
        title: of the plot.
        verbose: print all rows and columns, not the short tables (every row is in compare.csv).
        select: choose ``alpha``, ``K`` (the prover) or both on validation problems first, for every
            beam that does not set them.
        selection: how they are chosen.
        investments: what the verifiers cost to make, for the compute-efficiency ratios.
        engine: device settings.
    """

    methods: list[Method]
    output: str
    n: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    seeds: list[int] = field(default_factory=lambda: [0])
    problems: int = 64
    skip: int = 0
    split: Split = "test"
    task: Task | None = None
    sampler: Sampler | None = None
    concurrency: int = 32
    workers: int = 1
    ray: str | None = None
    grade_timeout: float | None = DEFAULT_TIMEOUT
    max_traces: int = 128
    title: str = ""
    verbose: bool = False
    select: list[Selectable] = field(default_factory=list)
    selection: Selection = field(default_factory=Selection)
    investments: list[Investment] = field(default_factory=list)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        check_workers(self.workers, self.ray)
        check_timeout(self.grade_timeout)
        names = [m.name for m in self.methods]
        if len(set(names)) != len(names) or not names:
            raise UserError(f"methods are called {names}; give at least one, all names different")
        known = {m.verifier for m in self.methods if m.verifier}
        if not known:
            raise UserError("no method has a verifier; one is needed to know task and policy")
        models = {m.reward_model for m in self.methods if m.reward_model}
        for one in models:
            if sum(other.model == one.model for other in models) > 1:
                raise UserError(
                    f"methods have the reward_model {one.model!r} with several settings; give it "
                    "the same in all of them"
                )
        for investment in self.investments:
            if investment.verifier not in known:
                raise UserError(
                    f"investments name the verifier {investment.verifier!r}, which no method has; "
                    f"the methods have {', '.join(sorted(known))}"
                )
