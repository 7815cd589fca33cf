"""``search.serve``: an OpenAI-compatible endpoint whose models are search recipes."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pav.cli.run import run
from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.grading.sandbox import DEFAULT_TIMEOUT, check_timeout
from pav.policy.policy import PolicyConfig, Sampler
from pav.tasks.base import Task
from pav.verifier.pick import Pick
from search.run.session import Scoring, load_checked, open_session, sibling_orm
from search.serve.chat import ApiError, chunks, completion, parse_chat
from search.serve.served_models import KINDS, ServedModel, ServedModels
from search.serve.service import Limits, Service, stopping

MAX_BODY = 1 << 20
# For a request to arrive whole.
RECEIVE_SECONDS = 30.0
# For searches to end after the server was told to stop; less than docker's 10 s before it kills.
GRACE_SECONDS = 5.0
API_KEY = "PAV_API_KEY"


@dataclass(frozen=True)
class ServeConfig:
    """Serve search recipes as models of an OpenAI-compatible endpoint.

    Clients need the key in the environment variable PAV_API_KEY, if it is set.

    Args:
        verifier: checkpoint that pav.train wrote, or ``pav:reference``.
        orm: verifier of the ``orm-`` recipes; by default orm.ckpt beside the verifier, if there.
        host: address to listen on; other machines can reach all but loopback, which needs a key.
        port: port to listen on; 0 takes a free one.
        max_n: largest N of a recipe.
        max_concurrent: searches at a time; one more is told to come again.
        max_prompt_tokens: longest prompt; by default what leaves room for a solution.
        timeout: seconds after which a search is given up.
        grade_timeout: seconds that a grader of your own may take for one answer, which then has no
            vote; null for no limit.
        samples: children per place and step of the beam (C).
        alpha: weight of the advantage; by default the verifier's.
        prover: head or bo<K>; by default the verifier's.
        pick: final pick of pav-beam and pav-bon; by default the verifier's.
        scoring: fused, separate or auto.
        surprise: use the calibrators with surprise.
        task: needed only where the verifier's task is not built in.
        policy: another policy than the verifier was made for (warns).
        sampler: another sampler than the verifier was made for (warns).
        trunk: new place of the trunk, if it moved.
        engine: device settings.
    """

    verifier: str = "pav:reference"
    orm: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_n: int = 64
    max_concurrent: int = 32
    max_prompt_tokens: int | None = None
    timeout: float = 300.0
    grade_timeout: float | None = DEFAULT_TIMEOUT
    samples: int = 3
    alpha: float | None = None
    prover: str | None = None
    pick: Pick | None = None
    scoring: Scoring = "auto"
    surprise: bool = True
    task: Task | None = None
    policy: PolicyConfig | None = None
    sampler: Sampler | None = None
    trunk: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        check_timeout(self.grade_timeout)
        for name in ("max_n", "max_concurrent", "timeout", "samples"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")
        if not _is_loopback(self.host) and not os.environ.get(API_KEY):
            raise UserError(
                f"host {self.host!r} can be reached from other machines; set the environment "
                f"variable {API_KEY} to a key that clients must send, or leave host at 127.0.0.1"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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


def open_models(config: ServeConfig) -> ServedModels:
    """Load verifiers, and every engine once it is clear that all fit."""
    verifier = load_checked(config.verifier, "pav")
    session = open_session(
        verifier,
        config.task,
        config.policy,
        config.sampler,
        config.engine,
        grade_timeout=config.grade_timeout,
    )
    # Answers that cannot be graded have no vote; the searches go on.
    session.grader.stops = False
    session.grade_in_thread = True
    name = config.orm
    if name is None:
        try:
            name = sibling_orm(verifier.path)
        except UserError:
            print("no ORM beside the verifier: the orm- recipes are not served")
    beside = None if name is None else load_checked(name, "orm")
    session.expect_scorer(verifier, config.scoring, config.trunk)
    if beside is not None:
        session.expect_scorer(beside, "separate", None)
    session.check_models()
    pav = session.scorer(verifier, config.scoring, config.surprise, config.trunk)
    orm = None
    if beside is not None:
        orm = session.scorer(beside, "separate", config.surprise, None)
    served_models = ServedModels(
        session, pav, orm, config.samples, config.alpha, config.prover, config.pick
    )
    served_models.warm_up()
    return served_models


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}); give another --host or --port"
        ) from error


class _Connection(HttpToolsProtocol):
    """Closes what holds a connection with half a request: a head, or a body nobody waits for.

    A body that a request waits for has its own limit (:func:`read_json`), and an answer.
    """

    limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
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


def serve(config: ServeConfig) -> None:
    """Serve (see :class:`ServeConfig`)."""
    listening = listen(config.host, config.port)
    served_models = open_models(config)
    limits = Limits(config.max_n, config.max_concurrent, config.max_prompt_tokens, config.timeout)
    service = Service(limits, served_models, os.environ.get(API_KEY, ""))
    host, port = listening.getsockname()[:2]
    at = f"[{host}]" if ":" in host else host
    first = served_models.kinds[0]
    print(
        f"serving {', '.join(f'{k}-<N>' for k in served_models.kinds)} with N up to {config.max_n}"
    )
    print(f"next: point a client of OpenAI's at http://{at}:{port}/v1, model {first}-8")
    try:
        asyncio.run(serve_until_told(service, listening))
    finally:
        served_models.session.shutdown()
    if service.failure:
        raise SystemExit(1)


def main() -> None:
    """Entry point of ``search.serve``."""
    run(serve, ServeConfig, "search.serve")


if __name__ == "__main__":
    main()
