"""The guest's process: both services in one loop, and the near end of the tunnel to the engine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from sandbox_tools.guest import envd, interpreter, reboot, warm
from sandbox_tools.guest.accounts import account as account_of
from sandbox_tools.guest.contexts import Contexts
from sandbox_tools.guest.kernels import Launch
from sandbox_tools.guest.processes import Processes
from sandbox_tools.guest.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Receive, Scope, Send

ENVD_PORT = 49983
INTERPRETER_PORT = 49999
"""Both as in `sandbox_tools.models`, which is not in the sandbox."""

MEMORY_KEPT = 256 << 20
"""Bytes that a kernel leaves for the guest itself, so that code fails with a `MemoryError` before the sandbox does."""

MEMORY_LEAST = 512 << 20
"""Bytes that a kernel may have however small the machine: below, pandas does not even load."""

KEEP_ALIVE = 86400
"""Seconds an idle connection stays open. The engine closes what it no longer needs: were it closed from here, a request
that is just being sent would be lost, and code must never be sent twice."""


class Server(uvicorn.Server):
    """A server that leaves signals to the process it runs in, and takes connections that have no socket."""

    def connection(self) -> asyncio.Protocol:
        """What speaks HTTP on one more connection, once the server has started."""
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class PortSwitch:
    """Both applications behind one server, told apart by the port that was called."""

    def __init__(self, apps: dict[int, ASGIApp], lifespan: ASGIApp) -> None:
        self.apps = apps
        self.lifespan = lifespan

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the call on to the port's application."""
        app = self.lifespan if scope["type"] == "lifespan" else self.apps[scope["server"][1]]
        await app(scope, receive, send)


def main() -> None:
    """Runs until SIGTERM, or until the tunnel ends."""
    arguments = _parse()
    # Standard output is the tunnel: a stray print in here must not end up in it. It goes to the log instead.
    reading, writing = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(arguments, (reading, writing) if arguments.tunnel else None))


async def _serve(arguments: argparse.Namespace, tunnel: tuple[int, int] | None) -> None:
    settings = Settings()
    with tempfile.TemporaryDirectory(prefix="kernels-", dir=arguments.runtime_dir, ignore_cleanup_errors=True) as path:
        account = account_of()
        if account.uid is not None:
            # A root file system that an ordinary user unpacked belongs to root throughout.
            for each in (account.home, *account.home.rglob("*")):
                account.own(each)
        launch = Launch(
            account=account,
            directory=Path(path),
            cwd=arguments.cwd or (Path.cwd() if account.uid is None else account.home),
            memory_limit=_memory_limit() if arguments.limit_memory else None,
            warm_up=arguments.warm_up,
        )
        account.own(launch.directory)
        contexts = Contexts(launch, settings)
        app = interpreter.create_app(contexts)
        processes = Processes()
        internal = (*reboot.routes(contexts), *warm.routes(contexts)) if tunnel else ()
        daemon = envd.create_app(settings, processes, internal)
        listening = [_listen(arguments.envd_port), _listen(arguments.interpreter_port)]
        ports = [each.getsockname()[1] for each in listening]
        server = Server(
            uvicorn.Config(
                PortSwitch(dict(zip(ports, (daemon, app), strict=True)), lifespan=app),
                http="httptools",
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=1,
            )
        )
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)

        try:
            await _until_stopped(server, listening, stopping, tunnel)
        finally:
            processes.kill()


async def _until_stopped(
    server: Server, listening: list[socket.socket], stopping: asyncio.Event, tunnel: tuple[int, int] | None
) -> None:
    serving = asyncio.create_task(server.serve(sockets=listening))
    tasks: set[asyncio.Task[object]] = {serving, asyncio.create_task(stopping.wait())}
    try:
        while not server.started and not any(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
        # The sockets listen from the beginning, but the engine may only come in once the default kernel is ready.
        if server.started and tunnel:
            from sandbox_tools.guest.tunnel import serve  # only where there is an engine

            ports = [each.getsockname()[1] for each in listening]
            tasks.add(asyncio.create_task(serve(*tunnel, dict.fromkeys(ports, server.connection), let_out=True)))
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        server.should_exit = True
        for task in tasks - {serving}:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m sandbox_tools.guest.main", description=__doc__)
    parser.add_argument("--tunnel", action="store_true", help="serve an engine over standard input and output")
    parser.add_argument("--limit-memory", action="store_true", help="keep each kernel below the machine's memory")
    parser.add_argument("--warm-up", action="store_true", help="begin with what most code imports")
    parser.add_argument("--envd-port", type=int, default=ENVD_PORT)
    parser.add_argument("--interpreter-port", type=int, default=INTERPRETER_PORT)
    parser.add_argument("--cwd", type=Path, help="where contexts begin (default: the user's home)")
    parser.add_argument("--runtime-dir", type=Path, help="where sockets are made (default: the temporary directory)")
    return parser.parse_args()


def _listen(port: int) -> socket.socket:
    # The protocol is named because asyncio switches off the delay of small packets only where it reads TCP.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    return listening


def _memory_limit() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        total = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal:"))
    return max(total - MEMORY_KEPT, MEMORY_LEAST)


if __name__ == "__main__":
    main()
