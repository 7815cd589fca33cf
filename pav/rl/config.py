"""The settings of ``pav.rl``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.policy.policy import PolicyConfig, Sampler
from pav.reward_models.text import RewardModelConfig
from pav.tasks.base import Task
from pav.train.config import Precision
from pav.verifier.lora import Lora

Dense = Literal["none", "pav", "record", "discounted", "q_mu", "q_base", "likelihood"]
RewardKind = Literal[
    "outcome", "base", "base_100",
    "probability", "avg_probability", "logprob", "avg_logprob", "jepo", "sft",
]  # fmt: skip
# Rewards of the reference answer: no answer is sampled.
LIKELIHOODS = ("probability", "avg_probability", "logprob", "avg_logprob", "jepo", "sft")
# Iterations that the slope of the chain's floor is fitted on (arXiv 2602.03979, Section 5).
SLOPE_ITERATIONS = 40


@dataclass(frozen=True)
class RlConfig:
    """Train a policy by online RL: a frozen verifier as dense reward (PAV paper, Section 5), or the
    likelihood of a reference answer (arXiv 2602.03979).

    Args:
        verifier: checkpoint of pav.train, or a shipped one; it is never changed. Without one,
            ``policy`` and ``task`` are given, and ``dense`` is ``none`` or ``likelihood``.
        output: directory to write to: ``last`` and ``best`` (policies), metrics, samples, plots.
            The same command resumes.
        init: policy to start from; by default the verifier's base policy.
        policy: the policy, where no verifier remembers it.
        task: needed only where the verifier's task is not built in, or there is no verifier.
        trunk: new place of the verifier's trunk, if it moved.
        sampler: how solutions are sampled; by default as the verifier's labels were. The policy
            trains at this temperature, with top_p 1 and top_k 0.
        orm: checkpoint of an ORM whose Q of a whole solution is the outcome, in place of the
            task's grader.
        reward: of a whole trace. ``outcome``: the grader's (or ``orm``'s). ``base``: 1 where the
            text between ``answer_tags`` equals a reference, else 0; ``base_100``: 100, 10 for
            another answer, 0 for none. Of the reference answer after the policy's chain, where no
            answer is sampled: its ``probability`` (VeriFree), ``avg_probability`` of its tokens
            (RLPR), ``logprob``, ``avg_logprob`` per token, ``jepo`` (log of the group's mean
            probability). ``sft``: fine-tuning on the reference after ``sft_chain``.
        answer_tags: text that opens and closes an answer, e.g. ``[<answer>, </answer>]``; by
            default the task's. Sampling ends at the closing one.
        references: of a problem with several: ``mean`` (one is drawn for the group of an iteration)
            or ``best`` (that which the policy finds likeliest after the chain).
        reference_term: whether the likelihood itself is raised, too (the second term of its
            gradient); without it, chains alone are.
        sft_chain: what ``sft`` comes after: ``none``, or chains of the policy at its start
            (``own``: a warm start for likelihood rewards).
        chain_floor: chains of fewer tokens lose ``chain_slope`` for every token that is missing.
        chain_slope: by default that of reward over chain length in the first 40 iterations, before
            which nothing is taken off.
        dense: reward of a step beside the outcome. ``pav``: the prover's advantage A (Eq. 5);
            ``record``: what the step adds to the highest Q of the prover so far, never negative;
            ``discounted``: A of Q that is worth less the more steps are left, by ``discount``;
            ``q_mu``: the prover's Q, and ``q_base``: the base policy's Q (both for ablations);
            ``likelihood``: what the step adds to the log-probability of the reference answer under
            the policy itself, without a verifier; ``none``: the reward of the trace alone.
        reward_model: a third-party PRM (see pav/reward_models/text.py) whose Q the dense reward is
            made of, in place of a head's; a verifier is then asked for task, policy and sampler
            alone.
        prover: whose Q: a head, ``bo<K>``, or a weighted mean such as ``q/a:0.5,q/b:0.5``; by
            default the verifier's.
        discount: of every step that is left, for ``discounted``.
        alpha: weight of the dense reward.
        credit_lambda: share of later steps' dense reward in a step's credit: 0 is the paper's (a
            step's own), 1 the sum of all.
        center: what is taken off the credits: nothing, or their mean over the batch at the same
            step index (``step``) or at all steps (``batch``).
        estimator: baseline of the outcome: ``rloo`` (mean of the group's other traces),
            ``group_mean``, or ``value`` (a head on the policy that predicts outcome and credit of
            every token).
        refresh_labels_every: iterations between new labels of the policy as it is, on which the
            base policy's head is fitted again; ``prover`` must be made of it (``bo<K>``).
        refresh_rollouts: rollouts from every prefix of one new trace per problem of the batch.
        iterations: of sampling and updating.
        problems: training problems, taken in a new order every epoch.
        batch: problems of an iteration.
        group: traces of each.
        updates_per_batch: optimiser steps on the traces of an iteration; more than one needs
            ``clip`` or ``importance_cap``.
        clip: clipping range of the importance ratio, e.g. 0.2 (PPO).
        importance_cap: upper limit of importance weights, e.g. 2.
        normalization: what the loss is a mean over. ``traces``: tokens of a trace are added up
            (Eq. 5); ``sequences``: of each trace the mean over its tokens; ``tokens``: of all.
        length_penalty: taken off the outcome for every token of a solution.
        kl: coefficient of the KL divergence from the start.
        kl_estimator: ``k3`` in the loss (low variance, biased gradient) or ``k1`` in the reward of
            every token and those before it (unbiased).
        lr: peak learning rate (AdamW).
        value_lr: that of the value head.
        warmup: first share of the iterations, over which the rate rises.
        schedule: what follows: ``cosine`` to zero, or ``constant``.
        max_grad_norm: gradients of a larger norm are scaled down to it.
        lora: train adapters of this kind in place of all weights.
        tokens_per_batch: padded tokens of one forward pass.
        gradient_checkpointing: recompute activations: less memory, a third more time.
        precision: of training, as in Lightning, e.g. ``bf16-mixed``.
        accelerator: Lightning accelerator.
        strategy: how training processes share the work: ``ddp`` (``auto``; a copy of the policy
            each) or ``fsdp`` (FSDP2: weights, gradients and optimiser are sharded; no adapters).
        devices: training processes on this machine.
        num_nodes: machines.
        workers: engines of each training process, in processes of their own (on GPUs: on those
            that no training process takes); 0 for one in the training process itself.
        ray: address of a Ray cluster that has room for the workers, or ``auto``, or ``local``.
        engine: device settings of the policy's engine.
        mismatch_limit: mean difference of log-probabilities between engine and trainer that ends
            the run.
        truncation_limit: share of traces cut by the length cap that ends the run (see ``guards``).
        eval_every: iterations between evaluations.
        eval_problems: validation problems.
        eval_samples: traces of each at the training temperature, beside a greedy one.
        checkpoint_every: iterations between checkpoints to resume from.
        samples_every: iterations between traces written to ``samples.jsonl``.
        guards: what happens where the figures of the run say that something goes wrong
            (:mod:`pav.rl.guards`). ``warn``: it is said once; numbers that are not finite, traces
            cut by the length cap and lost held-out accuracy end the run. ``stop``: all of it ends
            the run. ``off``: nothing is looked at but ``mismatch_limit``.
        logger: where metrics go beside ``metrics.jsonl``.
        grade_timeout: seconds for one answer, for graders of users.
        seed: of problems, samples and the value head.
        dry_run: open everything, sample and score one batch, say what it takes; writes nothing.
    """

    verifier: str | None = None
    output: str = "runs/rl"
    init: str | None = None
    policy: PolicyConfig | None = None
    task: Task | None = None
    trunk: str | None = None
    sampler: Sampler | None = None
    orm: str | None = None
    reward: RewardKind = "outcome"
    answer_tags: tuple[str, str] | None = None
    references: Literal["mean", "best"] = "mean"
    reference_term: bool = True
    sft_chain: Literal["none", "own"] = "none"
    chain_floor: int | None = None
    chain_slope: float | None = None
    dense: Dense = "pav"
    reward_model: RewardModelConfig | None = None
    prover: str | None = None
    discount: float = 0.9
    alpha: float = 3.0
    credit_lambda: float = 0.0
    center: Literal["none", "step", "batch"] = "none"
    estimator: Literal["rloo", "group_mean", "value"] = "rloo"
    refresh_labels_every: int | None = None
    refresh_rollouts: int = 4
    iterations: int = 200
    problems: int = 10_000
    batch: int = 64
    group: int = 4
    updates_per_batch: int = 1
    clip: float | None = None
    importance_cap: float | None = None
    normalization: Literal["traces", "sequences", "tokens"] = "traces"
    length_penalty: float = 0.0
    kl: float = 0.001
    kl_estimator: Literal["k1", "k3"] = "k3"
    lr: float = 1e-6
    value_lr: float = 1e-3
    warmup: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float = 1.0
    lora: Lora | None = None
    tokens_per_batch: int = 8192
    gradient_checkpointing: bool = False
    precision: Precision = "32-true"
    accelerator: str = "auto"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    workers: int = 0
    ray: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    mismatch_limit: float = 0.1
    truncation_limit: float = 0.2
    eval_every: int = 10
    eval_problems: int = 200
    eval_samples: int = 4
    checkpoint_every: int = 10
    samples_every: int = 10
    guards: Literal["warn", "stop", "off"] = "warn"
    logger: Literal["none", "tensorboard", "wandb"] = "none"
    grade_timeout: float | None = 10.0
    seed: int = 0
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in (
            "iterations", "problems", "batch", "group", "updates_per_batch", "tokens_per_batch",
            "devices", "num_nodes", "eval_every", "eval_samples", "checkpoint_every",
            "samples_every", "refresh_rollouts",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("alpha", "kl", "length_penalty", "eval_problems"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")
        for name in ("lr", "value_lr", "max_grad_norm", "mismatch_limit"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; give a number above 0")
        for name in ("credit_lambda", "warmup", "truncation_limit", "discount"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a share from 0 to 1")
        for name, least in (("clip", 0.0), ("importance_cap", 1.0)):
            value = getattr(self, name)
            if value is not None and not least < value < float("inf"):
                raise UserError(f"{name} is {value}; give a number above {least:g}")
        if self.group == 1 and self.estimator != "value" and self.reward != "sft":
            raise UserError(
                f"group is 1, but the baseline of --estimator {self.estimator} is made of the "
                "group's other traces; raise group, or use --estimator value"
            )
        if self.updates_per_batch > 1 and self.clip is None and self.importance_cap is None:
            raise UserError(
                f"updates_per_batch is {self.updates_per_batch}: traces are of an older policy "
                "after the first update; add --clip 0.2 or --importance_cap 2"
            )
        if self.refresh_labels_every is not None and self.refresh_labels_every < 1:
            raise UserError(
                f"refresh_labels_every is {self.refresh_labels_every}; give 1 or more iterations, "
                "or leave it out"
            )
        if self.refresh_labels_every and self.processes > 1:
            raise UserError(
                f"refresh_labels_every is given, and devices x num_nodes is {self.processes}: "
                "heads are fitted in one process; set both to 1, or leave it out"
            )
        if self.reward_model is not None:
            self._check_reward_model()
        if self.clip is not None and self.importance_cap is not None:
            raise UserError("clip and importance_cap are both given; choose one of them")
        if self.batch % self.processes:
            raise UserError(
                f"batch is {self.batch}, which {self.processes} processes cannot share equally; "
                "give a multiple"
            )
        if self.strategy == "fsdp" and self.lora is not None:
            raise UserError(
                "strategy fsdp shards a policy that is trained in full, and lora is given; use "
                "--strategy ddp"
            )
        if self.workers < 0:
            raise UserError(f"workers is {self.workers}; give 0 or more")
        if self.ray is not None and not (self.workers and self.ray.strip()):
            raise UserError(
                f"ray is {self.ray!r} and workers is {self.workers}; give an address and 1 or more "
                "workers, or leave ray out"
            )
        if self.problems < self.batch:
            raise UserError(
                f"problems is {self.problems}, fewer than a batch of {self.batch}; raise problems, "
                "or lower batch"
            )
        self._check_reward()
        sampler = self.sampler
        if sampler is not None:
            check_sampler(sampler, "sampler")

    def _check_reward(self) -> None:
        if self.verifier is None:
            if self.dense not in ("none", "likelihood") and self.reward_model is None:
                raise UserError(
                    f"dense is {self.dense}, a verifier's reward, and no verifier is given; add "
                    "--verifier, or --dense none"
                )
            if self.policy is None:
                raise UserError(
                    "no verifier is given, which would remember policy and task; add --policy and "
                    "--task, or --verifier"
                )
            for name in ("orm", "refresh_labels_every", "prover", "trunk"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{name} is {getattr(self, name)!r} and no verifier is given, which it "
                        f"goes with; add --verifier, or leave {name} out"
                    )
        elif self.policy is not None:
            raise UserError(
                "policy and verifier are both given; give another start as --init, and leave "
                "policy out"
            )
        if self.orm is not None and self.reward != "outcome":
            raise UserError(f"orm is given and reward is {self.reward}; leave one of them out")
        if self.by_likelihood and (self.estimator == "value" or self.updates_per_batch > 1):
            raise UserError(
                f"reward is {self.reward}, which is read in the update itself; give --estimator "
                "rloo and --updates_per_batch 1"
            )
        if self.reward == "sft" and self.sft_chain == "none" and self.group > 1:
            raise UserError(
                f"group is {self.group} and reward is sft without chains: a problem has one "
                "reference to learn; add --group 1, or --sft_chain own"
            )
        if self.reward == "sft" and self.dense != "none":
            raise UserError(f"reward is sft and dense is {self.dense}; add --dense none")
        if self.sft_chain == "own" and self.reward != "sft":
            raise UserError(
                f"sft_chain is own and reward is {self.reward}; add --reward sft, or leave it out"
            )
        if not self.reference_term and (not self.by_likelihood or self.reward == "sft"):
            raise UserError(
                f"reference_term is false and reward is {self.reward}, which has no other term or "
                "no such term; leave it out, or give a likelihood reward"
            )
        if self.answer_tags is not None and not self.answer_tags[0]:
            raise UserError(
                f"answer_tags is {list(self.answer_tags)}, without an opening tag; give e.g. "
                "'[<answer>, </answer>]', or leave it out"
            )
        slope = self.chain_slope
        if slope is not None and (self.chain_floor is None or not 0 <= slope < float("inf")):
            raise UserError(
                f"chain_slope is {slope} and chain_floor is {self.chain_floor}; give a slope of 0 "
                "or more with a floor"
            )
        if self.chain_floor is not None and (self.chain_floor < 1 or self.reward == "sft"):
            raise UserError(
                f"chain_floor is {self.chain_floor} and reward is {self.reward}; give 1 or more "
                "tokens and a reward of sampled chains"
            )

    @property
    def by_likelihood(self) -> bool:
        """Whether the reward is that of the reference answer."""
        return self.reward in LIKELIHOODS

    def reads_references(self, is_graded: bool) -> bool:
        """Whether reference answers are read of the policy, in training or in evaluations.

        Args:
            is_graded: whether the task grades; without it they are all that is measured.
        """
        return self.by_likelihood or self.dense == "likelihood" or not is_graded

    def _check_reward_model(self) -> None:
        """Refuse settings that a reward model's Q has no part in."""
        if self.dense in ("none", "q_base", "likelihood"):
            raise UserError(
                f"reward_model is given, and --dense {self.dense} reads none; use --dense pav, "
                "record, discounted or q_mu, or leave reward_model out"
            )
        for name in ("prover", "refresh_labels_every"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"{name} is about heads of the verifier, in whose place reward_model is given; "
                    f"leave one of them out"
                )

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return self.devices * self.num_nodes

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a share of the policy, not a copy."""
        return self.strategy == "fsdp" and self.processes > 1


def check_sampler(sampler: Sampler, where: str) -> None:
    """Refuse a sampler whose distribution is not the one that is trained.

    Args:
        sampler: settings.
        where: names them.

    Raises:
        UserError: naming what to change.
    """
    for name, neutral in (("top_p", 1.0), ("top_k", 0), ("repetition_penalty", 1.0)):
        if (value := getattr(sampler, name)) != neutral:
            raise UserError(
                f"{where} has {name} {value}, but RL trains the distribution that it samples from: "
                f"add --sampler.{name} {neutral:g}"
            )
