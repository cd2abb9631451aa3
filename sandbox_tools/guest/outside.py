"""The inside of the way out: a port that programs take for their HTTP proxy, and that leads through the tunnel.

Whether anything is let out, and where to, the engine decides at the other end; a port that leads nowhere does no harm.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sandbox_tools.guest.transport import Relay, StreamTransport, break_off

if TYPE_CHECKING:
    from sandbox_tools.guest.mux import Mux

PORT = 49982

_PROXY = f"http://127.0.0.1:{PORT}"
_DIRECT = "localhost,127.0.0.1,::1"

VARIABLES = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), _PROXY),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), _DIRECT),
    "NODE_USE_ENV_PROXY": "1",
}
"""What tells programs of it: curl, git, pip, apt, requests, httpx, Deno and most others read these."""


async def listen(mux: Mux) -> asyncio.Server:
    """Take connections for the engine from now on.

    Raises:
        OSError: The port is taken.
    """
    return await asyncio.get_running_loop().create_server(lambda: _Inside(mux), "127.0.0.1", PORT)


class _Inside(Relay):
    """One connection of a program in here."""

    def __init__(self, mux: Mux) -> None:
        super().__init__()
        self._mux = mux

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self._mux.closed.done():
            break_off(transport)
            return
        outer = StreamTransport(self._mux.open(PORT), Relay(transport))
        self.peer = outer
        outer.start()
