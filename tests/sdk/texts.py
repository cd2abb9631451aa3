"""What the users of all SDKs run in their sandboxes, and how they look at what comes of it."""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

METADATA = {"made by": "a user & friends=/é", "of": uuid.uuid4().hex}
"""Of one scenario alone, and with all that the encodings of a query could get wrong."""

PLOT = """
import matplotlib.pyplot as plt
figure, axes = plt.subplots()
axes.bar(["Q1", "Q2"], [3, 5])
axes.set_title("Sales")
plt.show()
"""

KINDS = """
import json, pandas
from IPython.display import HTML, SVG, JSON, Javascript, Latex, Markdown, display
display(HTML("<b>bold</b>"), Markdown("**bold**"), Latex("$x$"), JSON({"a": 1}), Javascript("1"))
display(SVG("<svg xmlns='http://www.w3.org/2000/svg'/>"))
pandas.DataFrame({"a": [1, 2]})
"""

READY_THEN_GO = """
import os, sys, time
print("ready", flush=True)
print("warned", file=sys.stderr, flush=True)
give_up = time.monotonic() + 20
while not os.path.exists("{path}") and time.monotonic() < give_up:
    time.sleep(0.05)
os.path.exists("{path}") and "done"
"""

ENDLESS = """
import time
print("started", flush=True)
while True:
    time.sleep(0.1)
"""

SERVER = (
    """mkdir -p site && echo 'served from inside' > site/page.html && cd site && exec python3 -m http.server 8000"""
)

# Holds a number in its memory only, and tells it again when asked.
WITNESS = """
number=$RANDOM$RANDOM; echo $number > /tmp/witness-number
until [ -e /tmp/witness-asked ]; do sleep 0.05; done
echo $number > /tmp/witness-answer
exec sleep 1000
"""

NUMBER = 4171

SHARED = {"METADATA": METADATA, "PLOT": PLOT, "KINDS": KINDS, "READY_THEN_GO": READY_THEN_GO}
SHARED |= {"SERVER": SERVER, "WITNESS": WITNESS, "NUMBER": NUMBER, "ENDLESS": ENDLESS}
"""The same for the users of JavaScript."""

WAIT = 30.0
"""Seconds that something which needs no more than one is waited for."""


def until(happens: Callable[[], Any]) -> Any:
    """What the call gives once that is something."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if value := happens():
            return value
        time.sleep(0.05)
    msg = f"Did not happen within {WAIT:.0f} s: {inspect.getsource(happens).strip()}"
    raise AssertionError(msg)


async def auntil(happens: Callable[[], Awaitable[Any]]) -> Any:
    """The same for a call to be awaited."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if value := await happens():
            return value
        await asyncio.sleep(0.05)
    msg = f"Did not happen within {WAIT:.0f} s: {inspect.getsource(happens).strip()}"
    raise AssertionError(msg)


def web() -> httpx.Client:
    """A client that is nobody's SDK; it trusts the engine's authority by `SSL_CERT_FILE`."""
    return httpx.Client(timeout=WAIT)


class Screen:
    """What a terminal has shown, read from the handle of a blocking SDK."""

    def __init__(self, terminal: Any) -> None:
        self._chunks = iter(terminal)
        self._seen = b""

    def shows(self, text: bytes) -> None:
        """Read on until the text is there."""
        while text not in self._seen:
            self._seen += next(self._chunks)[2] or b""


class AsyncScreen:
    """What a terminal has shown, told to `on_data` by an async SDK."""

    def __init__(self) -> None:
        self._seen = b""
        self._more = asyncio.Event()

    def on_data(self, data: bytes) -> None:
        """Take what comes."""
        self._seen += data
        self._more.set()

    async def shows(self, text: bytes) -> None:
        """Wait until the text is there."""
        while text not in self._seen:
            self._more.clear()
            await self._more.wait()
