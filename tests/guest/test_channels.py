"""The guest's end of a kernel's socket: what comes is there for who asks, and costs nothing until then."""

from __future__ import annotations

import asyncio
import json
import select
from pathlib import Path

import zmq
from zmq.constants import SocketType

from sandbox_tools.guest.channels import DELIMITER, Channel


async def test_news_that_nobody_waits_for_leaves_the_loop_in_peace_and_is_there_later(tmp_path: Path) -> None:
    """ZeroMQ's descriptor stays readable until somebody looks at the socket: a loop that only watches it spins."""
    address = f"ipc://{tmp_path}/shell"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as kernel:
        kernel.bind(address)
        channel = Channel(SocketType.DEALER, address, b"")
        try:
            request = channel.send("execute_request", {})
            identity = (await asyncio.to_thread(kernel.recv_multipart))[0]
            parts = ({"msg_type": "execute_reply", "date": ""}, {"msg_id": request}, {}, {"status": "ok"})
            kernel.send_multipart([identity, DELIMITER, b"", *(json.dumps(part).encode() for part in parts)])

            await asyncio.sleep(0.2)
            assert select.select([channel._socket.fileno()], [], [], 0)[0] == []
            message = await channel.receive(30)
        finally:
            channel.close()

    assert message is not None
    assert (message.kind, message.parent, message.content) == ("execute_reply", request, {"status": "ok"})
