"""A real engine as a process of its own, on a state directory of the test's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from sandbox_tools.paths import socket_path

# Long enough for the slowest machine to adopt or warm; nothing passes because of it.
PATIENCE = 120.0


class EngineProcess:
    """`sandbox-tools serve` on a state directory; killed and started again at will.

    Args:
        pool: How many sandboxes it keeps ready; none, so that what runs is what a test has asked for.
    """

    def __init__(
        self, state: Path, *, prefix: tuple[str, ...] = (), options: tuple[str, ...] = (), pool: int = 0
    ) -> None:
        self.state = state
        self.prefix = prefix
        self.options = (*options, "--pool", str(pool))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> EngineProcess:
        """Start it and wait until it can create."""
        self.spawn(**environment)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(self.log())
            with contextlib.suppress(httpx.TransportError), self.http() as http:
                if http.get("/health").status_code == 200:
                    return self
            time.sleep(0.02)
        raise AssertionError(self.log())

    def spawn(self, **environment: str) -> None:
        """Start it without waiting."""
        command = [*self.prefix, sys.executable, "-m", "sandbox_tools", "serve", "--state-dir", str(self.state)]
        self.state.mkdir(exist_ok=True)
        with (self.state / "engine.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.options], stdout=log, stderr=log, env={**os.environ, **environment}
            )

    def log(self) -> str:
        """What it has written."""
        return (self.state / "engine.log").read_text(errors="replace")

    def kill(self) -> None:
        """As `kill -9` does: nothing of its own is run."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """As an operator does; the exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(PATIENCE)

    @property
    def pid(self) -> int:
        """Its process."""
        assert self.process is not None
        return self.process.pid

    def http(self) -> httpx.Client:
        """A plain HTTP client on its socket."""
        transport = httpx.HTTPTransport(uds=str(socket_path(self.state)))
        return httpx.Client(transport=transport, base_url="http://engine", timeout=PATIENCE)

    def create(self, **body: Any) -> Box:
        """A sandbox, by the wire."""
        with self.http() as http:
            answer = http.post("/sandboxes", json={"templateID": "base", "timeout": 600, **body})
        assert answer.status_code == 201, answer.text
        return Box(self, answer.json())

    def rows(self) -> list[dict[str, Any]]:
        """All its sandboxes, as it lists them."""
        with self.http() as http:
            rows: list[dict[str, Any]] = http.get("/v2/sandboxes").json()
        return rows

    def clear(self) -> list[dict[str, Any]]:
        """Kill all its sandboxes, which is quicker than the pause that stopping it would give them; what there were."""
        rows = self.rows()
        with self.http() as http:
            for row in rows:
                http.delete(f"/sandboxes/{row['sandboxID']}")
        return rows

    def wait_quiet(self) -> None:
        """Until nothing goes on behind answered calls: what was killed is tidied, and what is kept ready is there."""
        deadline = time.monotonic() + PATIENCE
        before: list[str] = []
        while time.monotonic() < deadline:
            time.sleep(3)
            now = [*self.containers(), *(path.name for path in (self.state / "runsc").glob("*"))]
            if now == before:
                return
            before = now
        raise AssertionError(before)

    def plain_images(self) -> list[Path]:
        """What lies in its memory now, outside of any sandbox."""
        return plain_images(self.pid, self.state)

    def containers(self) -> list[str]:
        """The sandboxes of this engine whose processes live on this host, by container id."""
        found = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                argv = process.read_text(errors="replace").split("\0")
                if f"--root={self.state / 'runsc'}" in argv and "boot" in argv:
                    found.append(argv[-2])
        return found


def plain_images(pid: int, state: Path) -> list[Path]:
    """What the engine that is this process has in the tmpfs that only a descriptor leads to, or in the machine's."""
    mounted = {line.split()[2] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    found: list[Path] = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            device = fd.stat().st_dev
            if fd.is_dir() and f"{os.major(device)}:{os.minor(device)}" not in mounted:
                found += fd.iterdir()
    digest = hashlib.sha256(os.fsencode(state.resolve())).hexdigest()[:12]
    return [*found, *Path("/dev/shm").glob(f"sandbox-tools-*-{digest}/*")]


class Box:
    """One sandbox, driven over the wire."""

    def __init__(self, engine: EngineProcess, grant: dict[str, Any]) -> None:
        self.engine = engine
        self.id: str = grant["sandboxID"]
        self.token: str = grant["envdAccessToken"]

    @property
    def headers(self) -> dict[str, str]:
        """What routes a request to the interpreter."""
        return {"E2b-Sandbox-Id": self.id, "E2b-Sandbox-Port": "49999", "X-Access-Token": self.token}

    def run(self, code: str, **more: Any) -> list[dict[str, Any]]:
        """All events of one execution; `more` goes into the body."""
        with self.stream(code, **more) as lines:
            return list(lines)

    @contextlib.contextmanager
    def stream(self, code: str, **more: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of one execution as they come; leaving early breaks the connection."""
        body = {"code": code, "context_id": None, "language": None, "env_vars": None, **more}
        with self.engine.http() as http, http.stream("POST", "/execute", json=body, headers=self.headers) as answer:
            if answer.status_code == 502:
                raise httpx.RemoteProtocolError(answer.read().decode())
            assert answer.status_code == 200, answer.read()
            yield _in_time(answer.iter_lines())

    def value(self, code: str, **more: Any) -> str:
        """The text of the last expression's value; the code must not raise."""
        events = self.run(code, **more)
        assert not [event for event in events if event["type"] == "error"], events
        return next(event["text"] for event in events if event["type"] == "result")

    def post(self, verb: str, **body: Any) -> httpx.Response:
        """One verb of the control plane."""
        with self.engine.http() as http:
            return http.post(f"/sandboxes/{self.id}/{verb}", json=body)

    def info(self) -> dict[str, Any]:
        """What info says."""
        with self.engine.http() as http:
            answer = http.get(f"/sandboxes/{self.id}")
        assert answer.status_code == 200, answer.text
        info: dict[str, Any] = answer.json()
        return info

    def kill(self) -> int:
        """The status of its killing."""
        with self.engine.http() as http:
            return http.delete(f"/sandboxes/{self.id}").status_code

    def wait_for(self, state: str) -> dict[str, Any]:
        """Info, once the sandbox is in that state."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if (info := self.info())["state"] == state:
                return info
            time.sleep(0.05)
        raise AssertionError(info)

    def wait_for_no_process(self) -> None:
        """That it was ended is answered before it is."""
        deadline = time.monotonic() + PATIENCE
        while any(name.startswith(self.id) for name in self.engine.containers()):
            assert time.monotonic() < deadline, self.engine.containers()
            time.sleep(0.01)

    def wait_gone(self) -> str:
        """The engine's words, once the sandbox is no more."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with self.engine.http() as http:
                answer = http.get(f"/sandboxes/{self.id}")
            if answer.status_code == 404:
                message: str = answer.json()["message"]
                return message
            time.sleep(0.05)
        raise AssertionError(answer.text)


def _in_time(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The events of a stream, whose keepalives would else let a test wait for ever."""
    deadline = time.monotonic() + PATIENCE
    for line in lines:
        assert time.monotonic() < deadline, "The code does not come to its end."
        yield json.loads(line)
