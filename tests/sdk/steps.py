"""A scenario's steps: each a promise of the engine, taken in order, its outcome told in one line of JSON.

Runs in an SDK's own environment: the standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

PATIENCE = 120.0
"""Seconds after which a step that hangs is given up, and the rest of the scenario with it."""

Step = Callable[[Any], Any]


class AbsentError(Exception):
    """Raised by a step whose SDK has no such call; says which."""


class Steps:
    """The steps of a scenario; each takes the world that those before it left."""

    def __init__(self, *steps: Step) -> None:
        self.all = list(steps)

    def __call__(self, step: Step) -> Step:
        """Add one."""
        self.all.append(step)
        return step

    def names(self) -> list[str]:
        """The promises."""
        return [step.__name__ for step in self.all]

    def take(self, world: Any) -> None:
        """Take all, whatever those before came to; without a sandbox none can be taken."""
        for step in self.all:
            with _told(step.__name__):
                step(world)
            if not hasattr(world, "sandbox"):
                return

    async def atake(self, world: Any) -> None:
        """The same for coroutines."""
        for step in self.all:
            with _told(step.__name__):
                await step(world)
            if not hasattr(world, "sandbox"):
                return


def refused(kind: type[BaseException], call: Callable[[], Any]) -> Any:
    """The exception of that kind that the call ends with."""
    try:
        value = call()
    except kind as error:
        return error
    raise _not_refused(kind, value)


async def arefused(kind: type[BaseException], call: Awaitable[Any]) -> Any:
    """The same for a call to be awaited."""
    try:
        value = await call
    except kind as error:
        return error
    raise _not_refused(kind, value)


def _not_refused(kind: type[BaseException], value: object) -> AssertionError:
    return AssertionError(f"{kind.__name__} was due, and it gave {value!r}")


@contextlib.contextmanager
def _told(promise: str) -> Iterator[None]:
    started = time.monotonic()

    def tell(outcome: str, words: str) -> None:
        seconds = round(time.monotonic() - started, 2)
        line = {"promise": promise, "outcome": outcome, "words": words, "seconds": seconds}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    def give_up() -> None:
        faulthandler.dump_traceback(file=sys.stderr)
        tell("failed", f"hung for {PATIENCE:.0f} s; stderr says where")
        os._exit(1)

    watchdog = threading.Timer(PATIENCE, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    except AbsentError as absent:
        tell("absent", str(absent))
    except (Exception, asyncio.CancelledError):
        tell("failed", traceback.format_exc())
    else:
        tell("kept", "")
    finally:
        watchdog.cancel()
