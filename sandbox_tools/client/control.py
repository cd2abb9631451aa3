"""The verbs on sandboxes and snapshots that are there, in whichever dialect the provider speaks."""

from __future__ import annotations

import asyncio
import builtins
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from operator import attrgetter
from typing import Any, TypeVar

import httpx

from sandbox_tools.client import wire
from sandbox_tools.client.dialects import Dialect
from sandbox_tools.client.transport import LONG_REQUEST, Call, Transport
from sandbox_tools.errors import ConflictError, NotFoundError, ProtocolError, SandboxStateError
from sandbox_tools.models import LogEntry, Logs, Metric, SandboxInfo, SnapshotInfo, State, TimeoutRequest

T = TypeVar("T")

IDLE_PAGES = 3
"""Pages in a row that may bring nothing new: one may be empty, or come twice."""

KNOWN_SIZES = 4096
"""How many sandboxes' sizes are remembered; the oldest are forgotten first."""


class ControlPlane:
    """What `Client` can do with a sandbox or snapshot by its id.

    A verb that the provider does not have raises a `ConfigError` that names both, before any I/O.
    """

    dialect: Dialect

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._memory_mb: dict[str, int] = {}

    async def pause(self, sandbox_id: str, *, memory: bool = True) -> bool:
        """Puts memory and files on disk and frees the RAM; running streams are cut.

        It has 60 s and 16 s for each GiB of RAM, where a look at the sandbox has told this client how much it has,
        and 600 s elsewhere.

        Args:
            memory: False: processes end, and only files are kept.

        Returns:
            True: paused by this call. False: it was paused already (or by an attempt whose answer was lost).

        Raises:
            SandboxNotFoundError: It is gone.
            ConflictError: It is in a transition that forbids a pause.
            ConfigError: The provider has no pause without memory.
        """
        known = self._memory_mb.get(sandbox_id)
        deadline = LONG_REQUEST if known is None else 60 + 16 * known / 1024
        self.dialect.require(f"pause(memory={memory})")
        body = self.dialect.pause_body if memory else {"memory": False}
        return await self._unless_paused("pause", sandbox_id, body=body, deadline=deadline)

    async def freeze(self, sandbox_id: str) -> bool:
        """Stops a sandbox's processes within milliseconds and keeps its RAM; whatever reaches it afterwards thaws it.

        Looking at it, moving its end and killing it reach nobody inside.

        Returns:
            True: it stands still. False: it is paused already.

        Raises:
            SandboxNotFoundError: It is gone.
            ConflictError: A stream to it is open (code, a command, a WebSocket), or it is in a transition.
        """
        return await self._unless_paused("freeze", sandbox_id)

    async def kill(self, sandbox_id: str) -> bool:
        """Ends a sandbox, running or paused, with all that is in it.

        Returns:
            True: killed. False: there was none (or an attempt whose answer was lost had killed it).
        """
        return await wire.was_there(self._ask(object, "kill", "DELETE", "/sandboxes/{id}", sandbox_id))

    async def info(self, sandbox_id: str, *, deadline: float | None = None) -> SandboxInfo:
        """Looks at a sandbox without waking it.

        Args:
            deadline: Seconds. None: `request_timeout`.

        Raises:
            SandboxNotFoundError: It is gone.
        """
        found = await self._ask(SandboxInfo, "info", "GET", "/sandboxes/{id}", sandbox_id, deadline=deadline)
        return self._own(found)

    async def list(
        self,
        *,
        state: State | None = None,
        metadata: Mapping[str, str] | None = None,
        template: str | None = None,
        started_after: datetime | None = None,
    ) -> AsyncIterator[SandboxInfo]:
        """All sandboxes of this key, newest first, fetched page by page.

        Args:
            state: None: running and paused ones.
            metadata: Only those that have all these pairs. None: all.
            template: Only those of the template with this id or alias, without a tag. None: all.
            started_after: Only those whose last run began later; with a time zone. None: all.

        Raises:
            ProtocolError: The pages lead nowhere, so that some may be missing.
        """
        params: dict[str, str | None] = {"state": state, "template": template}
        if metadata:
            # The wire's own double encoding; httpx adds the third that a query needs (E2B's SDKs do the same).
            quote = urllib.parse.quote
            params["metadata"] = urllib.parse.urlencode({quote(k): quote(v) for k, v in metadata.items()})

        if started_after:
            params["startedAfter"] = wire.moment("list", "started_after", started_after).isoformat()

        wanted = {name: value for name, value in params.items() if value}
        async for row in self._pages("list", "/v2/sandboxes", wanted, SandboxInfo, attrgetter("sandbox_id")):
            # Asked for already, but a server that ignores a filter must not widen what the caller acts on.
            if (
                (state is None or row.state == state)
                and (not metadata or metadata.items() <= row.metadata.items())
                and (template is None or template in (row.template_id.removesuffix(":default"), row.alias))
                and (started_after is None or row.started_at > started_after)
            ):
                yield self._own(row)

    async def set_timeout(self, sandbox_id: str, timeout: int) -> None:
        """Moves the end of a running sandbox, later or earlier.

        Args:
            timeout: Seconds from now. 0: it ends at once (paused or killed, as `create` was told).

        Raises:
            SandboxNotFoundError: It is gone.
            SandboxStateError: It is paused, and so has no end to move.
        """
        body = wire.body(TimeoutRequest, "set_timeout", timeout=timeout).model_dump()
        path = "/sandboxes/{id}/timeout"
        await self._ask(object, "set_timeout", "POST", path, sandbox_id, running=True, body=body)

    async def metrics(
        self, sandbox_id: str, *, start: datetime | None = None, end: datetime | None = None
    ) -> builtins.list[Metric]:
        """What a sandbox took of memory, CPU and disk, oldest first.

        Args:
            start: With a time zone. None: from its beginning.
            end: With a time zone. None: until now.

        Raises:
            SandboxNotFoundError: It is gone.
            SandboxStateError: It is paused, and the provider has none then.
        """
        bounds = {name: wire.moment("metrics", name, at) for name, at in (("start", start), ("end", end)) if at}
        params = {name: str(int(at.timestamp() * self.dialect.metrics_per_second)) for name, at in bounds.items()}
        path = "/sandboxes/{id}/metrics"
        response = await self._send("metrics", "GET", path, sandbox_id, running=True, params=params)
        return wire.rows(Metric, response.content, "metrics", sandbox_id)

    async def logs(self, sandbox_id: str, *, limit: int = 1000) -> builtins.list[LogEntry]:
        """What happened to a sandbox, oldest first, paused or not.

        Raises:
            SandboxNotFoundError: It is gone.
        """
        path, params = "/sandboxes/{id}/logs", {"limit": str(limit)}
        return (await self._ask(Logs, "logs", "GET", path, sandbox_id, params=params)).entries

    async def snapshot(self, sandbox_id: str, *, name: str | None = None) -> SnapshotInfo:
        """Takes a snapshot of a running sandbox, which runs on; the snapshot outlives it.

        If this is cancelled or its answer is lost, there may be a snapshot that `list_snapshots` shows.

        Args:
            name: Leads to the newest snapshot that has it. None: only its id does.

        Raises:
            SandboxNotFoundError: The sandbox is gone.
            ConflictError, SandboxStateError: It is paused.
        """
        if name:
            self.dialect.require("snapshot(name)")

        more: dict[str, Any] = {"body": {"name": name} if name else {}, "idempotent": False, "deadline": LONG_REQUEST}
        path = "/sandboxes/{id}/snapshots"
        return await self._ask(SnapshotInfo, "snapshot", "POST", path, sandbox_id, running=True, **more)

    async def list_snapshots(self, *, sandbox_id: str | None = None) -> AsyncIterator[SnapshotInfo]:
        """All snapshots of this key, newest first, fetched page by page.

        Args:
            sandbox_id: Only those that were taken of this sandbox. None: all.
        """
        params = {"sandboxID": sandbox_id} if sandbox_id else {}
        async for row in self._pages("list_snapshots", "/snapshots", params, SnapshotInfo, attrgetter("snapshot_id")):
            yield row

    async def delete_snapshot(self, snapshot_id: str) -> bool:
        """Deletes a snapshot (or whatever template has this id); sandboxes made from it live on.

        Returns:
            True: deleted. False: there was none (or an attempt whose answer was lost had deleted it).
        """
        path = f"/templates/{wire.path_part('delete_snapshot', snapshot_id)}"
        return await wire.was_there(self._ask(object, "delete_snapshot", "DELETE", path))

    async def _unless_paused(self, op: str, sandbox_id: str, **more: Any) -> bool:
        left = await self._left(op, more.get("deadline"))
        try:
            await self._ask(object, op, "POST", f"/sandboxes/{{id}}/{op}", sandbox_id, **more)
        except ConflictError:
            if await self._state(op, sandbox_id, left()) != "paused":
                raise

            return False

        return True

    async def _pages(
        self, op: str, path: str, params: Mapping[str, str], kind: type[T], identify: Callable[[T], str]
    ) -> AsyncIterator[T]:
        """The rows of all pages, each once, whatever the server repeats."""
        seen: set[str] = set()
        idle = 0
        params = {"limit": "100", **params}
        while True:
            response = await self._send(op, "GET", path, params=params)
            before = len(seen)
            for row in wire.rows(kind, response.content, op):
                if (key := identify(row)) not in seen:
                    seen.add(key)
                    yield row

            token = response.headers.get("x-next-token")
            if not token:
                return

            idle = 0 if len(seen) > before else idle + 1
            if idle == IDLE_PAGES:
                msg = f"`{op}` was given page after page that bring nothing new. Check what answers at the API URL."
                raise ProtocolError(msg, op=op)

            params["nextToken"] = token

    async def _ask(
        self, kind: type[T], op: str, method: str, path: str, sandbox_id: str | None = None, **more: Any
    ) -> T:
        """As `_send`, and reads the answer; `object` is any JSON or none, but no login page of a network in between."""
        answer = (await self._send(op, method, path, sandbox_id, **more)).content
        return wire.parsed(kind, answer or b"null", op, sandbox_id)

    async def _send(
        self, op: str, method: str, path: str, sandbox_id: str | None = None, *, running: bool = False, **more: Any
    ) -> httpx.Response:
        """Sends one call to the control plane.

        Args:
            running: Whether it needs a running sandbox. The wire says 404 for a paused one too, and a caller who
                believed that would start anew.
        """
        if sandbox_id is not None:
            path = path.format(id=wire.path_part(op, sandbox_id))

        left = await self._left(op, more.get("deadline"))
        try:
            return await self.transport.send(
                Call(op=op, method=method, path=path, sandbox_id=sandbox_id, believed=not running, **more)
            )
        except NotFoundError as error:
            if not running or sandbox_id is None or await self._state(op, sandbox_id, left()) != "paused":
                raise

            msg = f"`{op}` needs a running sandbox, and {sandbox_id!r} is paused. Connect to it first."
            raise SandboxStateError(msg, op=op, sandbox_id=sandbox_id) from error

    async def _state(self, op: str, sandbox_id: str, deadline: float) -> State:
        """Looks for the sake of another verb, whose failure it is if that fails."""
        return (await self._ask(SandboxInfo, op, "GET", "/sandboxes/{id}", sandbox_id, deadline=deadline)).state

    async def _left(self, op: str, deadline: float | None) -> Callable[[], float]:
        """Tells the seconds that are left of a call's time, to which the start of a local engine does not count."""
        self.dialect.require(op)
        await self.transport.ready()
        clock = asyncio.get_running_loop().time
        end = clock() + (self.transport.request_timeout if deadline is None else deadline)
        return lambda: end - clock()

    def _own(self, info: SandboxInfo) -> SandboxInfo:
        own_id = self.dialect.sandbox_id(info.sandbox_id, info.client_id)
        if info.memory_mb:
            self._memory_mb[own_id] = info.memory_mb
            if len(self._memory_mb) > KNOWN_SIZES:
                del self._memory_mb[next(iter(self._memory_mb))]

        return info if own_id == info.sandbox_id else info.model_copy(update={"sandbox_id": own_id})
