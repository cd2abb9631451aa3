"""Connections to a sandbox's ports that are kept, after a whole answer, for another request.

A fresh one costs more under gVisor than everything else about a small request. A kept one is only used where asking
twice does no harm: its server may close it in the very moment in which the next request is on its way.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from sandbox_tools.guest.mux import Stream

KEPT = 0.5
"""Seconds that one is kept. A server that serves one connection at a time lets its other callers inside wait for so
long; callers from outside use the kept one, or end it."""

MOST = 8
"""How many are kept to one port."""

LINGER = 5.0
"""Seconds a server has to close a connection that it was asked to close, before it is broken off."""


class Kept:
    """Those of one sandbox."""

    def __init__(self) -> None:
        self._streams: dict[int, dict[Stream, asyncio.TimerHandle]] = {}
        self._parted: WeakSet[Stream] = WeakSet()

    def __contains__(self, stream: Stream) -> bool:
        """Whether nobody uses it: it is kept, or was ended in good order."""
        return stream in self._parted or stream in self._streams.get(stream.port, ())

    def take(self, port: int) -> Stream | None:
        """The one that was used last, if it still stands as far as is known here."""
        streams = self._streams.get(port)
        while streams:
            stream, timer = streams.popitem()
            timer.cancel()
            if not stream.readable:
                return stream
            self.end(stream)
        return None

    def keep(self, stream: Stream) -> None:
        """Keep one that has brought a whole answer; or end it, if its server has ended it or says more than that."""
        streams = self._streams.setdefault(stream.port, {})
        if stream.readable or len(streams) == MOST:
            self.end(stream)
        else:
            streams[stream] = asyncio.get_running_loop().call_later(KEPT, self._expire, stream)

    def part(self, port: int) -> None:
        """End all to a port."""
        while (stream := self.take(port)) is not None:
            self.end(stream)

    def end(self, stream: Stream) -> None:
        """End one in good order: nothing more is asked, and its server may say its last word."""
        self._parted.add(stream)
        stream.write_eof()
        if not stream.got_eof:
            asyncio.get_running_loop().call_later(LINGER, stream.close, "it was not closed from inside")

    def _expire(self, stream: Stream) -> None:
        del self._streams[stream.port][stream]
        self.end(stream)
