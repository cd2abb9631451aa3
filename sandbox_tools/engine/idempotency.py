"""Creates that carry a key: the same key never makes a second sandbox."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sandbox_tools.engine.records import Record
from sandbox_tools.errors import APIError, ConflictError
from sandbox_tools.models import Wire

WINDOW = timedelta(hours=24)
"""How long a key is remembered; over the engine's end as long as its sandbox lives."""

_MOST = 10_000


def digest(request: Wire) -> str:
    """What tells one request from another."""
    return hashlib.sha256(request.model_dump_json(by_alias=True).encode()).hexdigest()


@dataclass
class _Made:
    digest: str
    at: datetime
    sandbox_id: str = ""
    task: asyncio.Task[str] | None = None
    """While it is being made."""


class Keys:
    """The keys of one engine.

    Args:
        now: The wall clock.
    """

    def __init__(self, *, now: Callable[[], datetime]) -> None:
        self._now = now
        self._made: dict[str, _Made] = {}

    def start(self, records: Iterable[Record]) -> None:
        """Know the keys of the sandboxes that an earlier engine has made."""
        for record in records:
            if (mark := record.idempotency) is not None:
                self._made[mark.key] = _Made(digest=mark.digest, at=mark.at, sandbox_id=record.id)

    async def once(self, key: str, body: str, make: Callable[[], asyncio.Task[str]]) -> str:
        """The id of the sandbox of that key, made now if there is none; joins one that is being made.

        Args:
            body: The digest of what is asked for.
            make: Begins to make the sandbox; the task gives its id.

        Raises:
            APIError: 422, the key was used for something else.
        """
        self._prune()
        made = self._made.get(key)
        if made is None:
            task = make()
            fresh = made = self._made[key] = _Made(digest=body, at=self._now(), task=task)
            task.add_done_callback(lambda done: self._settle(key, fresh, done))
        elif made.digest != body:
            msg = f"The idempotency key {key!r} was used for another request. Use a key of its own for each request."
            raise APIError(msg, status_code=422, error_code="idempotency_request_mismatch", op="create")

        if made.task is not None:
            # Whoever leaves while it is being made leaves alone.
            return await asyncio.shield(made.task)
        return made.sandbox_id

    def gone(self, key: str, why: str) -> ConflictError:
        """For a caller whose key made a sandbox that is no more."""
        msg = f"The sandbox of the idempotency key {key!r} is gone: {why}. Use another key for a new one."
        return ConflictError(msg, error_code="idempotency_outcome_unknown", op="create")

    def _settle(self, key: str, made: _Made, task: asyncio.Task[str]) -> None:
        if task.cancelled() or task.exception() is not None:
            # Nothing was made, so that the key is free again.
            if self._made.get(key) is made:
                del self._made[key]
        else:
            made.sandbox_id, made.task = task.result(), None

    def _prune(self) -> None:
        old = self._now() - WINDOW
        for key in [key for key, made in self._made.items() if made.task is None and made.at < old]:
            del self._made[key]
        settled = [key for key, made in self._made.items() if made.task is None]
        for key in settled[: max(0, len(self._made) - _MOST)]:
            del self._made[key]
