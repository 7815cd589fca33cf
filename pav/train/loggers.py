"""Where losses and metrics go besides the terminal."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pav.core.errors import UserError
from pav.train.config import TrainConfig

if TYPE_CHECKING:
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger


def logger_of(config: TrainConfig) -> Any:
    """Lightning's logger, writing under ``<output>.logs/``; False for none.

    Raises:
        UserError: if its package is missing.
    """
    if config.logger == "none" or config.dry_run:
        return False
    output = Path(config.output)
    known = output.with_suffix(".training") / "wandb_id"
    return logger_at(config.logger, output.with_suffix(".logs"), output.stem, known)


def logger_at(
    kind: Literal["tensorboard", "wandb"], directory: Path, name: str, known: Path
) -> TensorBoardLogger | WandbLogger:
    """A logger that writes to ``directory``.

    Args:
        kind: which.
        directory: where to.
        name: of the run, in wandb.
        known: file of the run's id in wandb: a run that is resumed goes on in the same place.

    Raises:
        UserError: if its package is missing.
    """
    try:
        if kind == "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            return TensorBoardLogger(directory, name="", version="")
        from lightning.pytorch.loggers import WandbLogger

        directory.mkdir(parents=True, exist_ok=True)
        if not known.exists():
            known.write_text(secrets.token_hex(4))
        return WandbLogger(
            name, str(directory), id=known.read_text(), project="pav", resume="allow"
        )
    except ModuleNotFoundError as error:
        package = "tensorboardX" if kind == "tensorboard" else "wandb"
        raise UserError(
            f"logger {kind} needs the package {package}, which is not installed; "
            f"pip install {package}, or --logger none"
        ) from error
