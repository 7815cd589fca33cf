"""The endpoint: the stock client works, searches share an engine, errors are those of OpenAI."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.vllm import VllmEngine
from pav.policy.policy import Sampler
from pav.tasks.base import Grade, Problem, problem_id
from pav.tasks.tape import Tape
from search.run.records import Record
from search.serve.chat import ApiError, parse_chat
from search.serve.command import ServeConfig, listen, open_models
from search.serve.http import MAX_BODY, serve_until_told
from search.serve.served_models import ServedModel, ServedModels, parse_model
from search.serve.service import Limits, Service

REPOSITORY = Path(__file__).parents[2]
ENGINE = EngineConfig(kv_gib=0.05, max_num_seqs=64)
SAMPLER = Sampler(max_length=120)
LIMITS = Limits(max_n=64, max_concurrent=16, max_prompt_tokens=None, timeout=120.0)
QUESTION = "12+23*4-15+6"
# Long enough to be in flight when the test looks: 64 places, 192 children a step.
LONG = "pav-beam-64"


@pytest.fixture(scope="module")
def verifier(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path_factory: pytest.TempPathFactory
) -> str:
    path = tmp_path_factory.mktemp("serve") / "pav.ckpt"
    make_verifier(tiny_model("llama"), path, sampler=SAMPLER)
    make_verifier(tiny_model("llama"), path.with_name("orm.ckpt"), heads=("orm",), sampler=SAMPLER)
    return str(path)


@pytest.fixture(scope="module")
def served_models(verifier: str) -> Iterator[ServedModels]:
    made = open_models(ServeConfig(verifier, engine=ENGINE))
    yield made
    made.session.shutdown()


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The address of a server that runs in a thread."""
    listening = listen("127.0.0.1", 0)
    stop = threading.Event()

    async def loop() -> None:
        task = asyncio.ensure_future(serve_until_told(service, listening))
        while not task.done() and not stop.is_set():
            await asyncio.sleep(0.02)
        service.server.should_exit = True  # type: ignore[union-attr]
        await task

    thread = threading.Thread(target=asyncio.run, args=(loop(),))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(served_models: ServedModels) -> Iterator[tuple[str, Service]]:
    service = Service(LIMITS, served_models)
    with serving(service) as address:
        yield address, service


@pytest.fixture(scope="module")
def client(served: tuple[str, Service]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: openai.OpenAI, model: str, question: str = QUESTION, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=model, messages=messages, **options)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came about")


def expected(
    served_models: ServedModels, recipe: ServedModel, question: str, seed: int = 0
) -> Record:
    """What the recipe gives without a server."""
    found: list[Record] = []
    problem = Problem(problem_id(question), question)
    # drive() waits for engines alone.
    served_models = replace(
        served_models, session=replace(served_models.session, grade_in_thread=False)
    )
    job = partial(served_models.run, recipe, problem, seed)
    drive(list(served_models.session.engines.values()), [job], found.append, 1)
    return found[0]


# -- the stock client ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(served_models: ServedModels) -> dict[str, Record]:
    """Answers of recipes that were cooked before any server ran (asked for before ``served``)."""
    names = ("pav-beam-4", "pav-bon-8", "pav-vote-4", "orm-bon-4", "orm-vote-4", "majority-4")
    return {
        n: expected(served_models, parse_model(n) or ServedModel("", 0), QUESTION) for n in names
    }


@pytest.mark.parametrize(
    "model", ["pav-beam-4", "pav-bon-8", "pav-vote-4", "orm-bon-4", "orm-vote-4", "majority-4"]
)
def test_stock_client_gets_the_recipes_own_answer_whole_and_streamed(
    alone: dict[str, Record], client: openai.OpenAI, model: str
) -> None:
    record = alone[model]
    assert record.error is None and record.picked is not None
    answer = ask(client, model)
    (choice,) = answer.choices
    assert choice.message.content == record.candidates[record.picked].text
    assert choice.finish_reason == "stop" and choice.message.role == "assistant"
    assert answer.model == model and answer.object == "chat.completion"
    assert answer.usage.completion_tokens == record.policy_tokens
    assert answer.usage.prompt_tokens == 2 + len(QUESTION)
    shown = len(record.candidates[record.picked].ids)
    assert answer.usage.completion_tokens_details.reasoning_tokens == record.policy_tokens - shown
    assert answer.model_extra["search"]["answer"] == record.answer
    stream = list(ask(client, model, stream=True, stream_options={"include_usage": True}))
    *parts, last = stream
    assert "".join(p.choices[0].delta.content or "" for p in parts) == choice.message.content
    assert [p.choices[0].finish_reason for p in parts][-1] == "stop"
    assert last.choices == [] and last.usage.completion_tokens == record.policy_tokens
    assert len({p.id for p in stream}) == 1


