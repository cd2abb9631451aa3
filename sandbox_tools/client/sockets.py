"""The sockets that one request opened, so that a cancellation in the middle of it leaves none of them open."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any

import httpx


class Sockets:
    """Told of by httpcore, which forgets a connection where it is cancelled while it takes one of its locks.

    In 1.0 that is one which it has just made, or whose answer it is closing.
    """

    def __init__(self) -> None:
        self._opened: list[Any] = []

    @property
    def extensions(self) -> dict[str, Any]:
        """What the request has to carry."""
        return {"trace": self._trace}

    def belong_to(self, response: httpx.Response) -> None:
        """Counts the one that brings an answer too, which may have been opened by an earlier request."""
        self._opened.append(response.extensions.get("network_stream"))

    def forget(self) -> None:
        """Leaves them to httpcore: the request has come to its end."""
        self._opened.clear()

    async def aclose(self) -> None:
        """Closes them; safe to call twice."""
        for socket in filter(None, self._opened):
            with suppress(Exception):
                await completed(socket.aclose())

    async def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "connect_unix_socket.complete", "start_tls.complete")):
            self._opened.append(info["return_value"])


async def whole(http: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
    """Sends a request and reads all of its answer; raises as httpx does, and leaves no connection half used."""
    sockets = Sockets()
    request.extensions |= sockets.extensions
    try:
        response = await http.send(request, stream=True)
        sockets.belong_to(response)
        try:
            await response.aread()
        finally:
            await close(response)
        sockets.forget()
        return response
    finally:
        await sockets.aclose()


async def close(response: httpx.Response) -> None:
    """Closes a streamed answer and its connection, also when the caller is cancelled while it does."""
    if response.is_closed:
        return  # It was read to its end, which closes it.

    await completed(response.aclose())  # httpx takes locks first, where a cancellation would leave both open


async def completed(work: Coroutine[Any, Any, None]) -> None:
    """Awaits what must come to its end, and only then lets a cancellation of the caller through."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()
