"""Label runs killed at random moments: real processes, real signals, real vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from pav.core.journal import JOURNAL, journal_lines
from pav.core.signals import interruptible
from pav.labels.tables import LabelSet, prefix_key, read_labels

REPOSITORY = Path(__file__).parents[2]
# Forks a command per line of input, so that vLLM is imported once. The line is "bytes signal": the
# command is sent the signal as soon as its journal has grown by so many bytes (signal 0: never).
DRIVER = """
import os, signal, sys, time
from pathlib import Path
import vllm
from data_gen.config import RolloutsConfig
from data_gen.rollouts import rollouts
from pav.cli.run import run

output, arguments = sys.argv[1], sys.argv[2:]
journal = Path(output) / "journal.jsonl"
size = lambda: journal.stat().st_size if journal.exists() else 0
for line in sys.stdin:
    grow, number = map(int, line.split())
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(rollouts, RolloutsConfig, "data_gen.rollouts", [*arguments, "--output", output])
        sys.stdout.flush()
        os._exit(0)
    limit, sent, ended = size() + grow, False, 0
    while not ended:
        if number and not sent and size() >= limit:
            os.kill(child, number)
            sent = True
        time.sleep(0.005)
        ended, status = os.waitpid(child, os.WNOHANG)
    print("ended", os.waitstatus_to_exitcode(status), flush=True)
"""


class Driver:
    """Runs ``data_gen.rollouts`` in processes that it kills."""

    def __init__(self, output: Path, arguments: list[str]) -> None:
        self.output = output
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(output), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=REPOSITORY, env=environment,
        )  # fmt: skip

    def __call__(self, grow: int = 0, number: int = 0) -> tuple[int, list[str]]:
        """(exit code, what it printed)."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(grow, int(number), file=self.process.stdin, flush=True)
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("ended "):
                return int(line.split()[1]), lines
        raise AssertionError(self.process.communicate()[1])

    def close(self) -> str:
        return self.process.communicate(timeout=60)[1]


@pytest.fixture
def drive(tiny_model: Callable[..., Path], tmp_path: Path) -> Driver:
    arguments = [
        "--policy.model", str(tiny_model("llama")), "--policy.name", "base",
        "--task", "Tape", "--ignore_warnings", "true", "--sampler.max_length", "48",
        "--problems", "12", "--validation_problems", "4",
        "--n_traces", "3", "--n_mc", "4", "--concurrency", "4",
        "--engine.kv_gib", "0.02", "--engine.max_num_seqs", "32",
    ]  # fmt: skip
    return Driver(tmp_path / "run", arguments)


def owed_keys(labels: LabelSet) -> set[tuple[str, str, int]]:
    keys = set()
    for t in labels.traces:
        ends = t.step_ends if t.truncated else t.step_ends[:-1]
        keys |= {prefix_key(t.problem_id, t.ids[:end]) for end in (0, *ends)}
    return {(key, "base", i) for key in keys for i in range(4)}


def acknowledged(journal: Path) -> list[str]:
    """What whole lines of a journal hold."""
    if not journal.exists():
        return []
    entries = [entry for _, entry in journal_lines(journal) if entry is not None]
    return [json.dumps(e["record"]) for e in entries if e["kind"] != "run"]


def test_run_killed_at_random_moments_loses_nothing_and_counts_nothing_twice(
    drive: Driver,
) -> None:
    random, journal = Random(6), drive.output / JOURNAL
    before: list[str] = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        code, _ = drive(random.randrange(1, 12_000), number)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        after = acknowledged(journal)
        assert after[: len(before)] == before
        assert not (drive.output / "traces").exists()
        before = after
    code, printed = drive()
    assert code == 0
    assert any(line.startswith("48 traces, ") for line in printed), printed
    said = drive.close()
    assert said.count("data_gen.rollouts: interrupted; the same command resumes") == 1
    assert "Traceback" not in said
    assert "never retrieved" not in said
    labels = read_labels([str(drive.output)])
    assert len(labels.traces) == 48
    assert Counter((c.prefix_key, c.policy, c.index) for c in labels.completions) == Counter(
        owed_keys(labels)
    )
    # What was acknowledged before a death is what the tables hold.
    rows = [json.dumps(vars(r)) for r in [*labels.traces, *labels.completions]]
    assert set(before) <= set(rows)
    assert len(before) > 20


# The first signal comes while work that does not look at signals is under way.
TWICE = """
import os, signal, time
from pav.core.signals import interruptible

with interruptible():
    try:
        os.kill(os.getpid(), {first})
    except KeyboardInterrupt:
        print("once", flush=True)
        os.kill(os.getpid(), {second})
        time.sleep(60)
"""


@pytest.mark.parametrize(("first", "second"), [(2, 2), (15, 2), (2, 15), (15, 15)])
def test_second_signal_ends_the_process_at_once(first: int, second: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import signal\n"
         "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
         + TWICE.format(first=first, second=second)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (128 + second, "once\n", "")


def test_signal_that_was_ignored_stays_ignored_and_handlers_are_put_back() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not before[1]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is before[1]
    finally:
        signal.signal(signal.SIGINT, before[0])