def test_models_are_listed_and_any_n_up_to_the_limit_is_served(client: openai.OpenAI) -> None:
    names = {m.id for m in client.models.list()}
    assert {"pav-beam-1", "pav-beam-64", "pav-bon-8", "orm-bon-4", "majority-32"} <= names
    assert client.models.retrieve("pav-beam-3").id == "pav-beam-3"
    assert ask(client, "pav-beam-3").choices[0].message.content
    for wrong in ("gpt-4", "pav-beam-0", "pav-beam", "pav-beam-0x10", "../pav-beam-2"):
        with pytest.raises(openai.NotFoundError, match="no model"):
            ask(client, wrong)
    with pytest.raises(openai.BadRequestError, match="asks for N=65; at most 64"):
        ask(client, "pav-beam-65")


def test_same_seed_gives_the_same_answer_and_another_seed_another(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        return str(ask(client, "majority-1", seed=seed).choices[0].message.content)

    found = [text(seed) for seed in range(6)]
    assert [text(seed) for seed in range(6)] == found
    assert len(set(found)) > 1


def test_max_tokens_caps_every_solution(client: openai.OpenAI) -> None:
    answer = ask(client, "majority-4", max_tokens=3)
    assert answer.usage.completion_tokens <= 4 * 3
    cut = ask(client, "majority-2", max_tokens=1)
    assert cut.choices[0].finish_reason == "length" and cut.choices[0].message.content == ""


# -- one engine, many searches ---------------------------------------------------------------------


def test_concurrent_searches_share_the_engine_and_answer_as_alone(
    client: openai.OpenAI, served: tuple[str, Service]
) -> None:
    questions = [f"{10 + i}+23*4-15" for i in range(8)]
    alone = [ask(client, "pav-beam-2", q).choices[0].message.content for q in questions]
    together = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal together
        while not stop.is_set():
            together = max(together, len(served[1].searches))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda q: ask(client, "pav-beam-2", q), questions))
    stop.set()
    watcher.join()
    assert together >= 4
    # vLLM is not batch-invariant: now and then a completion differs between batches.
    same = [a.choices[0].message.content == b for a, b in zip(found, alone, strict=True)]
    assert sum(same) >= 6


def test_slow_grader_holds_up_nobody_else(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    grade, question = Tape.grade, "11+22-3"
    begun, go_on = threading.Event(), threading.Event()

    def slow(self: Tape, text: str, problem: Problem) -> Grade:
        if problem.question == question:
            begun.set()
            go_on.wait(30)
        return grade(self, text, problem)

    monkeypatch.setattr(Tape, "grade", slow)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, client, "majority-1", question)
        assert begun.wait(30)
        assert ask(client, "pav-beam-2").choices
        assert not waiting.done()
        go_on.set()
        assert waiting.result().choices


def test_client_that_goes_away_has_its_search_cancelled(served: tuple[str, Service]) -> None:
    address, service = served
    body = {"model": LONG, "messages": [{"role": "user", "content": QUESTION}]}
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as raw:
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        until(lambda: len(service.searches) == 1)
        engines = service.served_models.session.engines.values()
        until(lambda: any(engine.busy for engine in engines))
        (search,) = service.searches
        assert not search.done()
    until(lambda: not service.searches)
    assert search.cancelled()
    assert not any(engine.busy for engine in engines)
    # vLLM has none of its requests left, either.
    assert not any(engine._engine.has_unfinished_requests() for engine in engines)


def half_sent(address: str, sent: bytes = b'{"model"') -> socket.socket:
    """A connection on which a request's head has gone out, and a part of its body."""
    raw = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=30)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    raw.sendall(head + b"Content-Type: application/json\r\n\r\n" + sent)
    return raw


