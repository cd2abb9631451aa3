"""What a pause leaves in a sandbox's memory and files, so that the resume can tell whether both came back."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from sandbox_tools.client.exchange import ask
from sandbox_tools.client.wire import parsed
from sandbox_tools.errors import NotFoundError, SandboxError, StateLostError
from sandbox_tools.models import ENVD_PORT

if TYPE_CHECKING:
    from sandbox_tools.client.sandbox import Sandbox

log = logging.getLogger("sandbox_tools.client")

PLACES = {"memory": "/dev/shm/.sandbox-tools", "files": "/var/lib/sandbox-tools/sentinel"}
"""Where the mark is. `/dev/shm` is a file system in RAM wherever Linux runs, and a reboot empties it: what is there has
come back with the memory. No kernel, process or namespace of the user's holds it, so none of them can end with it."""

# Not the user's: in a directory that all may write to, Linux lets nobody write to another's file, nor remove it
# (proc(5), `protected_regular`), and files in `/dev/shm` that are a user's go when that user logs out (logind.conf(5)).
OWNER = "root"

LIMIT = 5.0
"""Seconds that planting or checking may take; a sandbox that is slower than that is paused or resumed unverified."""


class Sentinel(BaseModel):
    """One mark, as plain data: what is kept of it lets another process `check` the sandbox."""

    model_config = ConfigDict(frozen=True)

    sandbox_id: str
    count: int
    """Milliseconds since the epoch, but always more than the one before: later marks are told from earlier ones, also
    where several processes plant them."""
    memory: bool = True
    """Whether memory is to come back too. False: the pause keeps files only."""

    def text(self) -> str:
        """What is in each place."""
        return f"{self.sandbox_id} {self.count}"

    def is_in(self, found: str) -> bool:
        """Whether a place has this mark or, because others have paused it since, a later one of the same sandbox."""
        mark = re.fullmatch(rf"{re.escape(self.sandbox_id)} (\d{{1,20}})", found, re.ASCII)
        return mark is not None and int(mark[1]) >= self.count


async def plant(sandbox: Sandbox, *, memory: bool = True) -> Sentinel | None:
    """Leaves a mark in a running sandbox, for `check` to find when memory (if that is kept) and files are back.

    Returns:
        The mark before it if it could not be left. None: there was none.
    """
    before = sandbox.sentinel
    count = max(time.time_ns() // 1_000_000, before.count + 1 if before else 0)
    fresh = Sentinel(sandbox_id=sandbox.id, count=count, memory=memory)
    files = [("file", (path, fresh.text().encode())) for path in PLACES.values()]
    try:
        params = {"username": OWNER}
        answer = await ask(sandbox, "pause", "POST", ENVD_PORT, "/files", params=params, files=files, timeout=LIMIT)
        parsed(list[dict[str, object]], answer, "pause")  # the login page of a network has written nothing
    except SandboxError as error:
        log.info("%s is paused without a sentinel: %s", sandbox.id, error)
        return before.model_copy(update={"memory": memory and before.memory}) if before else None

    return fresh


async def check(sandbox: Sandbox, sentinel: Sentinel) -> bool:
    """Looks for a mark in a running sandbox. True: what was to come back has; False: nobody could look.

    Raises:
        StateLostError: Memory or files are of an earlier time, or of another sandbox. It can be used all the same.
    """
    parts = [part for part in PLACES if part == "files" or sentinel.memory]
    found = await asyncio.gather(*(_read(sandbox, PLACES[part]) for part in parts))
    lost = frozenset(
        part for part, text in zip(parts, found, strict=True) if text is not None and not sentinel.is_in(text)
    )
    if lost:
        what = " and ".join(sorted(lost, reverse=True))
        msg = f"Sandbox {sandbox.id!r} runs, but its {what} did not come back as paused. Make anew what you need in it."
        raise StateLostError(msg, lost=lost, op="resume", sandbox_id=sandbox.id)

    return None not in found


async def _read(sandbox: Sandbox, path: str) -> str | None:
    """What is in a place, nothing if it is not there. None: nobody could look."""
    try:
        params = {"path": path, "username": OWNER}
        answer = await ask(sandbox, "resume", "GET", ENVD_PORT, "/files", params=params, idempotent=True, timeout=LIMIT)
    except NotFoundError:
        return ""
    except SandboxError as error:
        why = str(error)
    else:
        text = answer.decode(errors="replace")
        if not text.lstrip().startswith("<"):
            return text

        why = "a page of something in between came in place of its mark"

    log.warning("%s is resumed unverified: %s", sandbox.id, why)
    return None
