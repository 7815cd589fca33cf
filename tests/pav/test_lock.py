"""One writer at a time: the lock names who holds it, and ends with its holder."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pav.core.errors import UserError
from pav.core.lock import LOCK, Lock

HOLDER = """
import os, sys, time
from pathlib import Path
from pav.core.lock import Lock

lock = Lock(Path(sys.argv[1]), "run")
if os.fork() == 0:
    time.sleep(60)  # it outlives its parent
print("held", flush=True)
time.sleep(60)
"""
# Takes the lock as often as it can, and says when two had it at once.
CROWD = """
import os, sys
from pathlib import Path
from pav.core.errors import UserError
from pav.core.lock import Lock

path, inside, taken = Path(sys.argv[1]), Path(sys.argv[2]), 0
while taken < 200:
    try:
        with Lock(path, "run"):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            inside.unlink()
            taken += 1
    except UserError:
        pass
"""


def start(script: str, *arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, cwd=Path(__file__).parents[2], start_new_session=True,
    )  # fmt: skip


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    child = start(HOLDER, path)
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        yield child
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def test_holder_is_named_and_its_death_frees_the_lock_whatever_it_forked(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with holder(path) as child:
        for _ in range(2):  # a refusal leaves the name where it was
            with pytest.raises(UserError) as refused:
                Lock(path, "run")
            assert str(refused.value) == (
                f"output 'run' is being written by process {child.pid} on {socket.gethostname()}; "
                "wait for it or choose another output"
            )
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        deadline = time.monotonic() + 30
        while True:  # the kernel may take a moment
            try:
                with Lock(path, "run"):
                    assert re.match(rf"process {os.getpid()} on .+", path.read_text())
                break
            except UserError:
                assert time.monotonic() < deadline
    assert list(tmp_path.iterdir()) == []


def test_no_two_ever_hold_it_though_the_file_goes_with_its_holder(tmp_path: Path) -> None:
    crowd = [start(CROWD, tmp_path / LOCK, tmp_path / "inside") for _ in range(3)]
    for child in crowd:
        assert (child.communicate()[1], child.returncode) == ("", 0)
    assert list(tmp_path.iterdir()) == []
