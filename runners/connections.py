"""HTTP connections that a client cannot keep busy with headers that never end; uvicorn's wait for them for ever."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol


def bounded_server(
    application: Starlette, *, connections: int, header_bytes: int, header_seconds: float, log_level: str = "warning"
) -> uvicorn.Config:
    """An application behind so many connections at once, past which a request is answered 503.

    A connection is closed where the headers of its next request are larger, or not there in time.
    """

    class Bounded(_Punctual):
        seconds = header_seconds

    return uvicorn.Config(
        application,
        http=Bounded,
        h11_max_incomplete_event_size=header_bytes,
        limit_concurrency=connections + 1,  # uvicorn refuses the one that makes it so many
        log_level=log_level,
        server_header=False,
    )


class _Punctual(H11Protocol):
    """A connection that is closed `seconds` after its beginning, or its last answer, unless a request is there."""

    seconds: ClassVar[float]
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._waiting is not None:
            self._waiting.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def _wait(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = self.loop.call_later(self.seconds, self._close_unless_at_work)

    def _close_unless_at_work(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
