"""An image of a sandbox that stands still, brought to its place on the disk; given up when somebody wants it back."""

from __future__ import annotations

import asyncio
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from sandbox_tools.engine import templates
from sandbox_tools.engine.images import snapshots
from sandbox_tools.engine.images.quota import Quota
from sandbox_tools.engine.images.store import Draft, Store
from sandbox_tools.engine.runtime import Container, Runtime

# Each fills a core and holds an image in memory: more at a time would only make each of them later.
_AT_A_TIME = max(2, min(4, os.cpu_count() or 1))


class WantedError(Exception):
    """Raised where an image was given up because its sandbox is wanted; that still stands still."""


class Writing:
    """Writes the images of one engine, a few at a time.

    Args:
        store: Where they go.
        quota: What they may take.
    """

    def __init__(self, runtime: Runtime, store: Store, quota: Quota) -> None:
        self._runtime = runtime
        self._store = store
        self._quota = quota
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._given_up: set[asyncio.Future[None]] = set()

    async def write(
        self,
        container: Container,
        final: Path,
        *,
        wanted: asyncio.Event,
        running: bool = False,
        description: str | None = None,
    ) -> snapshots.Manifest:
        """An image of a container whose tasks stand still, and do so afterwards.

        Args:
            final: Where the snapshot will be; a name that was never used before.
            running: They run, and are to stand still no sooner than its turn has come.
            wanted: Give it up as soon as this is set. What the runtime has begun it ends first.
            description: Kept with the image, as `snapshots.DESCRIPTION`. None: there is none.

        Raises:
            WantedError: It was given up; there will be nothing at `final`.
            EngineError: The runtime refuses or fails, or there is no room for it.
            OSError: The disk is full or failing.
        """
        await self._turn(wanted)
        standing = asyncio.ensure_future(self._stand(container, running=running))
        try:
            need = await asyncio.to_thread(self._runtime.image_bytes, container)
            async with self._quota.room(need):
                draft = await asyncio.to_thread(self._store.begin, final, need)
                try:
                    if wanted.is_set():
                        raise WantedError
                    sealed = await self._image(container, draft, wanted, standing)
                    if description is not None:
                        (draft.partial / snapshots.DESCRIPTION).write_text(description, encoding="utf-8")
                except BaseException:
                    await asyncio.to_thread(self._store.drop, draft)
                    raise
                finally:
                    await self._runtime.bound(container)
                return await self._commit(draft, sealed, container.binary.name, wanted)
        finally:
            self._turns.release()
            await asyncio.wait({standing})
            standing.exception()

    @property
    def busy(self) -> bool:
        """Whether another image has to wait for its turn."""
        return self._turns.locked()

    async def _stand(self, container: Container, *, running: bool) -> None:
        if running:
            await self._runtime.freeze(container)

    async def aclose(self) -> None:
        """Wait until nothing is left of what was given up."""
        await asyncio.gather(*self._given_up)

    async def _turn(self, wanted: asyncio.Event) -> None:
        turn = asyncio.ensure_future(self._turns.acquire())
        try:
            await _either(turn, wanted)
        finally:
            if not turn.done():
                turn.cancel()
        if wanted.is_set():
            if turn.done() and not turn.cancelled():
                self._turns.release()
            raise WantedError

    async def _image(
        self, container: Container, draft: Draft, wanted: asyncio.Event, standing: asyncio.Future[None]
    ) -> snapshots.Sealed | None:
        """Brought to its place while the runtime writes it, so that the disk is not idle until that has ended."""
        bringing = asyncio.ensure_future(asyncio.to_thread(self._store.bring, draft))
        try:
            await self._runtime.checkpoint(container, draft.path, after=standing)
            draft.whole.set()
            await _either(bringing, wanted)
            if wanted.is_set():
                raise WantedError
            return bringing.result()
        except BaseException:
            draft.given_up.set()
            draft.whole.set()
            await asyncio.wait({bringing})
            bringing.exception()
            raise

    async def _commit(
        self, draft: Draft, sealed: snapshots.Sealed | None, runsc: str, wanted: asyncio.Event
    ) -> snapshots.Manifest:
        """The disk takes its time, which whoever wants the sandbox does not wait for."""
        commit = partial(snapshots.commit, draft.partial, draft.final, runsc=runsc, cpu=templates.cpu(), sealed=sealed)
        committing = asyncio.ensure_future(asyncio.to_thread(commit))
        await _either(committing, wanted)
        if not wanted.is_set():
            try:
                return committing.result()
            except OSError:
                await asyncio.to_thread(self._store.drop, draft)
                raise

        leaving = asyncio.ensure_future(self._leave(committing, draft))
        self._given_up.add(leaving)
        leaving.add_done_callback(self._given_up.discard)
        raise WantedError

    async def _leave(self, committing: asyncio.Future[snapshots.Manifest], draft: Draft) -> None:
        await asyncio.wait({committing})
        committing.exception()
        await asyncio.to_thread(self._store.drop, draft)
        await asyncio.to_thread(shutil.rmtree, draft.final, ignore_errors=True)


async def _either(work: asyncio.Future[Any], wanted: asyncio.Event) -> None:
    """Until the work is done, or its outcome is not wanted any more."""
    waiting = asyncio.ensure_future(wanted.wait())
    try:
        await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
