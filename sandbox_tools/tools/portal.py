"""The one door for synchronous callers: brings a call to the event loop that its `Sessions` belong to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from sandbox_tools.errors import ConfigError
from sandbox_tools.session.sessions import Sessions

T = TypeVar("T")

Work = Callable[[], Coroutine[Any, Any, T]]

STUCK = 30.0
"""Seconds without a sign of life after which a loop counts as blocked, as one that a notebook's `invoke` sits on."""

_starting = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def portal_loop() -> asyncio.AbstractEventLoop:
    """The loop of the process's portal thread, started on first use; the thread ends with the process."""
    global _loop
    with _starting:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="sandbox-portal", daemon=True).start()
        return _loop


def run(sessions: Sessions, work: Work[T]) -> T:
    """Do the work on the loop of `sessions`, the portal's if they have none yet, and wait for its outcome.

    Raises:
        ConfigError: That loop is this thread's own, or blocked: waiting for it would be for ever.
    """
    home = sessions.loop or sessions.claim(portal_loop())
    future = _submit(home, work)
    awake = threading.Event()
    home.call_soon_threadsafe(awake.set)
    try:
        if home is _running() or not awake.wait(STUCK):
            msg = "A synchronous call would wait for the event loop that waits for it. Use `ainvoke`."
            raise ConfigError(msg)
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def arun(sessions: Sessions, work: Work[T]) -> T:
    """Do the work on the loop of `sessions`, which becomes this one if they have none yet."""
    here = asyncio.get_running_loop()
    home = sessions.claim(here)
    return await (work() if home is here else asyncio.wrap_future(_submit(home, work)))


def post(sessions: Sessions, work: Work[Any]) -> None:
    """Have the work done there in the order of posting, without waiting; not at all if they have no loop yet."""
    home = sessions.loop
    if home is None or home.is_closed():
        return
    if home is _running():
        sessions.spawn(work())
    else:
        home.call_soon_threadsafe(lambda: sessions.spawn(work()))


def _submit(home: asyncio.AbstractEventLoop, work: Work[T]) -> Future[T]:
    if home.is_closed():
        msg = "The event loop that these `Sessions` ran on has ended. Make one `Sessions` per `asyncio.run`."
        raise ConfigError(msg)
    return asyncio.run_coroutine_threadsafe(work(), home)


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