def test_clients_that_go_away_while_sending_leave_no_trace(
    served: tuple[str, Service], capfd: pytest.CaptureFixture[str]
) -> None:
    address, service = served
    for i in range(20):
        raw = half_sent(address, b'{"model"' * (i % 2))
        until(lambda: len(service.receiving_now) == 1)
        if i % 3 == 0:  # a reset instead of an end
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()
        until(lambda: not service.receiving_now)
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "searches": 0}
    assert capfd.readouterr() == ("", "")


def test_half_a_request_is_held_for_a_limited_time(
    served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.serve.http.RECEIVE_SECONDS", 0.3)
    with half_sent(served[0]) as raw:
        # All of the answer, and then the end of the connection.
        answer = b"".join(iter(lambda: raw.recv(4096), b"")).decode()
    assert answer.startswith("HTTP/1.1 408 ") and "did not come whole within 0.3 s" in answer
    port = int(served[0].rpartition(":")[2])
    refused = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    for sent in (b"", b"POST /v1/chat/comp", refused):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
            raw.sendall(sent)
            answer = b"".join(iter(lambda: raw.recv(4096), b"")).decode()
        assert answer.startswith("HTTP/1.1 404 ") if sent is refused else not answer


def test_searches_in_flight_when_the_server_is_told_to_stop_are_answered(
    served_models: ServedModels, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    grade, slow = Tape.grade, "11+22-3"
    waiting, go_on = threading.Event(), threading.Event()

    def graded(self: Tape, text: str, problem: Problem) -> Grade:
        if problem.question == slow:
            waiting.set()
            go_on.wait(30)
        return grade(self, text, problem)

    monkeypatch.setattr(Tape, "grade", graded)
    monkeypatch.setattr("search.serve.http.GRACE_SECONDS", 1.0)
    service = Service(LIMITS, served_models)
    with serving(service) as address, ThreadPoolExecutor(2) as pool:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=60)
        endless = pool.submit(ask, client, "majority-1", slow)
        assert waiting.wait(30)
        held = half_sent(address)
        short = pool.submit(ask, client, "pav-beam-2")
        until(lambda: len(service.searches) == 2 and len(service.receiving_now) == 1)
        assert service.server is not None
        service.server.should_exit = True  # what SIGTERM sets
        assert short.result().choices[0].message.content
        with pytest.raises(openai.InternalServerError, match="the server is stopping") as raised:
            endless.result()
        assert raised.value.status_code == 503 and raised.value.code == "stopping"
        assert held.recv(4096).startswith(b"HTTP/1.1 503 ")
        held.close()
        go_on.set()
    assert "Traceback" not in capfd.readouterr().err


def test_search_that_takes_too_long_is_given_up(
    served: tuple[str, Service], client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, service = served
    monkeypatch.setattr(service, "limits", replace(LIMITS, timeout=0.05))
    with pytest.raises(openai.APIStatusError, match=r"no answer within 0.05 s") as raised:
        ask(client, LONG)
    assert raised.value.status_code == 504
    assert not service.searches
    assert not any(e.busy for e in service.served_models.session.engines.values())


def test_one_search_too_many_is_told_to_come_again(
    served: tuple[str, Service], client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, service = served
    monkeypatch.setattr(service, "limits", replace(LIMITS, max_concurrent=1))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, LONG)
        until(lambda: len(service.searches) == 1)
        with pytest.raises(openai.RateLimitError, match="1 searches are running") as raised:
            ask(client, "majority-1")
        assert raised.value.response.headers["retry-after"] == "1"
        assert httpx.get(f"{served[0]}/health").json() == {"status": "ok", "searches": 1}
        assert first.result().choices


def test_failed_search_is_an_error_and_the_next_one_works(
    served: tuple[str, Service], client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("a grader's secret")

    monkeypatch.setattr("search.run.solve.graded", fail)
    with pytest.raises(openai.InternalServerError, match="the search failed") as raised:
        ask(client, "majority-2")
    assert "secret" not in str(raised.value)
    monkeypatch.undo()
    assert ask(client, "majority-2").choices


# -- what is refused -------------------------------------------------------------------------------


def test_score_that_is_not_finite_is_an_error_in_json_and_the_log_names_the_head(
    served_models: ServedModels, capfd: pytest.CaptureFixture[str]
) -> None:
    verifier = served_models.pav.verifier
    damaged = replace(verifier, bias=verifier.bias * float("nan"))
    broken = replace(served_models, pav=replace(served_models.pav, verifier=damaged))
    with serving(Service(LIMITS, broken)) as address:
        body = {"model": "pav-beam-2", "messages": [{"role": "user", "content": QUESTION}]}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 500
    error = json.loads(answer.text, parse_constant=pytest.fail)["error"]
    assert error["message"] == "the search failed; the server's log says why"
    said = capfd.readouterr().err
    assert "failed: head q/base gives nan and Q nan after 0 tokens" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; this verifier was made for 1.0"),
        ({"top_p": 0.5}, "top_p is 0.5"),
        ({"n": 2}, "n is not supported"),
        ({"stop": ["x"]}, "stop is not supported"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"seed": "x"}, "seed must be int, not str"),
        ({"extra_body": {"best_of": 3}}, "best_of is not supported"),
        ({"messages": []}, "messages must hold one user message"),
        ({"messages": [{"role": "system", "content": "x"}]}, "only 'user' is known"),
        (
            {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "1"}]},
            "messages must hold one user message",
        ),
        ({"messages": [{"role": "system", "content": ""}]}, "messages must hold one user message"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
            "tools is not supported",
        ),
        ({"tool_choice": "required"}, "tool_choice is not supported"),
        ({"top_logprobs": 2}, "top_logprobs is not supported"),
        ({"extra_body": {"top_k": 5}}, "top_k is 5; this verifier was made for 0"),
        ({"messages": [{"role": "user", "content": " "}]}, "content must be text"),
        ({"messages": [{"role": "user", "content": "1"}] * 2}, "messages must hold one"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text"),
        ({"model": ""}, "model is missing"),
    ],
)
def test_what_a_search_cannot_honour_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], reason: str
) -> None:
    plain: dict[str, Any] = {
        "messages": [{"role": "user", "content": QUESTION}],
        "model": "majority-1",
    }
    with pytest.raises(openai.BadRequestError, match=reason) as raised:
        client.chat.completions.create(**(plain | options))
    error: Any = raised.value.body
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_accepted(client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "12+"}, {"type": "text", "text": "3"}]
    empty: Any = [{"role": "system", "content": c} for c in ("", " \n", [], None)]
    empty.append({"role": "developer", "content": [{"type": "text", "text": ""}]})
    answer = client.chat.completions.create(
        model="majority-1", messages=[*empty, {"role": "user", "content": parts}], temperature=1.0,
        top_p=1, n=1, frequency_penalty=0, presence_penalty=0, logprobs=False, top_logprobs=0,
        logit_bias={}, stop=[], tools=[], tool_choice="none", parallel_tool_calls=False,
        functions=[], function_call="none", response_format={"type": "text"}, modalities=["text"],
        stream=False, store=False, seed=None, max_tokens=None, user="me", metadata={},
        reasoning_effort="none",
        extra_body={"top_k": 0, "repetition_penalty": 1.0, "min_p": 0, "best_of": 1, "echo": False},
    )  # fmt: skip
    assert answer.choices


