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
        ConfigError: Called on that very loop, where waiting would be for ever.
    """
    home = sessions.claim(portal_loop())
    if home is _running():
        msg = "A synchronous call would block the event loop that its `Sessions` run on. Use `ainvoke`."
        raise ConfigError(msg)
    future = _submit(home, work)
    try:
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
    """Have the work done there, in the order of posting, and do not wait."""
    home = sessions.claim(_running() or portal_loop())
    if home is _running():
        sessions.spawn(work())
    elif not home.is_closed():
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
