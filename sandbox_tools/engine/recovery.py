"""What to do with what an earlier engine, or its crash, has left."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.images.snapshots import DESCRIPTION
from sandbox_tools.engine.lifecycle import Lifecycle
from sandbox_tools.engine.records import Record
from sandbox_tools.engine.runtime import Container

log = logging.getLogger(__name__)

LOST = "it ended while no engine was there to watch it, or the machine was restarted"


def find(lifecycle: Lifecycle) -> dict[str, Entry]:
    """The sandboxes that have a record, by id."""
    for directory in (lifecycle.sandboxes, lifecycle.snapshots):
        # What sandboxes hold in memory lies here: it is their owner's only.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    records = [record for each in lifecycle.sandboxes.iterdir() if (record := Record.load(each)) is not None]
    return {record.id: Entry(record, record.state) for record in records}


def unsettled(lifecycle: Lifecycle, entries: Collection[Entry]) -> list[Entry]:
    """Those that run, and those that sleep and have something left of their last run: an engine keeps thousands that
    have nothing, and starts quickly all the same."""
    known = set(lifecycle.runtime.known())

    def left(entry: Entry) -> bool:
        container = lifecycle.container(entry)
        return entry.phase != "paused" or container.id in known or container.directory.exists()

    return [entry for entry in entries if left(entry)]


async def take_over(lifecycle: Lifecycle, entry: Entry) -> bool:
    """Adopt a sandbox that runs, and let one that sleeps or stands still do so. False: it was running and is lost."""
    if entry.phase == "paused":
        # The earlier engine may have died after the snapshot was the truth and before the container was gone.
        await lifecycle.drop_run(entry)
        return True

    # One that stands still without having been told to is in the middle of a pause or snapshot that came to nothing.
    if entry.record.frozen and await lifecycle.keep(entry):
        return True

    if await lifecycle.adopt(entry):
        return True

    log.error("Sandbox %s is lost: %s", entry.record.id, LOST)
    return False


async def sweep(lifecycle: Lifecycle, entries: Collection[Entry], binary: Path) -> None:
    """Remove what no record speaks of: containers, directories and half-written snapshots.

    Args:
        binary: The `runsc` to end with what nobody knows.
    """
    running = {lifecycle.container(entry).id for entry in entries if entry.phase == "running"}
    for container_id in lifecycle.runtime.known():
        if container_id not in running:
            sandbox_id, _, run = container_id.rpartition("-")
            directory = lifecycle.sandboxes / sandbox_id / f"run-{run}"
            await lifecycle.runtime.kill(Container(id=container_id, directory=directory, binary=binary))
    await asyncio.to_thread(_sweep_files, lifecycle, entries)


def _sweep_files(lifecycle: Lifecycle, entries: Collection[Entry]) -> None:
    known = {entry.record.id for entry in entries}
    for parent in (lifecycle.sandboxes, lifecycle.snapshots):
        for name in os.listdir(parent):
            if name not in known:
                shutil.rmtree(parent / name, ignore_errors=True)
    for entry in entries:
        # Half-written ones, and whole ones that a crash has kept from becoming the truth, or from being removed after.
        needed = entry.record.snapshot if entry.record.state == "paused" else None
        place = lifecycle.snapshots / entry.record.id
        for name in os.listdir(place) if place.exists() else ():
            path = place / name
            if name != needed and entry.record.state == "running" and (path / DESCRIPTION).exists():
                # It says that it is to be kept, and its sandbox runs on: only its move is missing.
                lifecycle.history.move(path)
            elif name != needed:
                shutil.rmtree(path, ignore_errors=True)
