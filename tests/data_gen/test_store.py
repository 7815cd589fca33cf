"""The label store: what was acknowledged survives any death, and nothing counts twice."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen import store as store_module
from data_gen.store import Store
from pav.core.errors import UserError
from pav.core.journal import JOURNAL
from pav.labels.tables import Completion, LabelSet, Trace, prefix_key, read_labels

MANIFEST = {
    "task": "t",
    "tokenizer": "k",
    "sampler": {"temperature": 1.0},
    "policy_fingerprint": "f",
    # Few-shot pairs are tuples in memory and lists on disk: the same configuration.
    "policy": {"few_shot": [("1+1", "2")]},
    "n_mc": 2,
}
FINGERPRINTS = {"base": "f", "prover": "g"}
REPOSITORY = Path(__file__).parents[2]


def completion(i: int, problem: str = "p", policy: str = "base", index: int = 0) -> Completion:
    """The i-th rollout of a problem: from the prefix (i,)."""
    return Completion(
        prefix_key=prefix_key(problem, [i]), problem_id=problem, policy=policy, index=index,
        prefix_ids=[i], ids=[i, 7], answer=str(i), correct=i % 2 == 0, truncated=i % 5 == 0,
    )  # fmt: skip


def trace(i: int, problem: str = "p") -> Trace:
    return Trace(
        trace_id=f"{problem}/base/{i}", problem_id=problem, question="1+1", gold="2", split="train",
        policy="base", seed_index=i, ids=[i, 8, 9], step_ends=[2, 3], answer=None, correct=False,
        truncated=False,
    )  # fmt: skip


def fill(directory: Path, records: Iterable[Completion | Trace], seal: bool = True) -> Path:
    with Store(directory, MANIFEST) as store:
        for record in records:
            store.add(record)
        if seal:
            store.seal(FINGERPRINTS)
    return directory


CHILD = """
import sys
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, {here!r})
from test_store import MANIFEST, completion
from data_gen.store import Store

with Store(Path(sys.argv[1]), MANIFEST) as store:
    for i in range(100_000):
        record = completion(i)
        if (record.prefix_key, "base", 0) not in store.completions:
            store.add(record)
            print(i, flush=True)
