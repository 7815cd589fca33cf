"""Searches in flight: they share one set of engines; each can be refused, given up or cancelled.

HTTP server, searches and engine share one event loop: between two of vLLM's steps the loop turns a
few times, so a request that arrives joins the batch that is running, whatever the others are at.
Only graders, which may be slow, run beside it in threads. A client that goes away, or waits too
long, has its search cancelled and its requests taken out of the batch.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import Request

from pav.core.errors import UserError
from pav.core.printable import one_line
from pav.engine.loop import Turns
from pav.tasks.base import Problem, problem_id
from search.run.records import Record
from search.serve.chat import ApiError, Chat
from search.serve.served_models import ServedModel, ServedModels, parse_model

IDLE_SECONDS = 0.001


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_n: largest N of a recipe.
        max_concurrent: searches at a time.
        max_prompt_tokens: longest prompt; None for what leaves room for a solution.
        timeout: seconds after which a search is given up.
    """

    max_n: int
    max_concurrent: int
    max_prompt_tokens: int | None
    timeout: float


@dataclass
class Service:
    """Searches in flight on one set of engines.

    Attributes:
        limits: what a request may ask for.
        served_models: what answers.
        key: API key; empty for none.
        searches: those that are running.
        work: set while there is a search.
        failure: why the engine stopped; empty while it is well.
        closed: set once searches are no longer waited for.
        receiving_now: tasks of requests whose body has not come whole.
        server: the HTTP server, once there is one.
    """

    limits: Limits
    served_models: ServedModels
    key: str = ""
    searches: set[asyncio.Task[Record]] = field(default_factory=set)
    work: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str = ""
    closed: bool = False
    receiving_now: set[asyncio.Task[Any]] = field(default_factory=set)
    server: uvicorn.Server | None = None

    def close(self) -> None:
        """Give up what still runs: each request is answered that the server stops."""
        self.closed = True
        for task in [*self.searches, *self.receiving_now]:
            task.cancel()

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """While the body of a request is waited for: :meth:`close` cancels that."""
        task = asyncio.current_task()
        assert task is not None
        self.receiving_now.add(task)
        try:
            yield
        finally:
            self.receiving_now.discard(task)

    async def pump(self) -> None:
        """Turn the engines for as long as there is work; ends only with an error."""
        turns = Turns(list(self.served_models.session.engines.values()))
        try:
            while True:
                if not self.searches:
                    self.work.clear()
                    await self.work.wait()
                if not await turns.turn():
                    await asyncio.sleep(IDLE_SECONDS)  # all wait for their graders
        except Exception as error:
            traceback.print_exc()
            self.failure = f"{type(error).__name__}: {error}"
            for search in self.searches:
                search.cancel()

    async def search(self, chat: Chat, request: Request) -> tuple[Record, int]:
        """Search as asked; (record, prompt tokens).

        Raises:
            ApiError: if it may not, cannot or did not finish in time.
        """
        recipe = self.recipe(chat.model)
        problem = Problem(problem_id(chat.question), chat.question)
        prompt = len(self.served_models.session.policy.encode(problem))
        cap = self.served_models.session.sampler.max_length
        longest = min(cap - 1, self.limits.max_prompt_tokens or cap)
        if prompt > longest:
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens; at most {longest} are taken",
                "messages",
                "context_length_exceeded",
            )
        if self.failure:
            raise ApiError(503, "the engine has stopped; restart the server")
        if self.closed:
            raise stopping()
        if len(self.searches) >= self.limits.max_concurrent:
            raise ApiError(
                429, f"{self.limits.max_concurrent} searches are running; try again", None, "busy"
            )
        length = None if chat.max_tokens is None else prompt + chat.max_tokens
        task = asyncio.ensure_future(self.served_models.run(recipe, problem, chat.seed, length))
        self.searches.add(task)
        self.work.set()
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait(
                {task, gone}, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if self.failure:
                raise ApiError(500, "the engine stopped during the search; restart the server")
            if self.closed and task.cancelled():
                raise stopping()
            if gone.done() and not task.done():
                raise ApiError(499, "the client went away")
            if not task.done():
                raise ApiError(
                    504, f"no answer within {self.limits.timeout:g} s; ask for a smaller N"
                )
            try:
                record = task.result()
            except UserError as error:
                # Of the models, not of the request.
                print(f"search of {problem.id} failed: {one_line(error)}", file=sys.stderr)
                raise ApiError(500, "the search failed; the server's log says why") from error
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
            self.searches.discard(task)
        if record.error is not None:
            print(f"search of {problem.id} failed: {one_line(record.error)}", file=sys.stderr)
            raise ApiError(500, "the search failed; the server's log says why")
        return record, prompt

    def recipe(self, name: str) -> ServedModel:
        """The recipe that ``name`` stands for.

        Raises:
            ApiError: if there is none, or its N is too large.
        """
        recipe = parse_model(name)
        if recipe is None or recipe.kind not in self.served_models.kinds:
            shown = ", ".join(f"{kind}-<N>" for kind in self.served_models.kinds)
            raise ApiError(
                404, f"no model {name[:80]!r}; there are {shown}", "model", "model_not_found"
            )
        if recipe.n > self.limits.max_n:
            raise ApiError(
                400, f"model {name!r} asks for N={recipe.n}; at most {self.limits.max_n}", "model"
            )
        return recipe

    def models(self) -> list[ServedModel]:
        """Some of the recipes: every kind at powers of two; any other N up to max_n is served."""
        powers = [2**i for i in range(self.limits.max_n.bit_length())]
        return [ServedModel(kind, n) for kind in self.served_models.kinds for n in powers]


def stopping() -> ApiError:
    """What is said to those whom a server that stops has not served."""
    return ApiError(503, "the server is stopping; ask again once it is back", None, "stopping")


async def _disconnected(request: Request) -> None:
    # The body has been read: what comes now can only be the end of the connection.
    while (await request.receive())["type"] != "http.disconnect":
        pass
