"""Two processes that hold shares of the policy (FSDP2)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pav.core.errors import UserError
from pav.rl.config import RlConfig
from pav.verifier.lora import Lora
from tests.pav.rl_shares import main

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.pav.rl_shares"]


@pytest.fixture(scope="module")
def left(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two shares leave after the same updates."""
    output = tmp_path_factory.mktemp("shares")
    given = [str(tiny_model("llama")), str(output)]
    main("one", *given)
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "fsdp", *given],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def flat(path: Path) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint: weights, moments, and what is served."""
    plain: dict[str, Any] = torch.load(path, weights_only=True)
    moments = plain["optimizer"]["state"]
    return {
        **plain["learner"],
        **{f"served.{k}": v for k, v in plain["served"].items()},
        **{f"{i}.{k}": v for i, values in moments.items() for k, v in values.items()},
    }


def test_two_processes_with_unequal_batches_make_the_updates_of_one(left: Path) -> None:
    # After the first update, and after the second.
    for name in ("ckpt", "on"):
        one, two = flat(left / f"one.{name}"), flat(left / f"fsdp.{name}")
        assert one.keys() == two.keys()
        for key, value in one.items():
            # A step of Adam is the rate (.001) whatever the gradient: moments tell more.
            atol = 1e-7 if "exp_avg" in key else 1e-4
            torch.testing.assert_close(two[key], value, atol=atol, rtol=1e-3)


@pytest.mark.parametrize("strategy", ["one", "fsdp"])
def test_a_resumed_run_goes_on_with_the_same_bits(strategy: str, left: Path) -> None:
    on, resumed = flat(left / f"{strategy}.on"), flat(left / f"{strategy}.resumed")
    start = flat(left / f"{strategy}.ckpt")
    assert any(not torch.equal(start[key], on[key]) for key in on)
    for key, value in on.items():
        assert torch.equal(resumed[key], value), key


def test_a_mismatch_of_one_process_ends_all(left: Path) -> None:
    ended = {path.stem for path in left.glob("*.ended")}
    assert ended == {"one-0", "fsdp-0", "fsdp-1"}


def test_adapters_are_not_sharded() -> None:
    with pytest.raises(UserError, match=r"strategy fsdp shards .* lora is given; use --strat"):
        RlConfig("v", strategy="fsdp", lora=Lora())
