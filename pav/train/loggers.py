"""Where losses and metrics go besides the terminal."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from pav.core.errors import UserError
from pav.train.config import TrainConfig


def logger_of(config: TrainConfig) -> Any:
    """Lightning's logger, writing under ``<output>.logs/``; False for none.

    Raises:
        UserError: if its package is missing.
    """
    if config.logger == "none" or config.dry_run:
        return False
    output = Path(config.output)
    directory = output.with_suffix(".logs")
    try:
        if config.logger == "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            return TensorBoardLogger(directory, name="", version="")
        from lightning.pytorch.loggers import WandbLogger

        directory.mkdir(parents=True, exist_ok=True)
        # A run that is resumed goes on in the same place.
        known = output.with_suffix(".training") / "wandb_id"
        if not known.exists():
            known.write_text(secrets.token_hex(4))
        return WandbLogger(
            output.stem, str(directory), id=known.read_text(), project="pav", resume="allow"
        )
    except ModuleNotFoundError as error:
        package = "tensorboardX" if config.logger == "tensorboard" else "wandb"
        raise UserError(
            f"logger {config.logger} needs the package {package}, which is not installed; "
            f"pip install {package}, or --logger none"
        ) from error
