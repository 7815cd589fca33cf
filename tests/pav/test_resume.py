"""Runs that stop go on to the same weights, and runs on several processes train the same model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pav.train.command
from data_gen.store import Store
from pav.cli.run import run
from pav.core.errors import UserError
from pav.labels.tables import read_labels
from pav.train.command import train
from pav.train.config import TrainConfig
from pav.train.fit import VerifierModule
from pav.verifier.checkpoint import VerifierMeta
from pav.verifier.lora import Lora
from tests.full_disk import full_disk
from tests.pav.label_runs import write_labels

# Kills itself the hard way when it starts the seventh batch.
KILLED = """
import os, signal, sys
from pav.train.fit import VerifierModule
from pav.train.__main__ import main

start = VerifierModule.on_train_batch_start
def die(self, batch, index):
    if self.trainer.fit_loop.epoch_loop.total_batch_idx == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    start(self, batch, index)

VerifierModule.on_train_batch_start = die
main()
"""


class Died(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def trunk(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def labels(trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("resume") / "labels"
    return write_labels(directory, trunk, train_problems=24, validation_problems=8, seeds=4)


@pytest.fixture
def config(labels: str, trunk: Path, tmp_path: Path) -> TrainConfig:
    """Three batches an epoch, a checkpoint after each but an epoch's last."""
    return TrainConfig(
        [labels], str(tmp_path / "pav.ckpt"), trunk=str(trunk), trunk_mode="full", lr=1e-3,
        accelerator="cpu", max_epochs=3, tokens_per_batch=1024, checkpoint_minutes=0,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out calibration and report, which these tests do not look at."""

    def unreported(card: VerifierMeta, *_: Any) -> VerifierMeta:
        return card

    monkeypatch.setattr(pav.train.command, "fit_and_report", unreported)
    monkeypatch.setattr(pav.train.command, "print_report", lambda *_: None)
    monkeypatch.setattr("pav.train.batches.ROWS_PER_BATCH", 64)


def weights(config: TrainConfig) -> dict[str, Tensor]:
    return dict(torch.load(config.output, weights_only=True)["state_dict"])


def command(config: TrainConfig) -> list[str]:
    """The command line of ``config``, as far as it differs from the default."""
    words = []
    for name in TrainConfig.__dataclass_fields__:
        value = getattr(config, name)
        if name not in ("task", "prompt", "lora") and value is not None:
            words += [f"--{name}", f"[{value[0]}]" if name == "labels" else str(value)]
    return words


def said_of(err: str) -> list[str]:
    """Lines of stderr but those about few problems, which a tiny label run has."""
    return [line for line in err.splitlines() if "figures of so few say little" not in line]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def stop_at(monkeypatch: pytest.MonkeyPatch, batch: int, how: Callable[[], None]) -> None:
    """Lets ``how`` happen at the start of the batch of that number, once."""
    start = VerifierModule.on_train_batch_start
    left = [batch]

    def stop(self: Any, *args: Any) -> None:
        if left and self.trainer.fit_loop.epoch_loop.total_batch_idx == left[0]:
            left.clear()
            how()
        start(self, *args)

    monkeypatch.setattr(VerifierModule, "on_train_batch_start", stop)


def die() -> None:
    raise Died


@pytest.mark.parametrize("batch", [2, 6, 9])
@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_run_that_died_goes_on_to_the_weights_of_an_unbroken_one(
    mode: Any, batch: int, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # Dropout draws random numbers, a warm-up has a schedule that must go on where it was, and two
    # batches an optimiser step must not be torn apart.
    config = replace(
        config, trunk_mode=mode, lora=Lora(rank=2, dropout=0.3), warmup=3,
        accumulate=1 if mode == "frozen" else 2, tokens_per_batch=512,
    )  # fmt: skip
    unbroken = replace(config, output=str(tmp_path / "unbroken.ckpt"))
    train(unbroken)
    stop_at(monkeypatch, batch, die)
    with pytest.raises(Died):
        train(config)
    assert not Path(config.output).exists()
    assert (tmp_path / "pav.training" / "last.ckpt").exists()
    capsys.readouterr()
    train(config)
    assert "resuming from" in capsys.readouterr().out
    assert same(weights(config), weights(unbroken))
    # Nothing is left but what was asked for.
    assert not (tmp_path / "pav.training").exists()


# Waits before its first batch until it is told to go on.
WAITING = """
from pav.train.fit import VerifierModule
from pav.train.__main__ import main

def wait(self):
    print("training", flush=True)
    input()

VerifierModule.on_train_start = wait
main()
"""


def test_second_command_on_one_output_is_refused_and_leaves_the_first_alone(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", WAITING, *command(config)], stdin=subprocess.PIPE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert first.stdout is not None
    assert "training\n" in iter(first.stdout.readline, "")
    with pytest.raises(SystemExit) as stopped:
        run(train, TrainConfig, "pav.train", command(config))
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n")) == (2, 1)
    assert said.startswith(
        f"pav.train: error: output {config.output!r} is being written by process {first.pid} on "
    )
    _, said = first.communicate("\n")
    assert first.returncode == 0, said
    unbroken = replace(config, output=str(tmp_path / "unbroken.ckpt"))
    train(unbroken)
    assert same(weights(config), weights(unbroken))
    assert not (tmp_path / ".pav.ckpt.lock").exists()


def test_unsealed_labels_are_read_and_said_but_not_by_several_processes(
    config: TrainConfig, labels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = shutil.copytree(labels, tmp_path / "live")
    some = next(iter(read_labels([labels]).traces))
    with Store(live, json.loads((live / "manifest.json").read_text())) as store:
        store.announce(200)
        store.add(replace(some, trace_id="new", seed_index=9))
    config = replace(config, labels=[str(live)], max_epochs=1)
    with pytest.raises(UserError, match="are not sealed, and 2 processes may find journals of"):
        train(replace(config, devices=2))
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().out
    assert f"WARNING: labels {str(live)!r} are not sealed: 1 solutions and 0 rollouts are" in said
    assert f"WARNING: labels are not complete: {str(live)!r} has 129 of 200 solutions" in said


def test_kill_minus_nine_in_mid_epoch_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    killed = subprocess.run(
        [sys.executable, str(script), *command(config)], capture_output=True, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    unbroken = replace(config, output=str(tmp_path / "unbroken.ckpt"))
    train(unbroken)
    train(config)
    assert same(weights(config), weights(unbroken))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_between_two_steps_and_the_same_command_resumes(
    number: signal.Signals, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = replace(config, checkpoint_minutes=1000)
    before = signal.getsignal(number)
    stop_at(monkeypatch, 5, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stopped:
        run(train, TrainConfig, "pav.train", command(config))
    assert stopped.value.code == 130
    assert "interrupted; the same command resumes" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    last = torch.load(tmp_path / "pav.training" / "last.ckpt", weights_only=True)
    # One step later where the next one is an epoch's last: see LastCheckpoint.
    assert last["global_step"] in (6, 7)
    train(config)
    unbroken = replace(config, output=str(tmp_path / "unbroken.ckpt"))
    train(unbroken)
    assert same(weights(config), weights(unbroken))


def test_unfinished_run_of_another_configuration_is_refused_by_name(
    config: TrainConfig, labels: str, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 2, die)
    with pytest.raises(Died):
        train(config)
    other = replace(config, lr=3e-3, accumulate=2)
    with pytest.raises(UserError) as refused:
        train(other)
    assert "\n" not in str(refused.value)
    said = str(refused.value)
    assert "was made with another accumulate, lr (accumulate: 1 there, 2" in said
    assert "restore it, or choose another output, or remove that directory" in said
    write_labels(tmp_path / "more", trunk, train_problems=25, validation_problems=8)
    with pytest.raises(UserError, match=r"another labels \(labels: "):
        train(replace(config, labels=[str(tmp_path / "more")]))
    # Labels that grew are other labels, also under the same name.
    file = tmp_path / "pav.training" / "train.json"
    now = file.read_text()
    then = json.loads(now) | {"label_contents": "0" * 16}
    file.write_text(json.dumps(then, allow_nan=False))
    with pytest.raises(UserError, match="another label_contents"):
        train(config)
    file.write_text(now)
    # What does not change the result may change.
    train(replace(config, checkpoint_minutes=5.0, logger="none", memory_gib=500))


def test_first_process_says_what_is_trained_before_it_trains(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 0, die)
    with pytest.raises(Died):
        train(config)
    plain = json.loads((tmp_path / "pav.training" / "train.json").read_text())
    assert plain["lr"] == 1e-3
    assert len(plain["label_contents"]) == 16


def start(config: TrainConfig, environment: dict[str, str], before: str = "") -> Any:
    """``pav.train`` as a process of its own; ``before`` is what its shell does first."""
    line = f"{before} exec {shlex.join([sys.executable, '-m', 'pav.train', *command(config)])}"
    return subprocess.Popen(
        ["/bin/sh", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip


# Tasks of a job, started by srun; a shell in a job, where Lightning starts the second process.
SRUN = {"SLURM_JOB_NAME": "labels", "SLURM_JOB_ID": "12917", "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}  # fmt: skip
SHELL = SRUN | {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
                "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "tasks"),
    [
        ("ddp", [SRUN | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]),
        ("fsdp", [SHELL]),
    ],
)
def test_two_processes_train_the_model_of_one(
    strategy: Any, tasks: list[dict[str, str]], config: TrainConfig, tmp_path: Path
) -> None:
    together = replace(config, devices=2, strategy=strategy, max_epochs=1)
    for task in [start(together, environment) for environment in tasks]:
        said, errors = task.communicate()
        assert task.returncode == 0, said + errors[-3000:]
        assert not [line for line in errors.splitlines() if "GPU" in line or "Tip" in line]
    # An optimiser step of one process is as many batches, one after the other.
    alone = replace(config, output=str(tmp_path / "alone.ckpt"), accumulate=2, max_epochs=1)
    train(alone)
    one, two = weights(alone), weights(together)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=1e-4)
    assert not torch.equal(one["model.head.weight"], torch.zeros_like(one["model.head.weight"]))


# -- damaged checkpoints, and disks that are full -------------------------------------------------


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def zeroed(path: Path) -> None:
    """What a power cut leaves of blocks that never reached the disk."""
    middle = path.stat().st_size // 2
    with path.open("r+b") as stream:
        stream.seek(middle)
        stream.write(bytes(4096))


@pytest.fixture
def died(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run leaves that died in its third epoch."""
    stop_at(monkeypatch, 7, die)
    with pytest.raises(Died):
        train(config)
    working = tmp_path / "pav.training"
    kept = {"train.json", "last.ckpt", "last-1.ckpt", "best.ckpt"}
    assert {p.name for p in working.iterdir()} == kept
    return working


def test_damaged_last_checkpoint_is_said_and_passed_over_for_the_one_before(
    died: Path, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken = replace(config, output=str(tmp_path / "unbroken.ckpt"))
    train(unbroken)
    shutil.copytree(died, tmp_path / "copy")
    for damage in (cut(0), cut(0.1), cut(0.5), cut(0.99), zeroed):
        shutil.copytree(tmp_path / "copy", died, dirs_exist_ok=True)
        damage(died / "last.ckpt")
        capsys.readouterr()
        train(config)
        printed = capsys.readouterr()
        assert f"resuming from {died / 'last-1.ckpt'}" in printed.out
        (line,) = [text for text in said_of(printed.err) if "WARNING" in text]
        assert line.startswith(f"WARNING: {str(died / 'last.ckpt')!r} is damaged (")
        assert line.endswith("; it is passed over")
        assert same(weights(config), weights(unbroken))
        Path(config.output).unlink()


def test_run_without_a_whole_checkpoint_starts_from_the_beginning(
    died: Path, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("last.ckpt", "last-1.ckpt"):
        cut(0.5)(died / name)
    train(config)
    assert "holds no whole checkpoint: from the beginning, then" in capsys.readouterr().out
    unbroken = replace(config, output=str(tmp_path / "unbroken.ckpt"))
    train(unbroken)
    assert same(weights(config), weights(unbroken))


@pytest.mark.parametrize("name", ["best.ckpt", "train.json"])
def test_what_cannot_be_done_without_is_named_before_the_run_goes_on(
    name: str, died: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(0.5)(died / name)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(train, TrainConfig, "pav.train", command(config))
    assert stopped.value.code == 2
    (line,) = said_of(capsys.readouterr().err)
    assert str(died / name) in line
    assert line.endswith(f"restore it, or remove {str(died)!r} to train from the beginning")


@pytest.mark.parametrize(
    ("batch", "what"), [(4, "last.ckpt"), (5, "best.ckpt"), (None, "pav.ckpt")]
)
def test_full_disk_ends_the_run_with_one_line_and_the_same_command_goes_on(
    batch: int | None, what: str, config: TrainConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    unbroken = replace(config, output=str(tmp_path / "unbroken.ckpt"))
    train(unbroken)
    with ExitStack() as until_here:
        fills = partial(until_here.enter_context, full_disk(60_000))
        if batch is not None:
            stop_at(monkeypatch, batch, fills)
        else:
            saved = pav.train.command.save
            monkeypatch.setattr(pav.train.command, "save", lambda *args: (fills(), saved(*args)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(train, TrainConfig, "pav.train", command(config))
    monkeypatch.undo()
    assert stopped.value.code == 2
    (line,) = said_of(capsys.readouterr().err)
    assert line.startswith("pav.train: error: checkpoint ") and f"{what}' cannot be written" in line
    assert line.endswith(
        "(File too large); earlier ones are safe: free disk space or raise the quota there, then "
        "give the same command again"
    )
    assert not [p for p in tmp_path.rglob(".*.tmp")]
    monkeypatch.setattr(pav.train.command, "fit_and_report", lambda card, *_: card)
    monkeypatch.setattr(pav.train.command, "print_report", lambda *_: None)
    train(config)
    assert same(weights(config), weights(unbroken))


def test_full_disk_ends_all_processes_with_one_line(config: TrainConfig, tmp_path: Path) -> None:
    together = replace(config, devices=2)
    # In blocks of 512 bytes.
    task = start(together, {}, "ulimit -f 100;")
    _, errors = task.communicate(timeout=300)
    assert task.returncode == 2, errors
    (line,) = [text for text in errors.splitlines() if "rror" in text or "Traceback" in text]
    assert line.startswith("pav.train: error: checkpoint ") and "File too large" in line
