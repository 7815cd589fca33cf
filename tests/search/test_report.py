"""The report: trees are put together right, strangers' text stays text, nothing leaves the page."""

from __future__ import annotations

import asyncio
import json
import random
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.steps import StepRule
from pav.policy.inference import Sampled
from pav.policy.policy import Policy, PolicyConfig, Sampler, load_policy
from pav.verifier.pick import Candidate
from search.compare.results import PICKS
from search.methods.alphallm import alphallm_search
from search.methods.beam import BeamSettings, beam_search
from search.methods.context import SearchContext
from search.methods.dvts import dvts_search
from search.methods.expand import SearchResult
from search.methods.smc import SmcSettings, particle_filter
from search.report.command import ReportConfig, report, write_report
from search.report.data import BYTES_PER_SEARCH, report_data
from search.report.tree import ROOT, last_steps, path_to, tree
from search.run.records import Node, Record, append, peek
from tests.search.scripted import EOS, PROBLEM, Scripted

patient = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def policy(tiny_model: Callable[..., Path]) -> Policy:
    return load_policy(PolicyConfig(str(tiny_model("llama"))), StepRule())


# -- trees -----------------------------------------------------------------------------------------


class Chances(dict[str, tuple[float, float]]):
    """Values of any text, coarse enough that many of them are equal."""

    def get(self, text: str, default: Any = None) -> tuple[float, float]:
        drawn = random.Random(text)
        return round(drawn.random(), 1), round(drawn.random(), 1)


@dataclass
class Wandering(Scripted):
    """Draws one of a few steps, or the end, by the request's seed."""

    async def sample(
        self, ids: Sequence[int], sampler: Sampler, *, stop_ids: Sequence[int], max_tokens: int,
        seed: int, scores: bool,
    ) -> Sampled:  # fmt: skip
        before = self.policy.text(ids).removeprefix("1+1\n")
        text = random.Random(seed).choice(["1\n", "2\n", "37\n", "A1$", "A2$"])
        self.drawn.append((before, text.rstrip("\n$")))
        whole = self._ids(text.removesuffix("$")) + ([EOS] if text.endswith("$") else [])
        return Sampled(whole[:max_tokens], whole[:max_tokens][-1] in stop_ids)


def searched(
    method: str, n: int, samples: int, seed: int, policy: Policy
) -> tuple[Record, Wandering]:
    wandering = Wandering(policy, {}, Chances())
    engine: Any = wandering
    # Long enough for a few rounds; what wanders on is cut.
    context = SearchContext(PROBLEM, engine, policy, Sampler(max_length=24), seed)
    ranked = BeamSettings(n, samples, 0.5, "q/prover", "q/base")
    searches: dict[str, Any] = {
        "beam": lambda: beam_search(context, ranked, engine),
        "dvts": lambda: dvts_search(context, ranked, engine),
        "alphallm": lambda: alphallm_search(context, ranked, 0.25, engine),
        "smc": lambda: particle_filter(context, SmcSettings(n, "q/base"), engine),
    }
    found: SearchResult = asyncio.run(searches[method]())
    candidates = [replace(c, text=policy.text(c.ids)) for c in found.candidates]
    record = Record("p", "1+1", "2", method, n, seed, {}, candidates=candidates,
                    steps=found.steps, nodes=found.nodes)  # fmt: skip
    return record, wandering


@patient
@given(st.sampled_from(["beam", "dvts", "alphallm", "smc"]), st.integers(1, 5), st.integers(1, 3),
       st.integers(0, 10**6))  # fmt: skip
def test_tree_of_any_search_is_put_together_again(
    policy: Policy, method: str, n: int, samples: int, seed: int
) -> None:
    record, wandering = searched(method, n, samples, seed, policy)
    steps = tree(record)
    assert len(steps) == sum(map(len, record.steps))
    drawn = set(wandering.drawn)
    for i, one in enumerate(steps):
        path = path_to(steps, i)
        before = "".join(f"{steps[j].text}\n" for j in path[:-1])
        # Pruned or kept, a step was drawn after the very steps that are shown before it.
        assert (before, one.text) in drawn
        assert all(steps[j].places and not steps[j].finished for j in path[:-1])
    ends = last_steps(record, steps)
    for candidate, end in zip(record.candidates, ends, strict=True):
        assert end is not None and steps[end].places and steps[end].finished
        path = path_to(steps, end)
        assert "\n".join(steps[j].text for j in path) == candidate.text
        for head, values in candidate.q.items():
            assert [steps[j].q[head] for j in path] == pytest.approx(values[1:])
    # Subtrees that end alike are still two.
    assert method == "smc" or len(set(ends)) == len(ends)


def test_step_whose_parent_is_nowhere_is_an_error_that_names_the_problem() -> None:
    steps = [[(0, True, 0.0, "a")], [(1, True, 0.0, "b")]]
    nodes = [[Node([0], False, {})], [Node([0], True, {})]]
    record = Record("p7", "", None, "beam", 1, 0, {}, steps=steps, nodes=nodes)
    with pytest.raises(UserError, match=r"problem 'p7' .* round 1 continues place 1") as error:
        tree(record)
    assert "\n" not in str(error.value)