"""


def test_kill_minus_nine_loses_no_finished_rollout(tmp_path: Path) -> None:
    acknowledged: list[int] = []
    for wanted in (1, 40, 300):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD.format(here=str(Path(__file__).parent)), str(tmp_path)],
            stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
        )  # fmt: skip
        assert child.stdout is not None
        for _ in range(wanted):
            acknowledged.append(int(child.stdout.readline()))
        child.kill()
        # What it said between our last read and its death was acknowledged, too; the last line
        # may be torn.
        acknowledged += [int(s) for s in child.stdout.read().splitlines(True) if s.endswith("\n")]
        assert child.wait() == -signal.SIGKILL
        with Store(tmp_path, MANIFEST) as store:
            there = set(store.completions)
        assert {(completion(i).prefix_key, "base", 0) for i in acknowledged} <= there
        # One may have been written but not yet acknowledged.
        assert len(there) <= len(acknowledged) + 3
    # No restart did again what was there.
    assert len(acknowledged) == len(set(acknowledged)) >= 341
    with Store(tmp_path, MANIFEST) as store:
        assert all(store.completions[completion(i).prefix_key, "base", 0] == completion(i)
                   for i in acknowledged)  # fmt: skip
        store.add(trace(0))
        store.seal(FINGERPRINTS)
        total = len(store.completions)
    labels = read_labels([str(tmp_path)])
    assert len(labels.completions) == total
    assert set(labels.counts.values()) <= {(0, 1), (1, 1)}


def test_death_during_sealing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Death(BaseException):
        pass

    replace_file = store_module.replace_file
    records = [trace(0), *map(completion, range(6))]
    for survived in range(5):
        directory = fill(tmp_path / str(survived), records, seal=False)
        left = survived

        def dying(path: Path, content: bytes) -> None:
            nonlocal left
            if left == 0:
                path.with_name(f".{path.name}.tmp").write_bytes(content[: len(content) // 2])
                raise Death
            left -= 1
            replace_file(path, content)

        monkeypatch.setattr(store_module, "replace_file", dying)
        store = Store(directory, MANIFEST)
        if survived < 4:  # three tables and the emptied journal
            with pytest.raises(Death):
                store.seal(FINGERPRINTS)
        else:
            store.seal(FINGERPRINTS)
        del store
        monkeypatch.setattr(store_module, "replace_file", replace_file)
        with Store(directory, MANIFEST) as store:
            assert [*store.traces.values(), *store.completions.values()] == records
            store.seal(FINGERPRINTS)
        labels = read_labels([str(directory)])
        assert len(labels.completions) == 6
        assert all(n == 1 for _, n in labels.counts.values())


def test_death_at_the_very_start_leaves_a_directory_that_the_same_command_takes(
    tmp_path: Path,
) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".manifest.json.tmp").write_text('{"task": ')
    with Store(tmp_path, MANIFEST) as store:
        store.add(completion(0))
    with Store(tmp_path, MANIFEST) as store:
        assert len(store.completions) == 1


def test_journal_torn_at_any_byte_of_its_last_line_is_owed_again(tmp_path: Path) -> None:
    records = [completion(0), completion(1), completion(2)]
    journal = fill(tmp_path, records, seal=False) / JOURNAL
    whole = journal.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for cut in range(last, len(whole)):
        journal.write_bytes(whole[:cut])
        with Store(tmp_path, MANIFEST) as store:
            assert list(store.completions.values()) == records[:2]
            store.add(records[2])
        with Store(tmp_path, MANIFEST) as store:
            assert list(store.completions.values()) == records
        assert journal.read_bytes() == whole


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_byte_is_never_read_as_a_record(data: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        records = [completion(0), completion(1), completion(2)]
        directory = fill(Path(name) / "run", records, seal=False)
        content = bytearray((directory / JOURNAL).read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        (directory / JOURNAL).write_bytes(content)
        with Store(directory, MANIFEST) as store:
            found = list(store.completions.values())
            assert found == [r for r in records if r in found]
            # The damage is in one line, or makes one of two.
            assert len(found) >= 1
            for record in records:
                store.add(record)
            store.add(trace(0))
            store.seal(FINGERPRINTS)
        assert Counter(read_labels([str(directory)]).counts.values()) == {(1, 1): 2, (0, 1): 1}


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        Store(tmp_path, MANIFEST),
        pytest.raises(
            UserError, match=rf"being written by process {os.getpid()} on .+; wait for it or"
        ),
    ):
        Store(tmp_path, MANIFEST)
    with Store(tmp_path, MANIFEST):
        pass


def test_changed_configuration_is_refused_naming_the_keys(tmp_path: Path) -> None:
    fill(tmp_path, [completion(0)], seal=False)
    changed = {**MANIFEST, "n_mc": 3, "sampler": {"temperature": 0.5}}
    with pytest.raises(
        UserError, match=r"made with another n_mc, sampler \(n_mc: 2 there, 3 now\)"
    ):
        Store(tmp_path, changed)
    with pytest.raises(UserError, match=r"made with another skip \(skip: None there, 1 now\)"):
        Store(tmp_path, {**MANIFEST, "skip": 1})
    with Store(tmp_path, MANIFEST) as store:
        assert len(store.completions) == 1


def test_run_without_a_finished_row_may_be_claimed_anew(tmp_path: Path) -> None:
    mended = {**MANIFEST, "policy_fingerprint": "g"}
    with Store(tmp_path, MANIFEST) as store:
        store.announce(3)
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'12345678 {"kind":"tra')
    with Store(tmp_path, mended) as store:
        store.announce(3)
        store.seal(FINGERPRINTS)  # time was up: the tables are there, and empty
    with Store(tmp_path, MANIFEST) as store:
        store.add(trace(0))
    with pytest.raises(UserError, match=r"made with another policy_fingerprint \('?policy"):
        Store(tmp_path, mended)
    with Store(tmp_path, MANIFEST) as store:
        assert list(store.traces.values()) == [trace(0)]
        store.seal(FINGERPRINTS)
    with pytest.raises(UserError, match=r"made with another policy_fingerprint"):
        Store(tmp_path, mended)


def test_directory_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty and no label run \(it holds 'thesis.tex'\)"):
        Store(tmp_path, MANIFEST)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("output", ["file", "file/run", "closed/run"])
def test_unwritable_output_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0o500)
    if output.startswith("closed") and os.geteuid() == 0:
        pytest.skip("root may write into any directory")
    with pytest.raises(UserError, match=r"is not writable \(.+\); choose another") as error:
        Store(tmp_path / output, MANIFEST)
    assert "\n" not in str(error.value)


rollouts = st.builds(
    completion,
    i=st.integers(0, 4),
    problem=st.sampled_from(["p", "q"]),
    policy=st.sampled_from(["base", "prover"]),
    index=st.integers(0, 2),
)


@given(st.lists(rollouts, min_size=1, max_size=40))
@settings(max_examples=25, deadline=None)
def test_labels_count_every_distinct_rollout_once(records: list[Completion]) -> None:
    distinct = {(c.prefix_key, c.policy, c.index): c for c in records}
    groups: dict[tuple[str, str], list[Completion]] = {}
    for c in distinct.values():
        groups.setdefault((c.prefix_key, c.policy), []).append(c)
    with TemporaryDirectory() as name:
        directory = fill(Path(name), records)
        rows = pq.read_table(directory / "labels").to_pylist()
    assert len(rows) == len(groups)
    for row in rows:
        group = groups[row["prefix_key"], row["policy"]]
        assert row["n"] == len(group)
        assert row["k"] == sum(c.correct for c in group)
        assert row["truncated"] == sum(c.truncated for c in group)
        assert row["tokens"] == sum(len(c.ids) for c in group)
        assert row["first_index"] == min(c.index for c in group)
        assert row["policy_fingerprint"] == FINGERPRINTS[row["policy"]]


def test_sealed_tables_load_as_a_data_set_whose_counts_equal_the_completions(
    tmp_path: Path,
) -> None:
    from datasets import load_dataset

    records = [completion(i, index=j) for i in range(3) for j in range(4)]
    fill(tmp_path / "run", [trace(0), trace(1), *records])
    table = {
        name: load_dataset("parquet", data_files=str(tmp_path / "run" / name / "*.parquet"),
                           split="train", cache_dir=str(tmp_path / "cache"))
        for name in ("traces", "labels", "completions")
    }  # fmt: skip
    assert [t["trace_id"] for t in table["traces"]] == ["p/base/0", "p/base/1"]
    assert table["traces"][1]["ids"] == [1, 8, 9]
    counted = Counter((c["prefix_key"], c["policy"]) for c in table["completions"])
    assert {(r["prefix_key"], r["policy"]): r["n"] for r in table["labels"]} == counted
    assert set(counted.values()) == {4}
    assert [Completion(**c) for c in table["completions"]] == records


def test_sealing_twice_changes_nothing(tmp_path: Path) -> None:
    def tables() -> dict[str, list[dict[str, object]]]:
        folders = ("traces", "labels", "completions")
        return {name: pq.read_table(tmp_path / name).to_pylist() for name in folders}

    with Store(tmp_path, MANIFEST) as store:
        for i in range(4):
            store.add(completion(i))
        store.seal(FINGERPRINTS)
        first = tables()
        store.seal(FINGERPRINTS)
        assert tables() == first
    # A journal that outlived its sealing (death before it was dropped) counts no more either.
    fill(tmp_path, [completion(i) for i in range(4)])
    assert tables() == first
    # What comes later is added to what was sealed.
    fill(tmp_path, [completion(4)])
    assert len(tables()["labels"]) == 5


def test_labels_of_two_runs_merge_and_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    one = str(fill(tmp_path / "one", [trace(0), *(completion(i) for i in range(4))]))
    two = str(fill(tmp_path / "two", [trace(0, "q"), *(completion(i, "q") for i in range(3)),
                                      completion(0), completion(0, index=1)]))  # fmt: skip

    def content(labels: LabelSet) -> object:
        return labels.traces, labels.counts, labels.completions

    assert content(read_labels([one, one])) == content(read_labels([one]))
    both = read_labels([one, two])
    assert content(both) == content(read_labels([one, two, one])) != content(read_labels([one]))
    assert [t.trace_id for t in both.traces] == ["p/base/0", "q/base/0"]
    assert len(both.completions) == 8
    # (prefix 0, index 0) stands in both runs: one rollout, beside the one of index 1.
    assert both.counts[prefix_key("p", [0]), "base"] == (2, 2)
    assert both.counts[prefix_key("q", [0]), "base"] == (1, 1)


def test_runs_of_two_settings_are_not_mixed(tmp_path: Path) -> None:
    one = str(fill(tmp_path / "one", [trace(0), completion(0)]))
    for key in ("task", "tokenizer", "sampler", "policy_fingerprint"):
        two = tmp_path / key
        with Store(two, {**MANIFEST, key: "other"}) as store:
            store.add(trace(1))
            store.seal(FINGERPRINTS)
        with pytest.raises(UserError, match=f"disagree on {key}: 'other' and .*; train on runs of"):
            read_labels([one, str(two)])


def test_labels_that_are_missing_or_unfinished_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no manifest.json; run data_gen.rollouts --output"):
        read_labels([str(tmp_path)])
    empty = fill(tmp_path / "run", [], seal=False)
    with pytest.raises(UserError, match=r"hold no traces; let data_gen.rollouts finish"):
        read_labels([str(empty)])


def test_what_is_not_sealed_yet_is_read_from_the_journal_and_said(tmp_path: Path) -> None:
    with Store(tmp_path, MANIFEST) as store:
        store.announce(7)
        for record in (trace(0), completion(0)):
            store.add(record)
        store.seal(FINGERPRINTS, owed=6)
    (said,) = read_labels([str(tmp_path)]).warnings
    assert said == f"labels are not complete: {str(tmp_path)!r} has 1 of 7 solutions"
    fill(tmp_path, [trace(1), trace(2), completion(1)], seal=False)
    labels = read_labels([str(tmp_path)])
    assert (labels.traces, labels.completions) == (
        [trace(0), trace(1), trace(2)], [completion(0), completion(1)],
    )  # fmt: skip
    assert labels.counts == {(completion(i).prefix_key, "base"): (1 - i, 1) for i in (0, 1)}
    assert labels.warnings == [
        f"labels {str(tmp_path)!r} are not sealed: 2 solutions and 1 rollouts are read from their "
        "journal; the command that makes them goes on and seals them",
        f"labels are not complete: {str(tmp_path)!r} has 3 of 7 solutions",
    ]
    with Store(tmp_path, MANIFEST) as store:
        for i in range(3, 7):
            store.add(trace(i))
        store.seal(FINGERPRINTS, owed=0)
    assert read_labels([str(tmp_path)]).warnings == []


def test_records_survive_the_journal_exactly(tmp_path: Path) -> None:
    odd = replace(
        trace(0), question="naïve \u2018quotes\u2019 \u2028 \n\t", gold=None, answer="1\x00"
    )
    fill(tmp_path, [odd], seal=False)
    assert len((tmp_path / JOURNAL).read_bytes().splitlines()) == 1
    with Store(tmp_path, json.loads(json.dumps(MANIFEST))) as store:
        assert store.traces == {"p/base/0": odd}


def test_damaged_line_in_the_middle_costs_that_line_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = fill(tmp_path, map(completion, range(5)), seal=False) / JOURNAL
    lines = journal.read_bytes().splitlines(True)
    journal.write_bytes(b"".join([lines[0], lines[1], b"\0" * 40 + lines[2][40:], *lines[3:]]))
    for _ in range(2):  # the second start finds a journal without damage
        with Store(tmp_path, MANIFEST) as store:
            assert [c.prefix_ids[0] for c in store.completions.values()] == [0, 1, 3, 4]
    assert capsys.readouterr().err.count("WARNING: 1 lines of") == 1
    assert journal.read_bytes() == b"".join(lines[:2] + lines[3:])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_journal_cut_anywhere_and_filled_up_again_never_holds_a_torn_line(
    data: st.DataObject,
) -> None:
    with TemporaryDirectory() as name:
        directory, done = Path(name) / "run", 0
        for _ in range(3):
            with Store(directory, MANIFEST) as store:
                assert len(store.completions) <= done
                for i in range(4):
                    record = completion(i)
                    if (record.prefix_key, "base", 0) not in store.completions:
                        store.add(record)
                done = len(store.completions)
            content = (directory / JOURNAL).read_bytes()
            assert all(entry for _, entry in store_module.journal_lines(directory / JOURNAL))
            junk = data.draw(st.binary(max_size=8))
            cut = data.draw(st.integers(0, len(content)))
            (directory / JOURNAL).write_bytes(content[:cut] + junk)
            done = content[:cut].count(b"\n")
        with Store(directory, MANIFEST) as store:
            assert len(store.completions) == done


# The kernel takes part of the line that crosses the limit and refuses the rest.
FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_store import MANIFEST, completion
from data_gen.store import Store
from pav.core.journal import JOURNAL
from pav.core.errors import UserError

directory, limit = Path(sys.argv[1]), int(sys.argv[2])
said = []
with Store(directory, MANIFEST) as store:
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for i in range(2000):
        try:
            store.add(completion(i))
        except UserError as error:
            said.append(str(error))
            if len(said) == 2:  # a second rollout of the same step meets the same full disk
                break
print(i - 1, (directory / JOURNAL).stat().st_size, *said, sep="\\n")
"""


