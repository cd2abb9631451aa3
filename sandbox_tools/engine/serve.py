"""The engine as a process: one per state directory, on a Unix socket or a TCP port, ready when it says so."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import uvicorn

from sandbox_tools.engine import pool
from sandbox_tools.engine.api import Engine
from sandbox_tools.engine.bounds import Bounds
from sandbox_tools.engine.exclusive import AlreadyRunningError, sole_engine
from sandbox_tools.engine.front import Front
from sandbox_tools.engine.images import keys
from sandbox_tools.engine.images.memory import Memory
from sandbox_tools.engine.images.rotation import move_all
from sandbox_tools.engine.images.store import Store
from sandbox_tools.engine.retention import DEFAULT_DAYS
from sandbox_tools.engine.runsc import Runsc
from sandbox_tools.engine.supervisor import Supervisor
from sandbox_tools.engine.templates import DEFAULT_MEMORY_MB, prepare
from sandbox_tools.engine.tls import Certificates, names_of
from sandbox_tools.engine.websocket import WebSocketProtocol
from sandbox_tools.errors import ConfigError, SandboxError
from sandbox_tools.paths import socket_path, templates_directory

log = logging.getLogger(__name__)

ALREADY_RUNNING = 3
"""The exit code of a second engine on one state directory."""

# Seconds an idle connection stays open, longer than clients keep theirs: were it closed from here, a request that is
# just being sent would be lost, and code must never be sent twice.
_KEEP_ALIVE = 3600

# How often, in seconds, it is looked whether a certificate is to be renewed.
_RENEWAL = 12 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Where an engine is reached."""

    socket: socket.socket
    certificates: Certificates | None = None
    """What TLS is spoken with. None: it is not."""


def run(
    state_dir: Path,
    *,
    uds: Path | None = None,
    host: str | None = None,
    port: int = 0,
    tls_port: int | None = None,
    domain: str | None = None,
    api_key: str | None = None,
    memory_mb: int = DEFAULT_MEMORY_MB,
    disk_mb: int | None = None,
    cpus: float | None = None,
    allow_internet: bool = False,
    max_sandboxes: int | None = None,
    idle_exit: float | None = None,
    retention_days: float = DEFAULT_DAYS,
    encryption: bool = True,
    key_file: Path | None = None,
    pool_size: int = pool.DEFAULT_SIZE,
    max_snapshot_mb: int | None = None,
    keep_history: int = 0,
) -> int:
    """Serve until told to stop, and return the process's exit code.

    Args:
        state_dir: The state directory; one engine at a time holds it.
        uds: The Unix socket. None: the state directory's own, unless `host` is given.
        host: Listen on TCP here instead. An API key is then required, and made and printed if none is given.
        port: The TCP port; 0 picks a free one and prints it.
        tls_port: Listen with TLS on this port as well; 0 picks a free one. The certificate authority is made here, and
            its path is printed. None: no TLS.
        domain: What create and connect answer as the domain of the sandboxes' own addresses. None: none on a Unix
            socket; on TCP one that needs no DNS, as clients take what precedes its `@` for a user name.
        api_key: What clients must send. None on a Unix socket: the socket's permissions decide.
        memory_mb: Memory of each sandbox.
        disk_mb: What each may write to its files at most, as `Bounds.disk_mb`.
        cpus: Cores' worth of CPU time of each. None: as its template says.
        allow_internet: Whether new ones reach the internet, by HTTP through this process, unless they are not to.
        max_sandboxes: How many may run at a time; paused ones don't count. None: no limit.
        idle_exit: Seconds without a running sandbox or a request after which the engine exits; paused sandboxes need
            none. None: never.
        retention_days: How long a paused sandbox is kept. 0: until it is killed.
        encryption: Whether snapshots are sealed on the disk.
        key_file: Where their keys are. None: as `keys.load` says.
        pool_size: How many sandboxes are kept ready, frozen, so that a create is a thaw. 0: none.
        max_snapshot_mb: What all snapshots together may take of the disk. None: what it has.
        keep_history: How many of its last pauses are kept of a sandbox that says nothing about it.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # A stream that a pause or a kill breaks is broken on purpose, and no fault of the server's.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "without completing response" not in str(record.msg))
    try:
        with sole_engine(state_dir):
            engine = Engine()
            store = _sealing(state_dir, key_file) if encryption else _plain(state_dir)
            listeners = [Listener(socket=_listen(state_dir, uds, host, port))]
            if host is not None:
                if api_key is None:
                    api_key = f"e2b_{secrets.token_hex(20)}"
                    _say(f"API key: {api_key}")
                _say(f"Listening on {_url('http', host, listeners[0].socket)}")
                listeners += _listen_tls(state_dir, host, tls_port, domain)
                engine.domain = domain or f"sbx@{_reachable(host)}:{listeners[-1].socket.getsockname()[1]}"
            elif domain is not None:
                engine.domain = domain
            supervise = partial(
                Supervisor,
                store=store,
                bounds=Bounds(disk_mb=disk_mb, cpus=cpus, internet=allow_internet),
                max_sandboxes=max_sandboxes,
                retention_days=retention_days,
                pool_size=pool_size,
                max_snapshot_bytes=max_snapshot_mb and max_snapshot_mb << 20,
                keep_history=keep_history,
            )
            prepare_engine = partial(_prepare, state_dir, engine, store, memory_mb, supervise)
            asyncio.run(_serve(engine, listeners, prepare_engine, api_key, idle_exit))
    except AlreadyRunningError as error:
        _say(error.message)
        return ALREADY_RUNNING
    except (SandboxError, OSError) as error:
        _say(str(error))
        return 1

    return 0


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the loop's: uvicorn would raise them again when it ends, before the sandboxes are paused."""
        yield


