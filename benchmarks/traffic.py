"""What lies between a client and a sandbox costs: the same requests to the same servers in a sandbox and on the host.

The bare side is this package's guest as an ordinary process of the host, an ordinary HTTP server beside it, and for
`1+1` a plain ipykernel that is spoken to with jupyter_client: no engine, no gVisor, no tunnel. Both sides are called
turn about, in one run, by the same client.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import start_new_kernel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.figures import Samples, machine, milliseconds, options, ratio
from sandbox_tools.models import ENVD_PORT, INTERPRETER_PORT
from sandbox_tools.paths import socket_path, state_directory, templates_directory

MB = 1 << 20
SIZE = 100 * MB
USER_PORT = 8000
CALLS = 30

ROUND_TRIP = "1+1"
PROXIED = "GET from a user's port"
POSTED = "POST to a user's port"
INSIDE = "GET from inside"
UP, DOWN = "100 MB up, /files", "100 MB down, /files"
OUTPUT = "100 MB of a command's output"
USER_UP, USER_DOWN = "100 MB up, a user's port", "100 MB down, a user's port"

SERVER = f"""
import threading, time
import uvicorn

async def app(scope, receive, send):
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    left = int(scope["path"].strip("/") or 0)
    headers = [(b"content-length", str(left).encode())]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    piece = bytes(1 << 18)
    while left > len(piece):
        await send({{"type": "http.response.body", "body": piece, "more_body": True}})
        left -= len(piece)
    await send({{"type": "http.response.body", "body": piece[:left]}})

server = uvicorn.Server(uvicorn.Config(app, port={USER_PORT}, lifespan="off", log_config=None, http="httptools"))
threading.Thread(target=server.run, daemon=True).start()
while not server.started:
    time.sleep(0.01)
"""

# What the gateway adds is what lies between this and the request that came through it.
FROM_INSIDE = f"""
import socket, time

