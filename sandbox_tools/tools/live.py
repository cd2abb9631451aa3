"""Output as it comes, and signs of life of what says nothing; what runs never waits for whoever listens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from sandbox_tools.tools.render import capped
from sandbox_tools.tools.tool import Emit

BACKLOG = 256
"""Pieces of live output that may wait for a slow listener; more are dropped, the result has them all the same."""

SLOW = 5.0
"""Seconds a result waits for the listener to take what is left."""

SILENCE = 10.0
"""Seconds without output after which a sign of life is sent, and again after as many."""

log = logging.getLogger("sandbox_tools.tools")

Say = Callable[[str, str], None]
"""Takes a stream's name and a piece of its text, without waiting."""


@contextlib.asynccontextmanager
async def live(emit: Emit) -> AsyncIterator[Say]:
    """Hands on what is said, in order; after `SILENCE` seconds of nothing it says how long it has been."""
    waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue(BACKLOG)
    begun = asyncio.get_running_loop().time()

    def say(stream: str, text: str) -> None:
        if not waiting.full():
            waiting.put_nowait({"stream": stream, "text": capped(text)})

    async def hand_on() -> None:
        while True:
            try:
                async with asyncio.timeout(SILENCE):
                    piece = await waiting.get()
            except TimeoutError:
                seconds = asyncio.get_running_loop().time() - begun
                say("progress", f"running for {seconds:.0f} s")
                continue
            try:
                await emit(piece)
            except Exception:
                log.warning("a listener of live output failed", exc_info=True)
            finally:
                waiting.task_done()

    handing = asyncio.create_task(hand_on())
    try:
        yield say
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SLOW):
                await waiting.join()
    finally:
        handing.cancel()
        await asyncio.wait([handing])
