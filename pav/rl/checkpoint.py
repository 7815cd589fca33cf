"""What a run leaves on disk: a checkpoint to go on from, and policies that others can load."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pav.core.errors import UserError, unwritable
from pav.core.files import damage, write_whole
from pav.rl.learner import Learner
from pav.rl.processes import whole
from pav.rl.refresh import Refreshed
from pav.verifier.lora import save_adapter

FORMAT = 1
LAST = "last.ckpt"


@dataclass
class State:
    """Where a run is.

    Attributes:
        iteration: iterations that are done, each one version of the policy.
        best: held-out accuracy of the best policy so far; below 0 where none was measured.
        best_iteration: iterations behind it.
        refreshed: the verifier's base head, where it was fitted anew.
    """

    iteration: int = 0
    best: float = -1.0
    best_iteration: int = 0
    refreshed: Refreshed | None = None


def snapshot(
    state: State, learner: Learner, optimizer: torch.optim.Optimizer, is_kept: bool
) -> dict[str, Any]:
    """What a checkpoint holds: whole tensors, also where processes hold shares of them.

    Args:
        state: where the run is.
        learner: the policy in training.
        optimizer: its optimiser.
        is_kept: whether this process writes it; the others help to gather.
    """

    def kept(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        found = whole(value)
        return found.cpu() if is_kept else None

    names, moments = learner.trained(), optimizer.state_dict()
    own = {i: {k: kept(v) for k, v in values.items()} for i, values in moments["state"].items()}
    return {
        "format": FORMAT,
        "state": {**vars(state), "refreshed": state.refreshed and vars(state.refreshed)},
        "learner": {k: kept(v) for k, v in learner.state_dict().items() if k in names},
        "optimizer": {**moments, "state": own},
    }


def save(path: Path, plain: dict[str, Any]) -> None:
    """Write a :func:`snapshot`, whole or not at all.

    Raises:
        UserError: if it cannot be written; the one before is still there.
    """
    try:
        write_whole(path, lambda stream: torch.save(plain, stream))
    except OSError as error:
        raise unwritable(str(path), error) from error


def load(path: Path, learner: Learner) -> tuple[State, dict[str, Any] | None]:
    """Go on from a checkpoint; the state of a new run where there is none.

    Returns:
        Where the run is, and what its optimiser held.

    Raises:
        UserError: if it is damaged, or of another format.
    """
    if not path.exists():
        return State(), None
    again = "restore it, or choose another output"
    if wrong := damage(path):
        raise UserError(f"checkpoint {str(path)!r} is damaged ({wrong}); {again}")
    plain: dict[str, Any] = torch.load(path, "cpu", weights_only=True)
    if plain.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {str(path)!r} has format {plain.get('format')}, this version reads "
            f"{FORMAT}; {again}"
        )
    missing, unexpected = learner.load_state_dict(plain["learner"], strict=False)
    if unexpected or set(missing) & set(learner.trained()):
        raise UserError(f"checkpoint {str(path)!r} is of another policy; {again}")
    state = State(**plain["state"])
    if state.refreshed is not None:
        state.refreshed = Refreshed(**plain["state"]["refreshed"])
    return state, plain["optimizer"]


def save_policy(
    directory: Path,
    learner: Learner,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a policy as a transformers directory, in place of the one that is there.

    Its weights have the adapters merged; they lie in ``adapter``, too, as peft loads them.

    Args:
        directory: where.
        learner: gives the config.
        weights: :meth:`Learner.served`.
        tokenizer: the policy's.
    """
    building = directory.with_name(f".{directory.name}.tmp")
    old = directory.with_name(f".{directory.name}.old")
    try:
        for leftover in (building, old):
            shutil.rmtree(leftover, ignore_errors=True)
        learner.policy.save_pretrained(building, state_dict=weights)
        tokenizer.save_pretrained(building)
        if learner.lora is not None:
            save_adapter(building / "adapter", learner.policy, learner.lora)
        for file in building.rglob("*.*"):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        # A directory cannot replace one that is not empty.
        if directory.exists():
            directory.rename(old)
        building.rename(directory)
    except OSError as error:
        raise unwritable(str(directory), error) from error
    finally:
        for leftover in (building, old):
            shutil.rmtree(leftover, ignore_errors=True)
