"""What RL needs of a device's memory, before anything is loaded.

One device holds the policy in training, its start (for the KL divergence), the verifier, and the
policy once more in the engine, with its KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import AutoConfig

from pav.core.errors import UserError
from pav.engine.gpu_memory import WORKSPACE, planned
from pav.engine.loading import EngineConfig
from pav.policy.policy import Policy, Sampler
from pav.reward_models.reward_model import RewardModel
from pav.rl.config import RlConfig
from pav.train.memory import MemoryPlan, Work, device_memory, plan_memory
from pav.verifier.library import LoadedVerifier
from pav.verifier.lora import Lora, check_targets
from pav.verifier.shape import GIB, Shape, shape_of

# Log-probabilities and entropies keep logits over the vocabulary half a GiB at a time, in copies.
_LOGITS = 4 * GIB // 2
# A KV cache below this many whole sequences starves the engine.
_SEQUENCES = 16
# Of a GPU; the rest is fragmentation.
_USABLE = 0.95


Scoring = LoadedVerifier | RewardModel


@dataclass(frozen=True)
class Plan:
    """Bytes on one device.

    Attributes:
        training: the policy: weights, gradients, optimiser, activations.
        reference: its start.
        verifier: its trunk or a reward model, and an ORM's trunk.
        engine: weights and workspace of the engine.
        cache: its KV cache.
    """

    training: MemoryPlan
    reference: int
    verifier: int
    engine: int
    cache: int

    @property
    def total(self) -> int:
        """All together."""
        beside = self.reference + self.verifier + self.engine + self.cache
        return self.training.total + beside

    def __str__(self) -> str:
        parts = ("reference", "verifier", "engine", "cache")
        listed = ", ".join(f"{part} {getattr(self, part) / GIB:.1f}" for part in parts)
        return f"{self.total / GIB:.1f} GiB (policy in training {self.training}, {listed})"


def plan(
    config: RlConfig, policy: Policy, scorers: Sequence[Scoring], sampler: Sampler, gpu: bool
) -> Plan:
    """What ``config`` needs; the KV cache is what it must be at least, unless it is given."""
    shape = _shape(policy.path)
    training = _training(config, shape, sampler.max_length)
    size = 4 if policy.config.dtype == "float32" else 2
    served = planned(policy.path, policy.config.dtype, config.engine.tensor_parallel_size)
    cache = _SEQUENCES * sampler.max_length * served.kv_token
    if config.engine.kv_gib or not gpu:
        cache = int((config.engine.kv_gib or 1.0) * GIB)
    engine = size * shape.parameters // config.engine.tensor_parallel_size
    engine += WORKSPACE if gpu else 0
    if config.workers:  # elsewhere
        engine = cache = 0
    return Plan(
        training,
        0 if not config.kl or config.lora else 4 * -(-shape.parameters // _shards(config)),
        sum(map(_weights, scorers)),
        engine,
        cache,
    )


def settle(
    config: RlConfig, policy: Policy, scorers: Sequence[Scoring], sampler: Sampler, gpu: bool
) -> EngineConfig:
    """Print the plan; the engine's settings, with its share of a GPU where none is given.

    Raises:
        UserError: if it does not fit, naming settings that need less.
    """
    found = plan(config, policy, scorers, sampler, gpu)
    total = device_memory(gpu)
    print(f"memory: about {found} of {total / GIB:.1f} GiB")
    budget = int(total * _USABLE)
    if found.total > budget:
        ways = _ways_out(config, policy, scorers, sampler, gpu, budget)
        raise UserError(
            f"RL of {policy.config.model!r} needs about {found}, and the device has "
            f"{total / GIB:.1f} GiB; "
            + (f"these fit: {'; '.join(ways)}" if ways else "take a smaller policy or verifier")
        )
    if not gpu or config.workers or not config.engine.planned:
        return config.engine
    # What is left is KV cache: the engine takes its share before the policy is loaded.
    own = budget - found.total + found.engine + found.cache
    return replace(config.engine, gpu_memory_utilization=own / total)


def _weights(scorer: Scoring) -> int:
    """Bytes of the weights of what scores."""
    if isinstance(scorer, RewardModel):
        return scorer.planned.weights
    return (4 if scorer.dtype == "float32" else 2) * _shape(scorer.trunk.path).parameters


def _shape(path: str) -> Shape:
    return shape_of(AutoConfig.from_pretrained(path, trust_remote_code=False))


def _training(config: RlConfig, shape: Shape, longest: int) -> MemoryPlan:
    if config.lora is not None:
        check_targets(config.lora, shape.linear_widths)
    work = Work(
        "full" if config.lora is None else "lora",
        config.precision,
        tokens=max(config.tokens_per_batch, longest),
        length=longest,
        checkpointing=config.gradient_checkpointing,
        adapters=0 if config.lora is None else shape.adapter_parameters(config.lora),
        shards=_shards(config),
    )
    found = plan_memory(shape, work)
    # The policy is loaded in float32, whatever it is trained in, and adapters lie on that.
    weights = max(found.weights, 4 * -(-shape.parameters // work.shards) + 4 * work.adapters)
    # An engine is given whole weights.
    gathered = 4 * shape.parameters if config.is_sharded else 0
    return replace(found, weights=weights, other=found.other + _LOGITS + gathered)


def _shards(config: RlConfig) -> int:
    return config.processes if config.is_sharded else 1


def _ways_out(
    config: RlConfig,
    policy: Policy,
    scorers: Sequence[Scoring],
    sampler: Sampler,
    gpu: bool,
    budget: int,
) -> list[str]:
    """Settings that make a plan fit that does not, least change first."""
    lighter = replace(config, gradient_checkpointing=True)
    small = replace(lighter, tokens_per_batch=max(1024, sampler.max_length))
    options = [
        (lighter, "--gradient_checkpointing true"),
        (small, f"--gradient_checkpointing true --tokens_per_batch {small.tokens_per_batch}"),
    ]
    if config.processes > 1 and config.lora is None:
        options.append((replace(small, strategy="fsdp"), f"{options[1][1]} --strategy fsdp"))
    if config.kl:
        options.append((replace(small, kl=0.0), f"{options[1][1]} --kl 0"))
    if config.lora is None:
        options.append((replace(small, lora=Lora()), f"{options[1][1]} --lora '{{rank: 16}}'"))
    found = []
    for other, how in options:
        needed = plan(other, policy, scorers, sampler, gpu)
        if other != config and needed.total <= budget:
            found.append(f"{how} ({needed.total / GIB:.1f} GiB)")
    return found
