"""The verifier: heads on a causal LM trunk, its checkpoint and what it remembers.

Head names say what they predict: ``q/<policy>`` the chance that this policy finishes right from
here, ``lik/<policy>`` the chance that it gives the reference answer if it has to answer at once,
``orm`` the chance that a complete solution is right.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from pav.core.errors import UserError
from pav.core.files import damage, finite
from pav.policy.policy import (
    ASSET_PREFIX,
    Dtype,
    PolicyConfig,
    Prompt,
    Sampler,
    asset,
    model_path,
    weights_digest,
)
from pav.tasks.base import BUILT_IN, Task
from pav.verifier.calibrate import SURPRISE, Calibrator
from pav.verifier.score import Pick

if TYPE_CHECKING:  # imported where they are used: --help stays fast
    from torch import Tensor

    from pav.verifier.trunk import HeadedTrunk

# Of the checkpoint: raised when an older one would not load or would mean something else.
FORMAT = 2


@dataclass(frozen=True)
class VerifierMeta:
    """What a verifier remembers; plain data, stored as JSON in the checkpoint.

    Attributes:
        heads: head names in row order.
        recipe: ``pav`` (heads of a search; a PQV is one without a prover) or ``orm``.
        trunk: model name or path as given.
        trunk_digest: digest of the trunk's weights before training.
        frozen: whether the trunk was left as it was.
        prompt: how the trunk is asked.
        dtype: dtype it is served in.
        task: class path and settings.
        task_fingerprint: what the labels mean.
        policy: the base policy.
        policy_fingerprint: its weights, tokenizer and prompt.
        tokenizer: tokenizer fingerprint of labels, policy and trunk.
        sampler: how the labels were sampled.
        base_head: head of the base policy's Q, empty for an ORM.
        prover_head: head whose advantage search adds by default, empty for an ORM.
        alpha: default weight of the advantage.
        pick: default rule for the final pick, chosen on validation.
        calibrators: head -> calibrator without surprise.
        surprise_calibrators: head -> calibrator with surprise.
        validation: metrics on the half of validation that the calibrators did not see.
        lora: ``rank`` and ``alpha`` of the adapters, empty where there are none.
        head: ``linear``; older versions had another kind, which is refused.
        loss: what the heads were fitted with.
        policy_prompt: how the policy was asked for the labels (:mod:`pav.policy.rendered`); empty
            in checkpoints of older versions.
        trunk_prompt: how the trunk was asked in training; likewise.
    """

    heads: list[str]
    recipe: str
    trunk: str
    trunk_digest: str
    frozen: bool
    prompt: dict[str, Any]
    dtype: Dtype
    task: dict[str, Any]
    task_fingerprint: str
    policy: dict[str, Any]
    policy_fingerprint: str
    tokenizer: str
    sampler: dict[str, Any]
    base_head: str
    prover_head: str
    alpha: float
    pick: Pick
    calibrators: dict[str, dict[str, Any]] = field(default_factory=dict)
    surprise_calibrators: dict[str, dict[str, Any]] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    head: str = "linear"
    loss: str = "bce"
    policy_prompt: dict[str, str] = field(default_factory=dict)
    trunk_prompt: dict[str, str] = field(default_factory=dict)

    def calibrator(self, head: str, with_surprise: bool) -> Calibrator:
        """Calibrator of ``head``."""
        source = self.surprise_calibrators if with_surprise else self.calibrators
        if head not in source:
            raise UserError(
                f"the verifier has no calibrator for head {head} (surprise {with_surprise}); train "
                "it again with pav.train"
            )
        return Calibrator.from_plain(source[head])

    def policy_config(self) -> PolicyConfig:
        """The base policy as a config."""
        plain = dict(self.policy)
        return PolicyConfig(**{**plain, "prompt": prompt_from(plain["prompt"])})

    def sampler_config(self) -> Sampler:
        """The sampler as a config."""
        return Sampler(**self.sampler)


def prompt_from(plain: dict[str, Any]) -> Prompt:
    """A :class:`Prompt` from plain data."""
    shots = [(q, a) for q, a in plain["few_shot"]]
    return Prompt(**{**plain, "few_shot": shots, "chat": bool(plain["chat"])})


@dataclass(frozen=True)
class Verifier:
    """A trained verifier on disk.

    Attributes:
        path: the checkpoint file.
        digest: digest of the file, stamped on exports.
        card: what it remembers.
        weight: (H, D) head rows.
        bias: (H,) head biases, added on our side.
        trunk_state: the trunk's weights where all were trained, else None.
        adapters: ``<module>.lora_A.weight`` (rank, in) and ``<module>.lora_B.weight`` (out, rank)
            where adapters were trained, else None.
    """

    path: Path
    digest: str
    card: VerifierMeta
    weight: Tensor
    bias: Tensor
    trunk_state: dict[str, Tensor] | None
    adapters: dict[str, Tensor] | None = None


def checkpoint_path(name: str) -> Path:
    """Path of a checkpoint; ``pav:reference`` and ``pav:reference_orm`` are shipped."""
    if name.startswith(ASSET_PREFIX):
        path = asset(f"verifiers/{name.removeprefix(ASSET_PREFIX)}.ckpt")
        if not path.exists():
            shipped = ", ".join(sorted(f"pav:{p.stem}" for p in path.parent.glob("*.ckpt")))
            raise UserError(f"no shipped verifier {name!r}; there are {shipped or 'none'}")
        return path
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"no verifier checkpoint at {name!r}; train one with pav.train --output {name}, or use "
            "the shipped pav:reference"
        )
    return path


def checkpoint_name(path: Path) -> str:
    """The name by which a checkpoint is given: of a shipped one not where it lies."""
    name = f"{ASSET_PREFIX}{path.stem}"
    return name if path == asset(f"verifiers/{path.stem}.ckpt") else str(path)


def load_verifier(name: str) -> Verifier:
    """Load a checkpoint; nothing but tensors and plain data is ever unpickled.

    Raises:
        UserError: if there is none, it is not a verifier, or a number in it is not finite.
    """
    import torch

    path = checkpoint_path(name)
    try:
        if zipfile.is_zipfile(path) and (wrong := damage(path)):
            raise UserError(f"verifier {name!r} is damaged ({wrong}); restore the file")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        written = checkpoint.get("format", 1) if "verifier" in checkpoint else FORMAT
        if written != FORMAT:
            raise UserError(
                f"verifier {name!r} has checkpoint format {written}, this version reads {FORMAT}; "
                "train it again with pav.train, or use the version that wrote it"
            )
        card = VerifierMeta(**json.loads(checkpoint["verifier"]))
        state = checkpoint["state_dict"]
        heads = _under("model.head.", state)
        if card.head != "linear":
            raise UserError(
                f"verifier {name!r} has head {card.head!r}, this version reads linear heads; train "
                "it again with pav.train, or use the version that wrote it"
            )
        if card.base_head and card.base_head not in card.heads:
            raise ValueError(f"it has no head {card.base_head!r}")
        weight, bias = heads["weight"].float(), heads["bias"].float()
        if len(weight) != len(card.heads) or len(bias) != len(card.heads):
            raise ValueError(f"{len(card.heads)} heads in {len(weight)} rows")
        card = replace(card, validation=_undefined(card.validation))
        flaw = _calibration_flaw(card) or not_finite(card.heads, state)
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for a hostile or foreign file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"{name!r} is not a verifier checkpoint ({reason}); give a file that pav.train wrote"
        ) from error
    if flaw:
        raise UserError(
            f"verifier {name!r} is damaged: {flaw}; restore the file, or train it again with "
            "pav.train"
        )
    trunk, adapters = _under("model.trunk.", state), _under("model.adapters.", state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Verifier(path, digest, card, weight, bias, trunk or None, adapters or None)


def not_finite(heads: Sequence[str], state: Mapping[str, Tensor]) -> str:
    """The first tensor that holds NaN or an infinity, by its head where it is a head's.

    Args:
        heads: head names in row order.
        state: tensors of a :class:`HeadedTrunk`.

    Returns:
        E.g. ``head q/base: weight holds 3 NaN in row 0 (of 128 numbers)``; empty where there is
        none.
    """
    for key, tensor in state.items():
        if not tensor.is_floating_point() or tensor.isfinite().all():
            continue
        name = key.removeprefix("model.")
        bad_RC = ~tensor.reshape(len(tensor) if tensor.ndim else 1, -1).isfinite()
        row = int(bad_RC.any(1).nonzero()[0, 0])
        values = tensor.reshape(len(bad_RC), -1)[row]
        nans, count = int(values.isnan().sum()), int(bad_RC[row].sum())
        what = f"{count} NaN" if nans == count else f"{count} NaN or infinite numbers"
        if name in ("head.weight", "head.bias"):
            name = f"head {heads[row]}: {name.removeprefix('head.')}"
        return f"{name} holds {what} in row {row} (of {len(values)} numbers)"
    return ""


def _calibration_flaw(card: VerifierMeta) -> str:
    """The first calibrator that cannot be computed; empty where all can."""
    for kind, calibrators in (("", card.calibrators), ("surprise ", card.surprise_calibrators)):
        # There are none before calibration.
        for head in card.heads if calibrators else ():
            if head not in calibrators:
                return f"head {head} has no {kind}calibrator"
        for head, plain in calibrators.items():
            calibrator = Calibrator.from_plain(plain)
            if flaw := calibrator.flaw(1 + len(SURPRISE)):
                return f"head {head}: {kind}calibrator {flaw}"
    return ""


def _undefined(metrics: Any) -> Any:
    """Metrics with NaN where the file has null."""
    if isinstance(metrics, dict):
        return {k: _undefined(v) for k, v in metrics.items()}
    if isinstance(metrics, list):
        return [_undefined(v) for v in metrics]
    return math.nan if metrics is None else metrics


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_model(verifier: Verifier, trunk: str) -> HeadedTrunk:
    """The verifier in transformers, in float32, adapters merged: any trunk mode.

    Args:
        verifier: the checkpoint.
        trunk: path of its trunk (:func:`trunk_path`).

    Raises:
        UserError: if a tensor has another shape than the trunk's.
    """
    from pav.verifier.lora import merge_into
    from pav.verifier.trunk import HeadedTrunk, load_trunk

    model = HeadedTrunk(load_trunk(trunk), len(verifier.card.heads))
    try:
        if verifier.trunk_state is not None:
            model.trunk.load_state_dict(verifier.trunk_state)
        if verifier.adapters is not None:
            merge_into(model.trunk, verifier.adapters, verifier.card.lora)
        model.head.load_state_dict({"weight": verifier.weight, "bias": verifier.bias})
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"verifier {str(verifier.path)!r} does not fit the trunk at {trunk!r} "
            f"({' '.join(str(error).split())[:200]}); restore the file, or train it again with "
            "pav.train"
        ) from error
    return model.eval()


def card_json(card: VerifierMeta) -> str:
    """The card as stored in a checkpoint."""
    plain = asdict(card)
    # Undefined metrics are NaN here and null there: NaN is no JSON.
    return json.dumps(plain | {"validation": finite(plain["validation"])}, allow_nan=False)


def trunk_path(verifier: Verifier, override: str | None = None) -> str:
    """Where the trunk's files lie.

    Raises:
        UserError: if they moved, or another model lies there.
    """
    name = override or verifier.card.trunk
    moved = UserError(
        f"the trunk of {str(verifier.path)!r} is not at {name!r} any more; name its new place "
        "with --trunk"
    )
    try:
        path = model_path(name)
    except UserError as error:
        raise moved from error
    if weights_digest(path) != verifier.card.trunk_digest:
        # A local path of two parts that is gone looks like owner/name of a hub.
        if not Path(path).is_dir():
            raise moved
        raise UserError(
            f"the model at {name!r} is not the trunk that {str(verifier.path)!r} was trained on "
            f"(digest {weights_digest(path)}, expected {verifier.card.trunk_digest}); name the "
            "right one with --trunk"
        )
    from transformers import AutoConfig

    hidden = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().hidden_size
    if verifier.weight.shape[1] != hidden:
        raise UserError(
            f"verifier {str(verifier.path)!r} is damaged: its head rows hold "
            f"{verifier.weight.shape[1]} "
            f"numbers, and the trunk at {name!r} has hidden states of {hidden}; restore the file, "
            "or train it again with pav.train"
        )
    return path


def resolve_task(spec: dict[str, Any], given: Task | None, source: str) -> Task:
    """The task named by a checkpoint or label run.

    Its class is imported only if it is built in; otherwise the user has to name it again.

    Raises:
        UserError: if it is not built in and not given, or another one is given.
    """
    class_path = str(spec["class_path"])
    if given is not None:
        found = f"{type(given).__module__}.{type(given).__qualname__}"
        if found != class_path:
            raise UserError(f"{source} is about task {class_path!r}, not {found!r}; name that one")
        return given
    module, _, name = class_path.rpartition(".")
    if not class_path.startswith(BUILT_IN):
        raise UserError(
            f"{source} names the task {class_path!r}, which is not built in and is not imported "
            f"on a file's word; if you trust it, add --task {class_path} and its settings"
        )
    try:
        cls = getattr(importlib.import_module(module), name)
        if not (isinstance(cls, type) and issubclass(cls, Task)):
            raise TypeError(f"{name} is no task")
        return _task_from(cls, spec["init_args"])
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{source} names the task {class_path!r} with settings that this version does not know "
            f"({error}); use the version that wrote it, or name a task with --task"
        ) from error


def _task_from(cls: type[Task], settings: dict[str, Any]) -> Task:
    """A task from a file's settings, by hand: jsonargparse imports any class that a value names."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in hints:
            raise TypeError(f"no setting {name!r}")
        kind = hints[name]
        if isinstance(kind, type) and is_dataclass(kind):
            value = kind(**value)
        elif get_origin(kind) is tuple:
            value = tuple(value)
        values[name] = value
    return cls(**values)