def test_records_without_nodes_are_shown_as_a_list(tmp_path: Path) -> None:
    append(tmp_path / "beam.jsonl", replace(hand_made(), nodes=[]))
    (problem,) = report_data(tmp_path)["searches"][0]["problems"]
    assert problem["steps"] == []
    assert [c["text"] for c in problem["candidates"]] == ["1\n2\nA2", "1\nA1"]


# -- what a page holds -----------------------------------------------------------------------------


def hand_made(problem_id: str = "p", **changes: Any) -> Record:
    """A beam of two: of three first steps two are kept, one of them ends at once."""

    def candidate(text: str, q: list[float], answer: str) -> Candidate:
        ends = list(range(1, len(q)))
        return Candidate([], ends, {"q/base": q}, q[-1], True, False, text, answer, answer == "2")

    record = Record(
        problem_id, "1+1", "2", "beam", 2, 3,
        {"alpha": 0.5, "prover": "bo2", "base_head": "q/base", "pick": "last"},
        answer="2", correct=True, picked=0,
        candidates=[candidate("1\n2\nA2", [0.5, 0.6, 0.7, 0.8], "2"),
                    candidate("1\nA1", [0.5, 0.6, 0.4], "1")],
        policy_tokens=17,
        steps=[[(0, True, 0.6, "1"), (0, False, 0.1, "3")],
               [(0, True, 0.7, "2"), (0, True, 0.4, "A1")], [(0, True, 0.8, "A2")]],
        nodes=[[Node([0], False, {"q/base": 0.6}), Node([], False, {"q/base": 0.1})],
               [Node([0], False, {"q/base": 0.7}), Node([1], True, {"q/base": 0.4})],
               [Node([0], True, {"q/base": 0.8})]],
    )  # fmt: skip
    return replace(record, **changes)


def test_a_page_holds_steps_values_and_the_pick(tmp_path: Path) -> None:
    append(tmp_path / "beam.jsonl", hand_made())
    data = report_data(tmp_path)
    (search,), (view,) = data["searches"], data["views"]
    assert (view["method"], view["n"], view["seed"], view["pick"]) == ("beam", 2, 3, "last")
    assert view["picked"] == [0]
    # Best-of-2 of the base ranks the steps and is no head: 1 - (1 - Q)^2.
    assert [c["name"] for c in search["columns"]] == ["q/base", "bo2"]
    (problem,) = search["problems"]
    assert problem["root"] == [0.5, 0.75]
    assert problem["steps"] == [
        [ROOT, 1, False, 0.6, "1", [0.6, 0.84]],
        [ROOT, 0, False, 0.1, "3", [0.1, 0.19]],
        [0, 1, False, 0.7, "2", [0.7, 0.91]],
        [0, 1, True, 0.4, "A1", [0.4, 0.64]],
        [2, 1, True, 0.8, "A2", [0.8, 0.96]],
    ]
    assert [c["step"] for c in problem["candidates"]] == [4, 3]
    (row,) = data["results"]
    assert (row["accuracy [95%]"], row["policy tokens"]) == ("1.000 [1.000, 1.000]", "17")


def test_comparison_shows_each_methods_own_pick_from_shared_records(tmp_path: Path) -> None:
    for seed in (3, 4):
        for problem_id in ("a", "b"):
            append(tmp_path / f"s{seed}.jsonl", hand_made(problem_id, seed=seed))
    files = ["s3.jsonl", "s4.jsonl"]
    picks = {
        "problems": ["b", "a"],
        "seeds": [3, 4],
        "points": [
            {"method": "first", "n": 1, "pick": "last", "files": files, "picked": [[0, 0], [0, 0]]},
            {"method": "second", "n": 2, "pick": "min", "files": files,
             "picked": [[1, -1], [0, 1]]},
        ],
    }  # fmt: skip
    (tmp_path / PICKS).write_text(json.dumps(picks))
    data = report_data(tmp_path, problems=1)
    assert [(v["method"], v["seed"], v["picked"]) for v in data["views"]] == [
        ("first", 3, [0]), ("second", 3, [1])
    ]  # fmt: skip
    # Both look at one search, which is held once.
    assert [s["file"] for s in data["searches"]] == ["s3.jsonl"]
    assert data["leftOut"] == "1 of 2 problems are held here; seed 3 of 3, 4."
    other = report_data(tmp_path, problems=["a"], seeds=[4])
    assert [v["picked"] for v in other["views"]] == [[0], [1]]
    assert other["searches"][0]["problems"][0]["id"] == "a"
    with pytest.raises(UserError, match=r"problems names 'c', .* it has b, a$"):
        report_data(tmp_path, problems=["c"])
    with pytest.raises(UserError, match=r"seeds is \[5\]; .* has 3, 4"):
        report_data(tmp_path, seeds=[5])