def test_prompt_that_is_too_long_is_refused(
    served: tuple[str, Service], client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 119 are taken") as raised:
        ask(client, "majority-1", "1+" * 80 + "1")
    assert raised.value.code == "context_length_exceeded"
    monkeypatch.setattr(served[1], "limits", replace(LIMITS, max_prompt_tokens=10))
    with pytest.raises(openai.BadRequestError, match="at most 10 are taken"):
        ask(client, "majority-1")


def test_bodies_that_are_no_requests_are_refused_in_openais_shape(
    served: tuple[str, Service],
) -> None:
    url = f"{served[0]}/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    body = b'{"model": "majority-1", "messages": [{"role": "user", "content": "1+?"}]}'
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"content": b"{", "headers": json_type}, 400, "not JSON"),
        ({"content": b"[" * 100_000, "headers": json_type}, 400, "not JSON"),
        ({"content": b"[1]", "headers": json_type}, 400, "JSON object"),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "application/json"),
        ({"content": b" " * (MAX_BODY + 1), "headers": json_type}, 413, "larger"),
        # Half a character, as JSON spells it and as raw bytes.
        ({"content": body.replace(b"?", b"\\ud83d"), "headers": json_type}, 400, "U+D83D"),
        ({"content": body.replace(b"?", b"\xed\xa0\xbd"), "headers": json_type}, 400, "U+D83D"),
        ({"content": b'{"model": "x\\udc00"}', "headers": json_type}, 400, "model holds the lone"),
    ]
    for request, status, reason in cases:
        answer = httpx.post(url, **request)
        assert (answer.status_code, reason in answer.json()["error"]["message"]) == (status, True)
    for answer in (httpx.get(url), httpx.get(f"{served[0]}/nowhere")):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_nothing_but_what_is_understood_is_parsed() -> None:
    for body in (None, 1, [], "x"):
        with pytest.raises(ApiError, match="JSON object"):
            parse_chat(body, SAMPLER)
    for name in ("pav-beam-", "pav-beam--1", "pav-beam-1 ", "pav-beam-٣", "x-1", "pav-beam-1e3"):
        assert parse_model(name) is None
    assert parse_model("pav-beam-16") == ServedModel("pav-beam", 16)