async def _serve(
    engine: Engine,
    listeners: Sequence[Listener],
    prepare_engine: Callable[[], Coroutine[None, None, Supervisor]],
    api_key: str | None,
    idle_exit: float | None,
) -> None:
    loop = asyncio.get_running_loop()
    last_request = loop.time()

    def on_request() -> None:
        nonlocal last_request
        last_request = loop.time()

    front = Front(engine, api_key=api_key, on_request=on_request)
    servers = [_Server(_config(front, listener.certificates)) for listener in listeners]

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    def on_signal(number: int) -> None:
        for server in servers:
            server.handle_exit(number, None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    each = [
        asyncio.create_task(server.serve(sockets=[listener.socket]))
        for server, listener in zip(servers, listeners, strict=True)
    ]
    serving = asyncio.create_task(_until_one_ends(each, stop))
    preparing = asyncio.create_task(prepare_engine())
    renewing = asyncio.create_task(_keep_certified(listeners))
    try:
        await asyncio.wait((serving, preparing), return_when=asyncio.FIRST_COMPLETED)
        if preparing.done():
            supervisor = preparing.result()
            while not serving.done():
                await asyncio.wait((serving,), timeout=idle_exit)
                quiet = loop.time() - last_request
                if idle_exit is not None and not supervisor.running and quiet >= idle_exit:
                    log.info("Nothing has run for %.0f s: the engine exits", quiet)
                    stop()
                    await serving
            await supervisor.stop()
            supervisor.leave_templates()
    finally:
        stop()
        preparing.cancel()
        renewing.cancel()
        await asyncio.wait((serving, preparing, renewing))


def _config(front: Front, certificates: Certificates | None) -> uvicorn.Config:
    config = uvicorn.Config(
        front,
        log_config=None,
        access_log=False,
        lifespan="off",
        http="httptools",
        ws=WebSocketProtocol,
        timeout_keep_alive=_KEEP_ALIVE,
        # What a sandbox answers is passed on as it is, with its own date.
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,  # seconds that answers in flight are given to end by themselves
    )
    config.load()
    if certificates is not None:
        config.ssl = certificates.context
    return config


async def _until_one_ends(each: Sequence[asyncio.Task[None]], stop: Callable[[], None]) -> None:
    """Serve on all addresses or on none."""
    await asyncio.wait(each, return_when=asyncio.FIRST_COMPLETED)
    stop()
    await asyncio.wait(each)
    for task in each:
        task.result()


async def _keep_certified(listeners: Sequence[Listener]) -> None:
    while True:
        await asyncio.sleep(_RENEWAL)
        for listener in listeners:
            if listener.certificates is not None:
                try:
                    listener.certificates.renew(datetime.now(UTC))
                except OSError as error:
                    log.error("The certificate could not be renewed, which is tried again: %s", error)


async def _prepare(
    state: Path, engine: Engine, store: Store, memory_mb: int, supervise: Callable[..., Supervisor]
) -> Supervisor:
    def on_step(step: str, share: float) -> None:
        if step != engine.preparing:
            log.info("Preparing: %s", step)
        engine.preparing = step

    templates = templates_directory(state)
    template = await prepare(state, templates, on_step, memory_mb=memory_mb)
    engine.preparing = "taking over what an earlier engine left"
    runtime = Runsc(template.runsc, state / "runsc")
    supervisor = supervise(state, templates, template, runtime)
    if store.keys is not None and store.keys.changing:
        engine.preparing = "putting snapshots under the newest key"
        moved, lost = await asyncio.to_thread(move_all, state, store)
        log.info("Key %s: %d snapshots put under it, %d are under unknown keys", store.keys.newest, moved, len(lost))
    await supervisor.start()
    engine.supervisor = supervisor
    # Thousands of paused sandboxes stay: to look for garbage among them again and again would hold up everybody.
    gc.collect()
    gc.freeze()
    log.info("Ready")
    return supervisor


def _listen_tls(state: Path, host: str, port: int | None, domain: str | None) -> list[Listener]:
    """The listener with TLS, where one is wanted."""
    if port is None:
        return []

    certificates = Certificates(state / "tls", names_of(_reachable(host), domain))
    listener = Listener(socket=_listen(state, None, host, port), certificates=certificates)
    _say(f"Listening on {_url('https', host, listener.socket)}")
    _say(f"Certificate authority: {certificates.ca_path}")
    return [listener]


def _reachable(host: str) -> str:
    """A name for where the engine listens that can be called from here, as it is written in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _url(scheme: str, host: str, listener: socket.socket) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _sealing(state: Path, key_file: Path | None) -> Store:
    return Store(keys.load(state, key_file), Memory.of(state))


def _plain(state: Path) -> Store:
    try:
        return Store(memory=Memory.of(state))
    except ConfigError:  # it is only the quicker way to the disk
        return Store()


def _listen(state: Path, uds: Path | None, host: str | None, port: int) -> socket.socket:
    """The listening socket; a Unix socket is its owner's only."""
    where = f"{host}:{port}" if host is not None else str(uds or socket_path(state))
    try:
        if host is not None:
            # With its protocol named, or asyncio leaves Nagle's delay on: 40 ms a call.
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
            return listener

        # The lock says that no engine of this directory lives: a socket file that is left over is nobody's.
        listener = socket.socket(socket.AF_UNIX)
        if uds is not None and uds != socket_path(state) and _answers(uds):
            msg = f"The socket {where!r} is taken by another process. Choose another `--uds`."
            raise ConfigError(msg, op="serve")
        Path(where).unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            listener.bind(where)
        finally:
            os.umask(before)
        listener.listen(128)
    except OSError as error:
        msg = f"Can't listen on {where!r}: {error.strerror}. Choose another socket or port."
        raise ConfigError(msg, op="serve") from error

    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
