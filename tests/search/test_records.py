"""Search records: written as problems finish, read back exactly, one run to a directory."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pav.core.errors import UserError
from pav.verifier.pick import Candidate
from search.run.records import Record, append, open_run, peek, read, read_seconds, write_seconds

numbers = st.floats(allow_nan=False, allow_infinity=False)
ids = st.lists(st.integers(0, 200_000), max_size=5)
candidates = st.builds(
    Candidate,
    ids=ids,
    ends=ids,
    q=st.dictionaries(st.sampled_from(["q/base", "orm"]), st.lists(numbers, max_size=3)),
    score=numbers | st.just(-math.inf),
    finished=st.booleans(),
    truncated=st.booleans(),
    text=st.text(max_size=20),
    answer=st.none() | st.text(max_size=5),
    correct=st.booleans(),
    tokens=st.integers(0, 10**6),
)
records = st.builds(
    Record,
    problem_id=st.text(min_size=1, max_size=8),
    question=st.text(max_size=20),
    gold=st.none() | st.text(max_size=5),
    method=st.just("beam"),
    n=st.integers(1, 64),
    seed=st.integers(0, 2**32),
    settings=st.dictionaries(st.text(max_size=3), st.none() | numbers | st.text(max_size=3)),
    answer=st.none() | st.text(max_size=5),
    correct=st.booleans(),
    picked=st.none() | st.integers(0, 5),
    candidates=st.lists(candidates, max_size=3),
    steps=st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.booleans(), numbers, st.text(max_size=9)))
    ),
    error=st.none() | st.text(max_size=9),
)


def record(problem_id: str) -> Record:
    one = Candidate([4, 18, 17, 4, 2], [2, 5], {"orm": [0.1, 0.2]}, 0.3, True, False, "1\nA1", "1")
    return Record(problem_id, "1+1", "2", "beam", 2, 0, {"alpha": 0.5}, candidates=[one],
                  steps=[[(0, True, 0.25, "1"), (0, False, 0.125, "2")]])  # fmt: skip


@given(st.lists(records, max_size=4))
@settings(max_examples=50, deadline=None)
def test_records_are_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, written: list[Record]
) -> None:
    path = tmp_path_factory.mktemp("records") / "beam.jsonl"
    for one in written:
        append(path, one)
    assert read(path) == written


def test_last_line_torn_at_any_byte_is_searched_again(tmp_path: Path) -> None:
    path = tmp_path / "beam.jsonl"
    assert read(path) == []
    written = [record("a"), record("b"), record("c")]
    for one in written:
        append(path, one)
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        assert read(path) == written[:2]
        append(path, written[2])
        assert path.read_bytes() == whole


def test_run_directory_is_reopened_by_the_same_configuration_only(tmp_path: Path) -> None:
    run = {"n": 4, "verifier_digest": "abc", "policy": {"few_shot": [("q", "a")]}, "pick": None}
    with open_run(tmp_path / "new" / "run", run):
        append(tmp_path / "new" / "run" / "beam.jsonl", record("a"))
    with open_run(tmp_path / "new" / "run", dict(run)):
        pass
    other = {**run, "n": 8, "verifier_digest": "abd"}
    with pytest.raises(UserError) as error, open_run(tmp_path / "new" / "run", other):
        pass
    assert str(error.value) == (
        f"output {str(tmp_path / 'new' / 'run')!r} was made with another n, verifier_digest "
        "(n: 4 there, 8 now); restore it, or choose another output"
    )
    later = {**run, "alpha": 0.5}
    refused = pytest.raises(UserError, match=r"another alpha \(alpha: None there, 0.5 now\)")
    with refused, open_run(tmp_path / "new" / "run", later):
        pass


def test_run_without_a_record_may_be_claimed_anew(tmp_path: Path) -> None:
    with open_run(tmp_path, {"model": "ill"}):
        (tmp_path / "beam.jsonl").touch()
    with open_run(tmp_path, {"model": "mended"}):
        append(tmp_path / "beam.jsonl", record("a"))
    with pytest.raises(UserError, match="another model"), open_run(tmp_path, {"model": "ill"}):
        pass


def test_run_that_died_before_its_manifest_was_whole_is_started_again(tmp_path: Path) -> None:
    (tmp_path / ".manifest.json.tmp").write_text('{"n": ')
    for _ in range(2):
        with open_run(tmp_path, {"n": 4}):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_directory_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused = pytest.raises(UserError, match=r"not empty and no run of this command .*'thesis")
    with refused, open_run(tmp_path, {"n": 4}):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("output", ["file", "file/run", "closed/run"])
def test_unwritable_output_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0o500)
    if output.startswith("closed") and os.geteuid() == 0:
        pytest.skip("root may write into any directory")
    refused = pytest.raises(UserError, match=r"is not writable \(.+\); choose another")
    with refused as error, open_run(tmp_path / output, {"n": 4}):
        pass
    assert "\n" not in str(error.value)


def test_lines_are_json_also_where_a_candidate_was_cut_and_old_ones_are_still_read(
    tmp_path: Path,
) -> None:
    cut = replace(record("a").candidates[0], score=-math.inf, truncated=True)
    append(tmp_path / "x.jsonl", replace(record("a"), candidates=[cut]))
    line = (tmp_path / "x.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["candidates"][0]["score"] is None
    assert read(tmp_path / "x.jsonl")[0].candidates == [cut]
    body, _, _ = line.rpartition(',"crc":')
    old = body.replace('"score":null', '"score":-Infinity') + "}\n"
    (tmp_path / "x.jsonl").write_text(old)
    assert read(tmp_path / "x.jsonl")[0].candidates == [cut]
    assert (tmp_path / "x.jsonl").read_text() == old


def test_a_bit_that_flipped_is_found_said_and_searched_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    for name in ("a", "b"):
        append(path, record(name))
    # A digit for a digit: still JSON, and another result.
    path.write_bytes(path.read_bytes().replace(b'"score":0.3', b'"score":0.9', 1))
    assert [r.problem_id for r in read(path)] == ["b"]
    assert f"1 lines of {path} are damaged" in capsys.readouterr().err
    assert [r.problem_id for r in read(path)] == ["b"]
    assert capsys.readouterr().err == ""


def test_any_bit_that_flips_costs_its_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for name in ("a", "b"):
        append(path, record(name))
    line, other = path.read_bytes().splitlines(keepends=True)
    for bit in range(8 * len(line)):
        flipped = bytearray(line)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped) + other)
        # Without its end it is one with the line behind it.
        lost = not flipped.endswith(b"\n")
        assert [r.problem_id for r in peek(path)] == ([] if lost else ["b"])


def test_damaged_line_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for name in ("a", "b", "c"):
        append(path, record(name))
    lines = path.read_bytes().splitlines(keepends=True)
    deep = b"[" * 20_000 + b"\n"
    for damaged in (lines[1][:40] + b"\n", b"\xff\xfe\n", deep):
        path.write_bytes(lines[0] + damaged + lines[2])
        assert [r.problem_id for r in peek(path)] == ["a", "c"]
        assert [r.problem_id for r in read(path)] == ["a", "c"]
        assert path.read_bytes() == lines[0] + lines[2]
    path.write_bytes(lines[0] + b"[]\n")
    with pytest.raises(UserError, match=r"x.jsonl', line 2, is no record of a search"):
        read(path)


def test_seconds_that_are_not_known_are_written_as_json(tmp_path: Path) -> None:
    write_seconds(tmp_path / "x.jsonl", 3, math.nan)
    text = (tmp_path / "x.seconds.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"records": 3, "seconds": None}
    assert math.isnan(read_seconds(tmp_path / "x.jsonl", 3))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "it holds a list, not an object"),
        (b'{"a": "\xff"}', "it is not UTF-8 (invalid start byte at byte 7)"),
        (b'{"a":' * 20_000, "it is nested too deeply"),
        (b'{"a": 1', "Expecting ',' delimiter: line 1 column 8 (char 7)"),
    ],
)
def test_damaged_manifest_of_a_run_is_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError) as refused, open_run(tmp_path, {"a": 1}):
        pass
    path = str(tmp_path / "manifest.json")
    assert str(refused.value) == (
        f"{path!r} cannot be read: {reason}; restore it, or choose another output"
    )
