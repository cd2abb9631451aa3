"""The way to this machine's engine: finds it by its socket, starts it if need be, and waits until it is ready."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import httpx
from pydantic import ValidationError

from sandbox_tools.errors import ConfigError, EngineError
from sandbox_tools.models import ErrorBody
from sandbox_tools.paths import socket_path

START_LIMIT = 60.0
"""Seconds without any sign of life on the socket."""

PREPARE_LIMIT = 900.0
"""Seconds in which the engine may say that it is still preparing: it builds its template on the first start."""

HEALTH_TIMEOUT = 5.0

LOCK_TAKEN = 3
"""The exit code of an engine that found another one on its state directory."""

SERVE = (sys.executable, "-m", "sandbox_tools", "serve", "--idle-exit", "900")


class LocalEngine:
    """The engine of one state directory, shared by all processes of this user.

    Args:
        state: The state directory; made if it does not exist.
        on_wait: Called with a sentence each time the reason for waiting changes.
        command: What starts an engine; `--state-dir` and the directory are appended.
        start_limit: Seconds without a sign of life after which waiting ends.
        prepare_limit: Seconds of preparing after which waiting ends.

    Raises:
        ConfigError: The socket's path is too long.
    """

    def __init__(
        self,
        state: Path,
        *,
        on_wait: Callable[[str], None] | None = None,
        command: Sequence[str] = SERVE,
        start_limit: float = START_LIMIT,
        prepare_limit: float = PREPARE_LIMIT,
    ) -> None:
        self.state = state.absolute()
        self.socket = socket_path(self.state)
        self._on_wait = on_wait
        self._command = command
        self._start_limit = start_limit
        self._prepare_limit = prepare_limit
        self._lock = asyncio.Lock()
        self._up = False

    def lost(self) -> None:
        """Says that the engine did not answer, so that the next `ready` looks again."""
        self._up = False

    async def ready(self) -> None:
        """Returns once the engine answers that it can create sandboxes.

        If this is cancelled, an engine that it started goes on coming up, for whoever asks next.

        Raises:
            ConfigError: The state directory cannot be used.
            EngineError: The engine ended early, or did not get ready in time.
        """
        if self._up:
            return

        async with self._lock:
            if not self._up:
                await self._come_up()
                self._up = True

    async def _come_up(self) -> None:
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket), verify=False)
        async with httpx.AsyncClient(transport=transport, timeout=HEALTH_TIMEOUT, trust_env=False) as http:
            starter: _Starter | None = None
            said: str | None = None
            silent_since = preparing_since = time.monotonic()
            pause = 0.02
            while (reason := await _health(http)) != "":
                now = time.monotonic()
                if reason is None:
                    preparing_since = now
                    if starter is None or starter.gave_way():
                        starter = _Starter(self.state, self._command)
                        said = self._say("Starting the engine.", said)

                    starter.check()
                    if now - silent_since > self._start_limit:
                        what = f"The engine gave no sign of life for {self._start_limit:g} s."
                        raise starter.error(what)
                else:
                    silent_since = now
                    said = self._say(reason, said)
                    if now - preparing_since > self._prepare_limit:
                        msg = (
                            f"The engine is still preparing after {self._prepare_limit:g} s: {reason!r}. "
                            f"Look into {str(self.state / 'engine.log')!r}."
                        )
                        raise EngineError(msg, argv=self._command, op="serve")

                await asyncio.sleep(pause)
                pause = min(pause * 1.3, 0.5)

    def _say(self, reason: str, said: str | None) -> str:
        if self._on_wait and reason != said:
            self._on_wait(reason)

        return reason


async def _health(http: httpx.AsyncClient) -> str | None:
    """Empty: ready. A sentence: why not yet. None: nobody answers."""
    try:
        response = await http.get("http://localhost/health")
    except httpx.HTTPError:
        return None

    if response.is_success:
        return ""

    try:
        return ErrorBody.model_validate_json(response.content).message or "Preparing."
    except ValidationError:
        msg = (
            f"What listens on the engine's socket answered with status {response.status_code} and "
            f"{response.text[:200]!r}. Stop it, or choose another `SANDBOX_TOOLS_STATE_DIR`."
        )
        raise EngineError(msg, op="serve") from None


class _Starter:
    """One attempt to start an engine that outlives this process."""

    # Seconds that another process's engine, which holds the lock, is given before a new attempt: it may be coming up,
    # or just exiting.
    PATIENCE = 1.0

    def __init__(self, state: Path, command: Sequence[str]) -> None:
        self._argv = [*command, "--state-dir", str(state)]
        self._log = state / "engine.log"
        self._yield_at: float | None = None
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self._log, "ab", opener=_private) as log:
                self._log_start = log.tell()
                self._process = self._spawn(state, log)
        except OSError as error:
            msg = (
                f"The engine cannot be started in the state directory {str(state)!r}: {error}. "
                "Make it writable, or set `SANDBOX_TOOLS_STATE_DIR` to a directory that is."
            )
            raise ConfigError(msg, op="serve") from error

        # Waits for as long as the engine lives, so that it leaves no zombie in a process that lives longer.
        threading.Thread(target=self._process.wait, name="sandbox-engine-reaper", daemon=True).start()

    def gave_way(self) -> bool:
        """Whether this engine found another one holding the lock, and that one did not come up."""
        if self._process.returncode != LOCK_TAKEN:
            return False

        self._yield_at = self._yield_at or time.monotonic() + self.PATIENCE
        return time.monotonic() >= self._yield_at

    def check(self) -> None:
        """Raises what ended the engine, unless it lives or gave way to another."""
        code = self._process.returncode
        if code is not None and code != LOCK_TAKEN:
            what = f"The engine ended with exit code {code} before it was ready."
            raise self.error(what)

    def error(self, what: str) -> EngineError:
        """An error with the end of what this engine wrote to its log."""
        with self._log.open("rb") as log:
            log.seek(max(self._log_start, self._log.stat().st_size - 4096))
            tail = log.read().decode("utf-8", "replace").strip()

        msg = f"{what} Correct what its log says, in {str(self._log)!r}:\n{tail or '(nothing)'}"
        return EngineError(msg, argv=self._argv, exit_code=self._process.returncode, stderr=tail, op="serve")

    def _spawn(self, state: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
        # A session of its own: the terminal's Ctrl-C and hang-up do not reach it. Its working directory is not the
        # caller's, whose files could shadow modules; so a checkout that is not installed must be named to be found.
        package = str(Path(__file__).parents[2])
        env = dict(os.environ)
        # On a Unix socket its permissions decide; this user's other processes may not have the key.
        env.pop("SANDBOX_TOOLS_API_KEY", None)
        if package != sysconfig.get_path("purelib"):
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [package, env.get("PYTHONPATH")]))

        return subprocess.Popen(
            self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=state, env=env, start_new_session=True
        )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
