"""The seam between the engine and whatever isolates: a handful of verbs on one container."""

from __future__ import annotations

import json
from asyncio import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from sandbox_tools.engine.tunnel import Pipes

ContainerState = Literal["running", "frozen", "gone"]


@dataclass(frozen=True, kw_only=True)
class Container:
    """One container as the runtime knows it.

    Attributes:
        id: Its name, unique among all containers of the runtime.
        directory: Its own directory: the OCI bundle, the pipes and what the sandbox writes to its files.
        binary: The runtime's executable. An image is restored only by the version that wrote it, so a sandbox keeps to
            one all its life.
    """

    id: str
    directory: Path
    binary: Path

    @property
    def bundle(self) -> Path:
        """The OCI bundle; `config.json` is in it."""
        return self.directory / "bundle"

    @property
    def filestore(self) -> Path:
        """Where the runtime keeps what the sandbox writes to its root file system."""
        return self.directory / "filestore"

    def memory_limit(self) -> int | None:
        """Bytes of memory that it may have. None: its bundle can't be read."""
        try:
            config = json.loads((self.bundle / "config.json").read_bytes())
            return int(config["linux"]["resources"]["memory"]["limit"])
        except (OSError, ValueError, KeyError):
            return None

    @property
    def pipes(self) -> Pipes:
        """What its standard input and output are connected to."""
        return Pipes(self.directory)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a container takes of the host, as the host sees it.

    Attributes:
        cpu_seconds: CPU time since it was made.
        memory: RAM that it holds, in bytes.
        cache: Page cache that the host holds for its files, in bytes; 0 where the host does not tell.
        disk: What it has written to its own files, in bytes on disk.
        disk_free: Bytes that the disk below has left.
    """

    cpu_seconds: float
    memory: int
    cache: int
    disk: int
    disk_free: int


class Runtime(Protocol):
    """What isolates. Every verb raises `EngineError` when the runtime refuses or fails."""

    async def create(self, container: Container) -> None:
        """Boot the container from its bundle; its pipes exist and are held open."""
        ...

    async def restore(self, container: Container, image: Path) -> None:
        """Bring the container back from an image; it runs when this returns."""
        ...

    async def checkpoint(self, container: Container, image: Path, *, after: Future[None] | None = None) -> None:
        """Write memory, processes and files into an empty directory. The tasks go on or stand still as before.

        Begun when `after` is done, and where that fails not at all; what can be made ready before, is.

        Whoever reads along finds files that grow at their ends, and nowhere else, or that come whole.

        A failure, a full disk among them, leaves the container as it was too. Either way it may have as much memory and
        disk as it likes afterwards, until `bound`: an image that lies in memory counts as the container's.
        """
        ...

    async def bound(self, container: Container) -> None:
        """Let it have as much memory and disk as its bundle says; for when what a checkpoint wrote is out of memory."""
        ...

    async def freeze(self, container: Container) -> None:
        """Stop every task, so that no CPU is used; memory stays held. One that stands still already is left alone."""
        ...

    async def thaw(self, container: Container) -> None:
        """Let the tasks of a frozen container go on; a running one is left alone."""
        ...

    async def kill(self, container: Container) -> None:
        """End the container at once and free its memory; one that is gone already is no error."""
        ...

    async def wait(self, container: Container) -> None:
        """Return when the container has ended, by whatever cause; at once if it is gone."""
        ...

    async def state(self, container: Container) -> ContainerState:
        """What the container is doing now."""
        ...

    async def settle(self) -> None:
        """Wait for verbs that an engine which died has left running."""
        ...

    def known(self) -> list[str]:
        """The ids of all containers there are records of, dead ones included."""
        ...

    def resident_bytes(self, container: Container) -> int:
        """RAM that the container holds on the host now; 0 if it is gone."""
        ...

    def image_bytes(self, container: Container) -> int:
        """Bytes that an image of the container may have, had it one now; 0 if it is gone."""
        ...

    def usage(self, container: Container) -> Usage | None:
        """What the container takes of the host, asked of the host alone; None if it is gone."""
        ...

    async def aclose(self) -> None:
        """Wait for what goes on behind answered verbs."""
        ...