def ask():
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", {USER_PORT})) as connection:
        connection.sendall(b"GET /10 HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
        while connection.recv(65536):
            pass
    return time.perf_counter() - started

print([ask() for _ in range({CALLS})])
"""


@dataclass(frozen=True, kw_only=True)
class Side:
    """Where the same servers are reached."""

    connect: Callable[[int], http.client.HTTPConnection]
    headers: Callable[[int], dict[str, str]]
    directory: str
    samples: Samples = field(default_factory=dict)

    def call(
        self, port: int, method: str, path: str, body: bytes = b"", *, keep: list[bytes] | None = None, **more: str
    ) -> None:
        """One exchange on a connection of its own, whose answer must be a good one.

        Args:
            keep: Where its body goes. None: it is read and dropped.
        """
        connection = self.connect(port)
        try:
            connection.request(method, path, body, self.headers(port) | more)
            answer = connection.getresponse()
            assert answer.status == 200, (answer.status, answer.read())
            room = memoryview(bytearray(MB))
            while count := answer.readinto(room):
                if keep is not None:
                    keep.append(bytes(room[:count]))
        finally:
            connection.close()

    def time(self, step: str, *arguments: object, **more: object) -> None:
        """Keep how long a call took."""
        started = time.perf_counter()
        self.call(*arguments, **more)  # type: ignore[arg-type]
        self.samples.setdefault(step, []).append(time.perf_counter() - started)

    def run(self, code: str) -> str:
        """Run code, in the default context; what it prints."""
        lines: list[bytes] = []
        self.call(INTERPRETER_PORT, "POST", "/execute", *_execute(code), keep=lines)
        events = [json.loads(line) for line in b"".join(lines).splitlines()]
        assert not [event for event in events if event["type"] == "error"], events
        return "".join(event["text"] for event in events if event["type"] == "stdout")

    def round(self) -> None:
        """Each step once; short ones more often."""
        blob = bytes(SIZE)
        path = f"/files?path={self.directory}/blob"
        for _ in range(CALLS):
            self.time(PROXIED, USER_PORT, "GET", "/10")
        for _ in range(CALLS):
            self.time(POSTED, USER_PORT, "POST", "/10")
        self.samples.setdefault(INSIDE, []).extend(json.loads(self.run(FROM_INSIDE)))
        self.time(UP, ENVD_PORT, "POST", path, blob, **{"Content-Type": "application/octet-stream"})
        self.time(DOWN, ENVD_PORT, "GET", path)
        self.time(USER_UP, USER_PORT, "POST", "/0", blob)
        self.time(USER_DOWN, USER_PORT, "GET", f"/{SIZE}")
        start = {"process": {"cmd": "/usr/bin/head", "args": ["-c", str(SIZE), "/dev/zero"]}, "stdin": False}
        message = json.dumps(start).encode()
        envelope = struct.pack("!BI", 0, len(message)) + message
        kind = {"Content-Type": "application/connect+json", "Connect-Protocol-Version": "1"}
        self.time(OUTPUT, ENVD_PORT, "POST", "/process.Process/Start", envelope, **kind)


def _execute(code: str) -> tuple[bytes]:
    return (json.dumps({"code": code, "context_id": None, "language": None, "env_vars": None}).encode(),)


class UnixConnection(http.client.HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("engine")
        self.path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self.path))


def wait_for(side: Side, port: int, path: str) -> None:
    """Until a server answers."""
    deadline = time.monotonic() + 120
    while True:
        try:
            connection = side.connect(port)
            connection.request("GET", path)
            if connection.getresponse().status in (200, 204):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


@contextlib.contextmanager
def in_sandbox(work: Path) -> Iterator[Side]:
    """A sandbox of an engine of the benchmark's own."""
    state = work / "engine"
    os.environ.setdefault("SANDBOX_TOOLS_TEMPLATES_DIR", str(templates_directory(state_directory())))
    argv = [sys.executable, "-m", "sandbox_tools", "serve", "--state-dir", str(state)]
    with (work / "engine.log").open("wb") as log:
        engine = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        grant: dict[str, str] = {}

        def headers(port: int) -> dict[str, str]:
            address = {"E2b-Sandbox-Id": grant["sandboxID"], "E2b-Sandbox-Port": str(port)}
            return address | {"X-Access-Token": grant["envdAccessToken"]}

        side = Side(connect=lambda _: UnixConnection(socket_path(state)), headers=headers, directory="/home/user")
        wait_for(side, 0, "/health")
        connection = side.connect(0)
        connection.request("POST", "/sandboxes", json.dumps({"templateID": "base", "timeout": 3600}))
        grant.update(json.loads(connection.getresponse().read()))
        yield side
        connection.close()
        connection.request("DELETE", f"/sandboxes/{grant['sandboxID']}")
        connection.getresponse().read()
    finally:
        engine.terminate()
        engine.wait()


@contextlib.contextmanager
def on_host(work: Path) -> Iterator[Side]:
    """The guest's two services on the host's loopback."""
    ports = {ENVD_PORT: free_port(), INTERPRETER_PORT: free_port(), USER_PORT: USER_PORT}
    argv = [sys.executable, "-m", "sandbox_tools.guest.main", "--cwd", str(work), "--runtime-dir", str(work)]
    argv += ["--envd-port", str(ports[ENVD_PORT]), "--interpreter-port", str(ports[INTERPRETER_PORT])]
    with (work / "guest.log").open("wb") as log:
        guest = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        side = Side(
            connect=lambda port: http.client.HTTPConnection("127.0.0.1", ports[port]),
            headers=lambda _: {},
            directory=str(work),
        )
        wait_for(side, INTERPRETER_PORT, "/health")
        yield side
    finally:
        guest.terminate()
        guest.wait()


def free_port() -> int:
    """One that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def run_bare(client: BlockingKernelClient) -> float:
    """Seconds from sending `1+1` until the kernel is idle again."""
    started = time.perf_counter()
    sent = client.execute("1+1")
    while True:
        message = client.get_iopub_msg(timeout=60)
        idle = message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
        if idle and message["parent_header"].get("msg_id") == sent:
            return time.perf_counter() - started


def measure(rounds: int, console: Console) -> dict[str, Samples]:
    """The samples of both sides, in seconds."""
    work = Path(tempfile.mkdtemp(prefix="traffic-"))
    work.chmod(0o755)
    manager, kernel = start_new_kernel(kernel_name="python3", extra_arguments=["--log-level=ERROR"])
    try:
        with in_sandbox(work) as sandbox, on_host(work) as host, Progress(console=console, transient=True) as progress:
            task = progress.add_task("rounds", total=rounds)
            for side in (sandbox, host):
                side.run(SERVER)
                side.call(USER_PORT, "GET", "/10")
            for _ in range(rounds):
                for side in (sandbox, host):
                    side.round()
                body = _execute("1+1")
                for _ in range(CALLS):
                    sandbox.time(ROUND_TRIP, INTERPRETER_PORT, "POST", "/execute", *body)
                    host.samples.setdefault(ROUND_TRIP, []).append(run_bare(kernel))
                progress.advance(task)
            return {"sandbox": sandbox.samples, "bare": host.samples}
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)
        shutil.rmtree(work, ignore_errors=True)


def show(results: dict[str, Samples], console: Console) -> None:
    table = Table(title="through engine and tunnel, beside the same on the bare host, ms", title_justify="left")
    for column in ("step", "sandbox p50", "p95", "bare p50", "p95", "ratio", "MB/s"):
        table.add_column(column, justify="left" if column == "step" else "right", no_wrap=column == "step")
    for step, ours in sorted(results["sandbox"].items(), key=lambda row: "MB" in row[0]):
        bare = results["bare"][step]
        rate = f"{SIZE / MB / statistics.median(ours):.0f}" if "MB" in step else ""
        table.add_row(step, *milliseconds(ours), *milliseconds(bare), ratio(ours, bare), rate)
    console.print(table)
    console.print(machine())


def main() -> None:
    arguments = options(__doc__, rounds=5).parse_args()
    console = Console(file=sys.stdout)
    results = measure(arguments.rounds, console)
    show(results, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
