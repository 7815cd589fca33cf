"""``search.serve``: an OpenAI-compatible endpoint whose models are search recipes."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from dataclasses import dataclass, field

from pav.cli.run import run
from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.grading.sandbox import DEFAULT_TIMEOUT, check_timeout
from pav.policy.policy import PolicyConfig, Sampler
from pav.tasks.base import Task
from pav.verifier.pick import Pick
from search.run.opening import load_checked, open_session, sibling_orm
from search.run.session import Scoring
from search.serve.served_models import ServedModels

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


def serve(config: ServeConfig) -> None:
    """Serve (see :class:`ServeConfig`)."""
    # Not at the top: they bring FastAPI and uvicorn, and --help stays fast.
    from search.serve.http import serve_until_told
    from search.serve.service import Limits, Service

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
