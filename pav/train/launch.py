"""Processes that train together: as many as were asked for, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

# A job of such a name is a shell: Lightning starts the processes there itself.
INTERACTIVE = ("bash", "interactive")


class Launched(Protocol):
    """Settings of processes that train together."""

    @property
    def devices(self) -> int:
        """Processes of a machine."""

    @property
    def num_nodes(self) -> int:
        """Machines."""

    @property
    def processes(self) -> int:
        """Processes in all."""


def why_not(config: Launched, environment: Mapping[str, str], program: str = "pav.train") -> str:
    """Why the processes that a launcher started are not those that ``config`` asks for.

    Lightning believes the launcher: with fewer it would train on less than was planned, with more
    wait for devices that are not there.

    Args:
        config: settings.
        environment: the process's.
        program: the command that they belong to.

    Returns:
        One line that names the command to use; empty where they agree, or where Lightning starts
        them itself.
    """
    command = f"{program} --devices {config.devices} --num_nodes {config.num_nodes} ..."
    requested = f"devices x num_nodes is {config.devices} x {config.num_nodes}"
    if "TORCHELASTIC_RUN_ID" in environment:
        started = environment.get("WORLD_SIZE", "1")
        if started == str(config.processes):
            return ""
        line = (
            f"torchrun --nnodes={config.num_nodes} --nproc-per-node={config.devices} -m {command}"
        )
        return f"{requested}, but torchrun started {started} processes; start it with: {line}"
    name = environment.get("SLURM_JOB_NAME")
    # One process is one process, also in a job of many tasks.
    if config.processes == 1 or "SLURM_NTASKS" not in environment or name in INTERACTIVE:
        return ""
    wanted = {
        "SLURM_NTASKS": config.processes,
        "SLURM_NTASKS_PER_NODE": config.devices,
        "SLURM_NNODES": config.num_nodes,
    }
    differ = [
        f"{key}={environment.get(key, '')}"
        for key, value in wanted.items()
        if environment.get(key, "1" if key == "SLURM_NNODES" else "") != str(value)
    ]
    line = (
        f"srun --nodes={config.num_nodes} --ntasks={config.processes} "
        f"--ntasks-per-node={config.devices} {command}"
    )
    if differ:
        return f"{requested}, but SLURM started {' '.join(differ)}; start it with: {line}"
    # A batch script has a job's variables, but is a single process of no step.
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment:
        return f"{requested}, but the batch script runs one process; start it with: {line}"
    return ""