def check_full_disk(directory: Path, limit: int, reason: str) -> int:
    child = FULL.format(here=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", child, str(directory), str(limit)],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept, _, *said = done.stdout.splitlines()
    assert int(kept) > 10
    expected = (
        f"output {str(directory)!r} cannot be written ({reason}); what is finished is safe: "
        "free disk space or raise the quota there, then give the same command again"
    )
    assert said == [expected, expected]
    assert (directory / JOURNAL).read_bytes().endswith(b"}\n")
    assert all(entry for _, entry in store_module.journal_lines(directory / JOURNAL))
    return int(kept)


def test_file_size_limit_ends_with_one_line_and_loses_no_finished_rollout(tmp_path: Path) -> None:
    kept = check_full_disk(tmp_path, 10_001, "File too large")
    with Store(tmp_path, MANIFEST) as store:
        assert len(store.completions) == kept
        store.add(completion(kept))
        assert len(store.completions) == kept + 1


def test_full_disk_ends_with_one_line_and_the_same_command_resumes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk small enough to fill")
    try:
        (disk / "ballast").write_bytes(b"x" * 16_000)
        run = disk / "run"
        kept = check_full_disk(run, 0, "No space left on device")
        with Store(run, MANIFEST) as store:
            assert len(store.completions) == kept
            # Still full: sealing fails the same way and leaves no half table.
            with pytest.raises(UserError, match=r"cannot be written .+ free disk space"):
                store.seal(FINGERPRINTS)
        assert list(run.glob("*/.*.tmp")) == []
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        fill(run, [trace(0), completion(kept)])
        assert len(read_labels([str(run)]).completions) == kept + 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_system_without_locks_is_said_to_have_none_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    fill(tmp_path, [trace(0), completion(0)])
    assert "has no locks (Function not implemented); see to it" in capsys.readouterr().err
    assert len(read_labels([str(tmp_path)]).completions) == 1


def test_seconds_of_work_survive_kills_and_sealing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(store_module, "monotonic", lambda: now)
    for expected in (7.0, 14.0, 21.0):
        with Store(tmp_path, MANIFEST) as store:
            now += 1000  # no work before it is announced
            store.announce(3)
            now += 7
            store.add(completion(int(expected)))
            assert store.seconds == expected
            if expected == 14.0:
                store.seal(FINGERPRINTS)


def test_one_name_for_two_rollout_policies_is_refused(tmp_path: Path) -> None:
    directories = []
    for i, fingerprint in enumerate(("g", "h")):
        directories.append(str(tmp_path / str(i)))
        named = {**MANIFEST, "rollout_policies": {"base": "f", "prover": fingerprint}}
        with Store(Path(directories[i]), named) as store:
            store.add(trace(0))
            store.add(completion(0))
            store.seal(FINGERPRINTS)
    with pytest.raises(UserError) as error:
        read_labels(directories)
    assert str(error.value) == (
        f"labels {directories[1]!r} and {directories[0]!r} call two rollout policies 'prover': "
        "fingerprints h and g; make one of them again with another prover.name, or leave it out"
    )
    assert len(read_labels(directories[:1]).traces) == 1
