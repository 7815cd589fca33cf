"""The HTTP side of ``search.serve``: routes, and limits on what a connection may take."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import signal
import socket
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pav.core.errors import UserError
from search.serve.chat import ApiError, chunks, completion, parse_chat
from search.serve.served_models import KINDS, ServedModel
from search.serve.service import Service, stopping

MAX_BODY = 1 << 20
# For a request to arrive whole.
RECEIVE_SECONDS = 30.0
# For searches to end after the server was told to stop; less than docker's 10 s before it kills.
GRACE_SECONDS = 5.0


async def read_json(request: Request) -> Any:
    """The body as JSON.

    Raises:
        ApiError: if it is something else, too large, or does not come whole in time.
    """
    # A web page can make a browser send a form to loopback, but not this type.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the request as content type application/json")
    body = b""
    try:
        async with asyncio.timeout(RECEIVE_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise ApiError(413, f"the request is larger than {MAX_BODY} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not come whole within {RECEIVE_SECONDS:g} s") from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None
    except asyncio.CancelledError:
        # Only a server that stops does that.
        raise stopping() from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON") from error


def make_app(service: Service) -> FastAPI:
    """The HTTP side of a service."""

    async def authorise(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), service.key.encode())
        if service.key and not (right and scheme.lower() == "bearer"):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer <key>'",
                None,
                "invalid_api_key",
            )

    app = FastAPI(title="search.serve", docs_url=None, redoc_url=None, openapi_url=None)
    keyed = [Depends(authorise)]

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        headers = {
            401: {"WWW-Authenticate": "Bearer"},
            408: {"Connection": "close"},
            429: {"Retry-After": "1"},
        }.get(error.status)
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        made = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(made.body, made.status, error.headers)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse(ApiError(400, str(error)).body, 400)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        # The server's log has the traceback.
        return JSONResponse(ApiError(500, f"internal error ({type(error).__name__})").body, 500)

    @app.get("/health")
    async def health() -> JSONResponse:
        well = {"status": service.failure or "ok", "searches": len(service.searches)}
        return JSONResponse(well, 503 if service.failure else 200)

    def described(recipe: ServedModel) -> dict[str, Any]:
        what = KINDS[recipe.kind].replace("N", str(recipe.n), 1)
        return {"id": recipe.name, "object": "model", "created": 0, "owned_by": "pav-engine",
                "description": what}  # fmt: skip

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [described(r) for r in service.models()]})

    @app.get("/v1/models/{name}", dependencies=keyed)
    async def model(name: str) -> JSONResponse:
        return JSONResponse(described(service.recipe(name)))

    @app.post("/v1/chat/completions", dependencies=keyed)
    async def chat_completions(request: Request) -> Response:
        with service.receiving():
            body = await read_json(request)
        chat = parse_chat(body, service.served_models.session.sampler)
        record, prompt = await service.search(chat, request)
        if not chat.stream:
            return JSONResponse(completion(chat, record, prompt))

        async def events() -> AsyncIterator[str]:
            for chunk in chunks(chat, record, prompt):
                yield f"data: {json.dumps(chunk, allow_nan=False)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


class _Connection(HttpToolsProtocol):
    """Closes what holds a connection with half a request: a head, or a body nobody waits for.

    A body that a request waits for has its own limit (:func:`read_json`), and an answer.
    """

    limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._limit()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._limit()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._unlimit()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unlimit()
        super().connection_lost(exc)

    def _limit(self) -> None:
        self._unlimit()
        self.limit = self.loop.call_later(RECEIVE_SECONDS, self._late)

    def _unlimit(self) -> None:
        if self.limit is not None:
            self.limit.cancel()

    def _late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self._limit()


class _Server(uvicorn.Server):
    """Remembers SIGINT, and answers every search before it ends.

    uvicorn raises SIGINT again at its end, but for the handler from before: where the process was
    started with it ignored, as a shell script's ``&`` does, that is nobody.
    """

    interrupted = False

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Before uvicorn loses patience, which closes connections without an answer.
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self.service.close)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)


async def serve_until_told(service: Service, listening: socket.socket) -> None:
    """Serve until SIGINT, SIGTERM, ``should_exit`` of ``service.server``, or the engine's end.

    Raises:
        KeyboardInterrupt: after SIGINT.
    """
    service.server = server = _Server(
        uvicorn.Config(
            make_app(service), log_level="warning", access_log=False, lifespan="off",
            http=_Connection, timeout_graceful_shutdown=math.ceil(GRACE_SECONDS + 2),
        ),
        service,
    )  # fmt: skip
    pump = asyncio.ensure_future(service.pump())
    pump.add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        await server.serve(sockets=[listening])
    finally:
        pump.cancel()
    if server.interrupted:
        raise KeyboardInterrupt