def test_large_search_holds_fewer_problems_and_the_page_says_so(tmp_path: Path) -> None:
    for i in range(4):
        append(tmp_path / "beam.jsonl", hand_made(str(i), question="x" * (BYTES_PER_SEARCH // 2)))
    data = report_data(tmp_path)
    assert [p["id"] for p in data["searches"][0]["problems"]] == ["0"]
    assert data["views"][0]["picked"] == [0]
    assert "fewer of the largest searches (beam.jsonl)" in data["leftOut"]


# -- strangers' text -------------------------------------------------------------------------------

HOSTILE = (
    "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
    "<!--\u2028\u2029{{SCRIPT}} &amp; \ud800 \u202e ]]> http://example.com/"
)


class Page(HTMLParser):
    """Elements, their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open = tag
        if tag in self.raw:
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open in self.raw:
            self.raw[self.open][-1] += data


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run whose every text is hostile."""
    steps = [[(0, True, 0.125, HOSTILE)]]
    wild = Candidate([], [1], {HOSTILE: [0.5, 0.6]}, 0.0, True, False, HOSTILE, HOSTILE, False)
    record = hand_made(
        HOSTILE, question=HOSTILE, gold=HOSTILE, candidates=[wild], error=HOSTILE, steps=steps,
        nodes=[[Node([0], True, {HOSTILE: 0.6})]], settings={HOSTILE: HOSTILE, "pick": HOSTILE},
    )  # fmt: skip
    folder = tmp_path / "<b onclick=x>"
    folder.mkdir()
    path = folder / "<img src=x onerror=y>.jsonl"
    append(path, record)
    # As earlier versions could write it.
    path.write_text(path.read_text().rpartition(',"crc"')[0].replace("0.125", "NaN") + "}\n")
    (folder / "compare.png").write_bytes(b"\x89PNG")
    return folder


def test_hostile_text_is_data_and_never_markup(hostile: Path) -> None:
    page = Page(write_report(hostile).read_text(encoding="utf-8"))
    data, script = page.raw["script"]
    held = json.loads(data)
    assert held["title"] == "<b onclick=x>"
    (problem,) = held["searches"][0]["problems"]
    assert problem["question"] == problem["gold"] == problem["error"] == HOSTILE
    assert problem["steps"] == [[-1, 1, True, None, HOSTILE, [0.6]]]
    assert problem["candidates"][0]["answer"] == HOSTILE
    assert held["views"][0]["method"] == "<img src=x onerror=y>"
    assert data.isascii() and not set(data) & set("<>&")
    # The script shows data as text: it has no way to make markup or code of it.
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(", script
    )


def test_page_refers_to_nothing_outside_and_its_policy_allows_its_own_script_alone(
    hostile: Path,
) -> None:
    text = write_report(hostile).read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "audio", "video"}
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        for name in {"src", "href", "srcset", "action", "data"} & attributes.keys():
            assert re.match(r"#|data:image/png;base64,", attributes[name] or "")
    assert not re.search(r"url\(|@import|image-set", "".join(page.raw["style"]))
    assert not re.search(r"fetch|XMLHttp|WebSocket|import\(|sendBeacon", page.raw["script"][1])
    (policy,) = (a["content"] for t, a in page.elements if "http-equiv" in a)

    def hashed(part: str) -> str:
        return f"'sha256-{b64encode(sha256(part.encode()).digest()).decode()}'"

    assert policy == (
        f"default-src 'none'; img-src data:; style-src {hashed(page.raw['style'][0])}; "
        f"script-src {hashed(page.raw['script'][1])}; base-uri 'none'; form-action 'none'"
    )


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["missing", "empty", "other"])
def test_directory_without_records_is_one_line(
    tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if broken != "missing":
        (tmp_path / broken).mkdir()
    if broken == "other":
        (tmp_path / broken / "data.jsonl").write_text('{"question": "1+1"}\n')
    with pytest.raises(SystemExit) as stop:
        run(report, ReportConfig, "search.report", ["--run", str(tmp_path / broken)])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1 and "name the output of a search command" in said


def test_command_takes_a_count_or_ids_and_leaves_a_running_search_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "beam.jsonl"
    for i in range(3):
        append(path, hand_made(str(i)))
    # A line that another process has not finished.
    path.write_bytes(path.read_bytes() + b'{"problem_id": ')
    before = path.read_bytes()

    def held(*args: str) -> list[str]:
        run(report, ReportConfig, "search.report", ["--run", str(tmp_path), *args])
        assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"
        data = json.loads(Page((tmp_path / "report.html").read_text()).raw["script"][0])
        return [p["id"] for p in data["searches"][0]["problems"]]

    assert held() == ["0", "1", "2"]
    assert held("--problems", "2") == ["0", "1"]
    assert held("--problems", '["2","1"]') == ["2", "1"]
    assert path.read_bytes() == before and len(peek(path)) == 3
