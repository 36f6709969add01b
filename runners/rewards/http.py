"""What rewards behind HTTP share: requests, retried and bounded in time and in size, whatever a server does."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

import httpx2

from runners.rewards.protocol import Reward, RewardUnavailable

MAX_ANSWER = 2**22  # bytes; the scores of hundreds of images are a few thousand
SHOWN = 200  # characters of what a server says
AGAIN = {408, 425, 429, 500, 502, 503, 504}  # statuses that may pass
CLOSED = {301, 302, 303, 307, 308, 401, 403, 404, 405}  # statuses that stay, whatever is asked
IN_A_ROW = 2  # requests that fail in spite of all retries, after which the server is given up

Body = Callable[[], Any]  # makes the JSON of a request when it is sent, so that not all images are in memory as text


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request has no answer; `unreachable` where the server does not answer at all, or nobody."""

    reason: str
    unreachable: bool = False


class _Again(Exception):
    """A failure that may pass, and after how many seconds the server says so."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(kw_only=True)
class HttpReward(Reward):
    """Fields of all: `timeout` seconds for a request from its first to its last byte, tried again up to `retries` times
    after pauses of `backoff` seconds that double; `max_seconds` for all requests of one call, which should be less than
    `scoring.timeout`; `concurrency` requests at once. `token_env` names the environment variable with a bearer token.
    """

    remote: ClassVar[bool] = True
    remedy: ClassVar[str] = "start the server, then run the same command again"
    url: str
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 0.5
    max_seconds: float = 500.0
    concurrency: int = 4
    token_env: str | None = None

    @property
    def patience(self) -> float | None:  # type: ignore[override]
        return self.max_seconds

    def __post_init__(self) -> None:
        self.url = _checked_url(self.url)
        for name in ("timeout", "backoff", "max_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: got {getattr(self, name):g}, expected more than 0 seconds")
        for name, least in (("retries", 0), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if self.token_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.token_env):
            raise ValueError("token_env: expected the name of an environment variable, and never the token itself")

    def ask(self, path: str, bodies: Sequence[Body | None]) -> list[Any]:
        """The answers to requests, in order, as read from JSON; a `Failure` for each that has none.

        A request without a body is a GET. Raises RewardUnavailable where the server answers none of them.
        """
        token = self._token()
        answers = asyncio.run(_Exchange(self, path, token).ask(bodies))
        failures = [answer for answer in answers if isinstance(answer, Failure)]
        if failures and len(failures) == len(answers) and all(failure.unreachable for failure in failures):
            raise RewardUnavailable(f"{failures[0].reason}; {self.remedy}")
        return answers

    def ask_once(self, path: str) -> Any:
        """The answer to a GET. Raises RewardUnavailable where there is none."""
        (answer,) = self.ask(path, [None])
        if isinstance(answer, Failure):
            raise RewardUnavailable(f"{answer.reason}; {self.remedy}")
        return answer

    def _token(self) -> str | None:
        if self.token_env is None:
            return None
        token = os.environ.get(self.token_env, "").strip()
        if not token:
            raise RewardUnavailable(f"{self.url}: set the environment variable {self.token_env} to the server's token")
        if not (token.isascii() and token.isprintable()):
            raise RewardUnavailable(f"{self.url}: the environment variable {self.token_env} holds no token")
        return token


class _Exchange:
    """The requests of one call."""

    def __init__(self, reward: HttpReward, path: str, token: str | None) -> None:
        self.reward, self.url, self.token = reward, f"{reward.url}{path}", token
        self.failed = 0  # requests in a row
        self.deadline = 0.0

    async def ask(self, bodies: Sequence[Body | None]) -> list[Any]:
        self.deadline = _now() + self.reward.max_seconds
        gate = asyncio.Semaphore(self.reward.concurrency)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        # time limits are those below, which hold for a whole request; no proxies and passwords of the environment
        async with httpx2.AsyncClient(headers=headers, timeout=None, trust_env=False) as client:
            return await asyncio.gather(*(self._answer(client, gate, body) for body in bodies))

    async def _answer(self, client: httpx2.AsyncClient, gate: asyncio.Semaphore, body: Body | None) -> Any:
        async with gate:
            if self.failed >= IN_A_ROW:
                return self._failure("given up after other requests had failed", unreachable=True)
            content = None if body is None else await asyncio.to_thread(lambda: json.dumps(body()).encode())
            answer = await self._retried(client, content)
            self.failed = self.failed + 1 if isinstance(answer, Failure) and answer.unreachable else 0
            return answer

    async def _retried(self, client: httpx2.AsyncClient, content: bytes | None) -> Any:
        reward, pause = self.reward, self.reward.backoff
        reason, tried = f"no time left of {reward.max_seconds:g} s for all requests", 0
        while (left := self.deadline - _now()) > 0:
            after = 0.0
            tried += 1
            try:
                async with asyncio.timeout(min(reward.timeout, left)):
                    return await self._once(client, content)
            except TimeoutError:
                reason = f"no whole answer within {min(reward.timeout, left):.3g} s"
            except _Again as again:
                reason, after = str(again), again.after
            except (httpx2.HTTPError, OSError) as error:
                reason = f"{type(error).__name__}: {error}"
            wait = max(pause, after)
            if tried > reward.retries or _now() + wait >= self.deadline:
                break
            await asyncio.sleep(wait)
            pause *= 2
        return self._failure(f"{reason} ({tried} tried)", unreachable=True)

    async def _once(self, client: httpx2.AsyncClient, content: bytes | None) -> Any:
        """The answer, or a Failure that stays. Raises _Again where it may pass."""
        method, sent = ("GET", {}) if content is None else ("POST", {"Content-Type": "application/json"})
        async with client.stream(method, self.url, content=content, headers=sent) as response:
            status, whole = response.status_code, bytearray()
            async for part in response.aiter_raw():
                whole += part
                if len(whole) > MAX_ANSWER:
                    break
            after = response.headers.get("Retry-After", "")
        if status == 200 and len(whole) > MAX_ANSWER:
            return self._failure(f"an answer of more than {MAX_ANSWER} bytes")
        if status == 200:
            try:
                return self._without_token(json.loads(whole))
            except (ValueError, RecursionError):
                return self._failure(f"an answer that is no JSON: {self._shown(whole)}")
        reason = f"status {status}: {self._shown(whole)}"
        if status in AGAIN:
            raise _Again(reason, float(after) if re.fullmatch(r"\d{1,4}", after) else 0.0)
        return self._failure(reason, unreachable=status in CLOSED)

    def _failure(self, reason: str, *, unreachable: bool = False) -> Failure:
        """A failure whose reason does not hold the token, as that of an illegal header would."""
        return Failure(reason=f"{self.url}: {self._without_token(reason)}", unreachable=unreachable)

    def _without_token(self, said: Any) -> Any:
        """What a server says, in JSON or in words, without the token: it may repeat it, and records must not."""
        if self.token is None:
            return said
        if isinstance(said, str):
            return said.replace(self.token, "***")
        if isinstance(said, list):
            return [self._without_token(value) for value in said]
        if isinstance(said, dict):
            return {self._without_token(key): self._without_token(value) for key, value in said.items()}
        return said

    def _shown(self, content: bytes | bytearray) -> str:
        """The beginning of what a server said, on one line; escapes of JSON, in which the token may hide, undone."""
        start = bytes(content[: 8 * SHOWN + len(self.token or "")]).decode(errors="replace")
        plain = re.sub(
            r"\\(?:u([0-9a-fA-F]{4})|(.))", lambda found: chr(int(found[1], 16)) if found[1] else found[2], start
        )
        text = " ".join(self._without_token(plain).split())
        return "".join(c if c.isprintable() else "?" for c in text[:SHOWN]) or "nothing"


def _checked_url(url: str) -> str:
    """Without a slash at its end. Raises ValueError for what is no http address, or has secrets in it."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"url: got {url!r}, expected an address such as http://127.0.0.1:8400")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("url: expected no password, query or fragment; name a variable with a token as token_env")
    return url.rstrip("/")


def _now() -> float:
    return asyncio.get_running_loop().time()
