"""A reward behind HTTP, for the reward `remote` of another machine; docs/rewards.md has the protocol."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ablate.source import InputError, dotted
from runners.connections import bounded_server
from runners.digest import DIGITS, digest
from runners.prompts import Prompt
from runners.rewards.png import from_base64
from runners.rewards.protocol import Images, Reward, RewardOutput
from runners.rewards.remote import MAX_IDENTITY
from runners.scoring import score

TOKEN = "ABLATE_REWARD_TOKEN"
MAX_PROBLEM = 500  # characters of what is wrong with a request


class ScoreRequest(BaseModel):
    """Images, each an 8-bit RGB PNG in base64, all of one size, and the prompt of each."""

    images: list[str]
    prompts: list[Prompt]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes: of a request the bytes of its headers and its body, images, pixels of all images, and the
    seconds until each of headers and body is there; connections at once.
    """

    header_bytes: int = 2**14
    request_bytes: int = 2**27
    images: int = 256
    pixels: int = 2**26
    seconds: float = 60.0
    connections: int = 32


@dataclass(kw_only=True)
class RewardServer:
    """Answers GET /identity and POST /score; one request is scored at a time, the others wait."""

    reward: Reward
    token: str | None = None
    limits: Limits = Limits()
    busy: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    def __post_init__(self) -> None:
        self.identity = bounded(f"{self.reward.identity} {self.reward.fingerprint()}".strip())

    @property
    def application(self) -> Starlette:
        """For any server that speaks ASGI."""
        routes = [Route("/identity", self.identify), Route("/score", self.score, methods=["POST"])]
        return Starlette(routes=routes, exception_handlers={HTTPException: _refusal})

    def configured(self, log_level: str = "warning") -> uvicorn.Config:
        """The application behind connections with their limits."""
        return bounded_server(
            self.application,
            connections=self.limits.connections,
            header_bytes=self.limits.header_bytes,
            header_seconds=self.limits.seconds,
            log_level=log_level,
        )

    async def identify(self, request: Request) -> Response:
        self._check_token(request)
        return JSONResponse({"identity": self.identity})

    async def score(self, request: Request) -> Response:
        self._check_token(request)
        try:
            asked = ScoreRequest.model_validate_json(await self._body(request))
        except ValidationError as error:
            raise HTTPException(422, _explained(error)) from None
        async with self.busy:
            if await request.is_disconnected():  # has not waited: nobody wants these scores
                return Response(status_code=408)
            return JSONResponse(await run_in_threadpool(self._scored, asked))

    def _scored(self, asked: ScoreRequest) -> dict[str, Any]:
        images = self._images(asked)
        return {"identity": self.identity, **_as_json(score(self.reward, images, asked.prompts))}

    def _images(self, asked: ScoreRequest) -> Images:
        number = len(asked.images)
        if not 0 < number <= self.limits.images:
            raise HTTPException(413, f"got {number} images, expected 1 to {self.limits.images}")
        if len(asked.prompts) != number:
            raise HTTPException(422, f"got {len(asked.prompts)} prompts for {number} images")
        images: list[NDArray[np.uint8]] = []
        for i, text in enumerate(asked.images):
            try:
                images.append(from_base64(text, self.limits.pixels // number))
            except ValueError as error:
                raise HTTPException(422, f"image {i} {error}") from None
            if images[i].shape != images[0].shape:
                raise HTTPException(422, f"image {i} is {images[i].shape[:2]}, and image 0 {images[0].shape[:2]}")
        return np.stack(images)

    async def _body(self, request: Request) -> bytes:
        whole, most = bytearray(), self.limits.request_bytes
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for part in request.stream():
                    whole += part
                    if len(whole) > most:
                        raise HTTPException(413, f"expected a request of {most} bytes at most")
        except TimeoutError:
            raise HTTPException(408, f"the request was not there within {self.limits.seconds:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the request has ended early") from None
        return bytes(whole)

    def _check_token(self, request: Request) -> None:
        if self.token is None:
            return
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise HTTPException(401, "expected the header Authorization: Bearer, with this server's token")


def serve(
    reward: Reward, *, host: str, port: int, token: str | None, device: str, announce: Callable[[str], None]
) -> None:
    """Serve a reward until a signal asks to stop; what is being scored is answered first.

    Raises InputError for an address that cannot be used, or that is not this machine's alone without a token;
    RewardUnavailable where the reward cannot score.
    """
    if token is None and not _is_loopback(host):
        raise InputError(f"--host {host}: others can reach it, so set {TOKEN} to a token that they must send")
    with _listening(host, port) as listening:
        reward.load(device)
        reward.self_check()
        server = RewardServer(reward=reward, token=token)
        shown, bound = f"[{host}]" if ":" in host else host, listening.getsockname()[1]
        announce(f"http://{shown}:{bound} has the reward {server.identity}; stop it with Ctrl-C")
        uvicorn.Server(server.configured()).run(sockets=[listening])


def bounded(identity: str) -> str:
    """An identity as the protocol takes it: what is too long ends with the digest of the whole."""
    if len(identity) <= MAX_IDENTITY:
        return identity
    return f"{identity[: MAX_IDENTITY - DIGITS - 4]}... {digest(identity)}"


def _explained(error: ValidationError) -> str:
    """The first problem of a request, where it is and what was expected."""
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{dotted(problem['loc']) or 'request'}: {problem['msg'].removeprefix('Value error, ')}"[:MAX_PROBLEM]


def token_of_environment() -> str | None:
    """The token that clients must send, where there is one."""
    return os.environ.get(TOKEN, "").strip() or None


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there: {error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _as_json(output: RewardOutput) -> dict[str, Any]:
    """Scores and parts, null where they are missing, as JSON has no NaN."""

    def numbers(values: NDArray[np.float64]) -> list[float | None]:
        return [value if math.isfinite(value) else None for value in values.astype(float).tolist()]

    return {
        "scores": numbers(output.score),
        "parts": {name: numbers(values) for name, values in output.parts.items()},
        "reasons": list(output.reasons),
    }


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code)