# -- keys, addresses, ends -------------------------------------------------------------------------


def test_key_is_asked_for_where_one_is_set(served_models: ServedModels) -> None:
    with serving(Service(LIMITS, served_models, key="s3cret")) as address:
        for key in ("wrong", "s3cret2", "s\u00e9cret"):
            headers = {"authorization": f"Bearer {key}".encode()}
            answer = httpx.get(f"{address}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for bare in ("s3cret", "Basic s3cret", "Bearer", "Bearers3cret"):
            answer = httpx.get(f"{address}/v1/models", headers={"authorization": bare})
            assert answer.status_code == 401 and "Bearer <key>" in answer.text
            assert answer.headers["www-authenticate"] == "Bearer"
        # The scheme's name has no case.
        lower = httpx.get(f"{address}/v1/models", headers={"authorization": "bearer s3cret"})
        assert lower.status_code == 200
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.post(f"{address}/v1/chat/completions", json={}).status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
        right = openai.OpenAI(base_url=f"{address}/v1", api_key="s3cret", max_retries=0)
        assert right.models.list().data


def test_only_loopback_is_served_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAV_API_KEY", raising=False)
    assert ServeConfig().host == "127.0.0.1"
    assert ServeConfig(host="::1").host == "::1"
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(UserError, match="PAV_API_KEY"):
            ServeConfig(host=host)
    monkeypatch.setenv("PAV_API_KEY", "s3cret")
    assert ServeConfig(host="0.0.0.0")


def test_taken_port_is_one_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port)


def test_engine_that_breaks_ends_the_server_and_its_searches(
    served_models: ServedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: VllmEngine) -> None:
        raise RuntimeError("out of memory")

    service = Service(LIMITS, served_models)
    with serving(service) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=60)
        with monkeypatch.context() as patch:
            patch.setattr(VllmEngine, "step", breaks)
            with pytest.raises(openai.InternalServerError, match="engine stopped"):
                ask(client, "majority-1")
        until(lambda: service.server is not None and service.server.should_exit)
    assert service.failure == "RuntimeError: out of memory" and not service.searches


def test_command_serves_until_it_is_told_to_stop(verifier: str) -> None:
    command = [sys.executable, "-m", "search.serve", "--verifier", verifier, "--port", "0",
               "--engine.kv_gib", "0.02", "--engine.max_num_seqs", "16"]  # fmt: skip
    environment = {**os.environ, "PAV_API_KEY": "s3cret"}
    # As a script's "&" starts it: SIGINT is ignored until the server listens to it.
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        lines = iter(process.stdout.readline, "")
        address = next(line for line in lines if "http://" in line).split()[-3].rstrip(",")
        client = openai.OpenAI(base_url=address, api_key="s3cret", max_retries=3, timeout=60)
        assert ask(client, "pav-beam-2").choices[0].message.content
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()
