"""Processes that train together are as many as were asked for, or the run is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pav.train.config import TrainConfig
from pav.train.launch import why_not

TASKS = {"SLURM_JOB_NAME": "labels", "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0"}
SRUN = (
    "start it with: srun --nodes=1 --ntasks=2 --ntasks-per-node=2 pav.train --devices 2 "
    "--num_nodes 1 ..."
)


def config(devices: int = 2, num_nodes: int = 1, **other: Any) -> TrainConfig:
    return TrainConfig(
        ["x"], trunk_mode="lora", devices=devices, num_nodes=num_nodes, accelerator="cpu", **other
    )


@settings(deadline=None)
@given(devices=st.integers(1, 8), nodes=st.integers(1, 8), tasks=st.integers(1, 64))
def test_job_of_as_many_tasks_trains_and_any_other_is_refused_with_the_line_to_use(
    devices: int, nodes: int, tasks: int
) -> None:
    environment = TASKS | {
        "SLURM_NTASKS": str(tasks), "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS_PER_NODE": str(devices),
    }  # fmt: skip
    said = why_not(config(devices, nodes), environment)
    if devices * nodes in (1, tasks):
        assert said == ""
    else:
        assert said.startswith(f"devices x num_nodes is {devices} x {nodes}, but SLURM started ")
        assert f"SLURM_NTASKS={tasks}" in said
        line = f"srun --nodes={nodes} --ntasks={devices * nodes} --ntasks-per-node={devices} "
        assert line in said and "\n" not in said


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ""),
        # A shell in a job: Lightning starts the processes itself.
        (TASKS | {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}, ""),
        (TASKS | {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "interactive"}, ""),
        # salloc without a number of tasks, and no srun.
        (TASKS, ""),
        (TASKS | {"SLURM_NTASKS": "1"}, "SLURM_NTASKS=1 SLURM_NTASKS_PER_NODE="),
        # Lightning takes the number of tasks of a node from nowhere else.
        (TASKS | {"SLURM_NTASKS": "2"}, "SLURM_NTASKS_PER_NODE="),
        (
            TASKS | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"},
            "SLURM_NTASKS_PER_NODE=1 SLURM_NNODES=2",
        ),
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "17"},
            "the batch script runs one process",
        ),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "SLURM_NTASKS": "1"}, ""),
    ],
)
def test_what_the_environment_says(environment: dict[str, str], said: str) -> None:
    found = why_not(config(), environment)
    assert said in found and bool(said) == bool(found)
    assert not found or found.endswith(SRUN)


def test_torchrun_of_another_number_is_refused_also_for_one_device() -> None:
    started = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "4"}
    for devices in (1, 2):
        said = why_not(config(devices), started)
        assert "but torchrun started 4 processes" in said
        assert f"torchrun --nnodes=1 --nproc-per-node={devices} -m pav.train" in said


def test_four_tasks_of_a_job_with_two_devices_print_one_line_in_all(tmp_path: Path) -> None:
    slurm = TASKS | {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "1"}
    # The first and the last one; what is in between is as the last.
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "pav.train", "--labels", "[x]", "--output",
             str(tmp_path / "pav.ckpt"), "--trunk_mode", "lora", "--devices", "2"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            cwd=Path(__file__).parents[2],
        )
        for rank in (0, 3)
    ]  # fmt: skip
    first, last = (task.communicate()[0] for task in tasks)
    assert [task.returncode for task in tasks] == [2, 2]
    assert first == (
        "pav.train: error: devices x num_nodes is 2 x 1, but SLURM started SLURM_NTASKS=4 "
        f"SLURM_NTASKS_PER_NODE=4; {SRUN}\n"
    )
    assert last == ""
