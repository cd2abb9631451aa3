"""The snapshots that users take and make sandboxes from: named images, which outlive the sandbox they were taken of."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sandbox_tools.engine.images import snapshots
from sandbox_tools.errors import ConfigError, NotFoundError

_TAG = "default"
REFERENCE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/[A-Za-z0-9][A-Za-z0-9._-]{0,63})?(:[A-Za-z0-9._-]{1,64})?"
"""A template's or a snapshot's name: an owner's part and a tag may be with it."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a new sandbox is restored from.

    Attributes:
        name: What its listing shows as its template.
        template: The template version whose root file system the image needs.
        runsc: The pinned `runsc` that wrote the image.
        memory_mb: Memory of the machine in the image.
        memory: Whether processes come along; without, the new sandbox begins as after a reboot.
        cpu: Cores' worth of CPU time that the template gives. None: all there are.
        disk_mb: What the template lets it write to its files, in MB. None: it does not say.
    """

    name: str
    template: str
    runsc: str
    memory_mb: int
    image: Path
    memory: bool = True
    cpu: float | None = None
    disk_mb: int | None = None


class Snapshot(BaseModel):
    """What is known of one snapshot; it lies in the image's directory."""

    id: str
    name: str | None = None
    """With its tag. None: it has none."""
    sandbox_id: str
    """What it was taken of; that may be gone."""
    template: str
    runsc: str
    memory_mb: int
    memory: bool
    cpu: float | None = None
    disk_mb: int | None = None
    created_at: datetime
    size: int = 0
    """Bytes on disk; known once it is written."""
    kept: bool = False
    """Whether it is a pause of that sandbox, kept for as long as there is the sandbox, and as others don't come."""

    @property
    def reference(self) -> str:
        """What names it for good, as the wire shows it."""
        return f"{self.id}:{_TAG}"


def normalised(reference: str, op: str) -> str:
    """A template's or snapshot's name with its tag.

    Raises:
        ConfigError: It can't be one.
    """
    if not re.fullmatch(REFERENCE, reference):
        msg = f"Invalid template reference: {reference[:200]!r}. Use letters, digits, `.`, `_`, `-` and one `:tag`."
        raise ConfigError(msg, op=op)

    return reference if ":" in reference else f"{reference}:{_TAG}"


@dataclass
class _Held:
    snapshot: Snapshot
    users: int = 0
    free: asyncio.Event = field(default_factory=asyncio.Event)


class Saved:
    """The snapshots of one state directory.

    Args:
        directory: Where they are; each in a directory of its own, named by its id.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._held: dict[str, _Held] = {}

    def start(self) -> None:
        """Find what is there, and remove what crashes have left."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self.directory.iterdir():
            try:
                snapshot = self.read(path.name)
            except (OSError, ValidationError):
                shutil.rmtree(path, ignore_errors=True)
            else:
                # A half-written one has its description already, under another directory's name.
                if path.name == snapshot.id:
                    self._held[snapshot.id] = _Held(snapshot)
                else:
                    shutil.rmtree(path, ignore_errors=True)

    def read(self, snapshot_id: str) -> Snapshot:
        """What an image says of itself.

        Raises:
            OSError: There is none.
            ValueError: It can't be read.
        """
        path = self.path(snapshot_id)
        snapshot = Snapshot.model_validate_json((path / snapshots.DESCRIPTION).read_bytes())
        return snapshot.model_copy(update={"size": sum(file.stat().st_size for file in path.iterdir())})

    def path(self, snapshot_id: str) -> Path:
        """Where an image of that id is, or is to be."""
        return self.directory / snapshot_id

    def add(self, snapshot: Snapshot) -> None:
        """Know a snapshot whose image has been written."""
        self._held[snapshot.id] = _Held(snapshot)

    def all(self) -> list[Snapshot]:
        """Newest first."""
        return sorted((held.snapshot for held in self._held.values()), key=lambda each: each.created_at, reverse=True)

    def names(self, snapshot: Snapshot) -> list[str]:
        """The names that lead to it: one that a newer snapshot has taken over does not."""
        newest = next((each for each in self.all() if each.name == snapshot.name), snapshot)
        return [snapshot.name] if snapshot.name and newest.id == snapshot.id else []

    def find(self, reference: str) -> Snapshot | None:
        """The snapshot of that id or name, with or without its tag; the newest, of one name. None: there is none."""
        return next((each for each in self.all() if reference in (each.reference, each.name)), None)

    @asynccontextmanager
    async def used(self, snapshot: Snapshot) -> AsyncIterator[Origin]:
        """What new sandboxes are made from; the image stays until this is left."""
        held = self._held.get(snapshot.id)
        if held is None:
            msg = f"Snapshot {snapshot.reference!r} was deleted."
            raise NotFoundError(msg, op="create")

        held.users += 1
        try:
            yield Origin(
                name=snapshot.reference,
                template=snapshot.template,
                runsc=snapshot.runsc,
                memory_mb=snapshot.memory_mb,
                image=self.path(snapshot.id),
                memory=snapshot.memory,
                cpu=snapshot.cpu,
                disk_mb=snapshot.disk_mb,
            )
        finally:
            held.users -= 1
            if not held.users:
                held.free.set()

    async def remove(self, reference: str) -> None:
        """Delete it; sandboxes made from it don't need it any more.

        Raises:
            NotFoundError: There is none.
        """
        snapshot = self.find(reference)
        if snapshot is None:
            msg = f"Snapshot {reference!r} not found. `GET /snapshots` lists those that there are."
            raise NotFoundError(msg, op="delete")

        held = self._held.pop(snapshot.id)
        while held.users:
            held.free.clear()
            await held.free.wait()
        path = self.path(snapshot.id)
        # From here on it is gone, whatever happens: what is left of it the next start sweeps.
        (path / snapshots.DESCRIPTION).unlink(missing_ok=True)
        await asyncio.to_thread(snapshots.sync, path)
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
