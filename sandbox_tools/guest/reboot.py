"""What a reboot is in here: every process but the guest's own ends, and a fresh default context comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from sandbox_tools.guest.kernels import TICK, KernelDiedError

if TYPE_CHECKING:
    from starlette.requests import Request

    from sandbox_tools.guest.contexts import Contexts

logger = logging.getLogger(__name__)

INSIDE = Path("/opt/sandbox-tools")
"""Where an engine mounts this code; elsewhere the other processes are the host's."""

ROUNDS = int(10 / TICK)
"""How often what is left is killed: one that forks faster than that is not ended, and the reboot fails."""


def routes(contexts: Contexts) -> list[Route]:
    """The engine's own route; nobody else is let through to it."""
    starting: set[asyncio.Task[None]] = set()

    async def reboot(_: Request) -> Response:
        if os.getppid() != 1 or not Path(__file__).is_relative_to(INSIDE):
            raise HTTPException(409, "This guest is not alone in its machine. Reboot it only inside a sandbox.")

        # They go first: one that lives on would put a new kernel in the place of one that was killed.
        await contexts.aclose()
        await _end_all_others()
        _empty(Path("/dev/shm"))
        # Not waited for: whoever comes first waits for it, also after a pause in between.
        task = asyncio.create_task(_begin(contexts))
        starting.add(task)
        task.add_done_callback(starting.discard)
        return Response(status_code=204)

    return [Route("/reboot", reboot, methods=["POST"])]


async def _end_all_others() -> None:
    for _ in range(ROUNDS):
        # Neither pid 1, which reaps them, nor the caller is among them (kill(2)).
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        for _ in range(25):
            if not _others():
                return
            await asyncio.sleep(TICK / 25)

    raise HTTPException(503, f"{len(_others())} processes could not be ended. Try again, or kill the sandbox.")


def _others() -> list[int]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        pid = int(directory.name)
        if pid not in (1, os.getpid()):
            with contextlib.suppress(OSError):
                # The state follows the name, which may hold anything but ends with the last bracket (proc(5)).
                state = (directory / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                if state not in ("Z", "X"):
                    found.append(pid)
    return found


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


async def _begin(contexts: Contexts) -> None:
    try:
        await contexts.default()
    except (KernelDiedError, OSError) as error:
        # The next caller tries again, and is told.
        logger.error("The default context could not be started after a reboot: %s", error)
