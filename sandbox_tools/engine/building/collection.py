"""Removes images, root file systems, guests and pinned `runsc`s that nothing needs any more.

A sandbox must never lose its template. So a collection takes the place of all who make anything (`names.used`), looks
into every state directory that uses the templates, and does nothing at all if one of them can't be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sandbox_tools.engine import templates
from sandbox_tools.engine.building import names
from sandbox_tools.engine.building.roots import find_root, remove_tree
from sandbox_tools.engine.images import snapshots
from sandbox_tools.engine.records import RECORD
from sandbox_tools.errors import SandboxError

YOUNG = 3600.0
"""Seconds for which what no image was made with yet is kept: another release of this package may be making one."""

PATIENCE = 10.0
"""Seconds that whoever makes something is waited for."""

_DOOMED = ".doomed-"
_KINDS = ("images", "roots", "guests", "runsc")
_PARTS = {"roots": "root", "guests": "guest", "runsc": "runsc"}


@dataclass(kw_only=True)
class Collected:
    """What came of a collection.

    Attributes:
        removed: By kind, such as `images/0123456789abcdef`.
        freed: Bytes on disk.
        skipped: Why nothing was removed, and what to do. None: it was gone through.
    """

    removed: list[str] = field(default_factory=list)
    freed: int = 0
    skipped: str | None = None


class _UnreadableError(Exception):
    """Raised where it can't be known what is needed; the text says why."""


async def collect(directory: Path, *, dropped: Collection[str] = ()) -> Collected:
    """Remove what no name, no sandbox, no snapshot and no engine needs, in the state directories that are known.

    What an earlier release of this package has made is kept, as it does not say who uses it.

    Args:
        directory: The templates directory.
        dropped: Root file systems of names that were just taken away: they need not be `YOUNG` seconds old.
    """
    try:
        async with _alone(directory):
            doomed = await asyncio.to_thread(_doom, directory, dropped)
    except _UnreadableError as error:
        return Collected(skipped=str(error))

    freed = await asyncio.to_thread(_size, doomed)
    for path in doomed:
        await asyncio.to_thread(remove_tree if path.is_dir() else Path.unlink, path)
    return Collected(removed=[f"{path.parent.name}/{path.name.removeprefix(_DOOMED)}" for path in doomed], freed=freed)


def forget(directory: Path, state: Path) -> bool:
    """Have it known that a state directory is gone for good; whether it was known at all."""
    known = any(user.state == state.absolute() for user in names.users(directory))
    names.leave_user(directory, state)
    return known


@contextlib.asynccontextmanager
async def _alone(directory: Path) -> AsyncIterator[None]:
    """Nobody makes a template, or a sandbox of one, meanwhile."""
    if not directory.is_dir():
        msg = f"There are no templates in {str(directory)!r}."
        raise _UnreadableError(msg)
    with contextlib.ExitStack() as held:
        # An earlier release knows the second lock only. It is asked for and not waited for while the first is held: who
        # makes a sandbox waits for that.
        for name, patience in ((names.USE_LOCK, PATIENCE), ("images.lock", 0.0)):
            lock = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            held.callback(os.close, lock)
            if not await _locked(lock, patience):
                msg = "A template or a sandbox is being made just now. Try again afterwards."
                raise _UnreadableError(msg)
        yield


async def _locked(lock: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.05)


def _doom(directory: Path, dropped: Collection[str]) -> list[Path]:
    """Take what nothing needs out of the way, at once; it only has to be deleted then."""
    facts = {path.name: _facts(path) for path in _listed(directory / "images")}
    images = _needed_images(directory, facts)
    gone = {each for each, known in facts.items() if each not in images and "recipe" in known}
    kept = [known for each, known in facts.items() if each not in gone]
    needed: dict[str, set[str]] = {"images": set(facts) - gone}
    for kind, part in _PARTS.items():
        needed[kind] = {str(known[part]) for known in kept}
    needed["roots"] |= {root for named in _names(directory) for root in named.roots}
    needed["runsc"] |= {str(record["runsc"]) for user in _states(directory) for record in _records(user)}
    with contextlib.suppress(SandboxError):  # where the release is unknown nothing is built either
        if (standard := find_root(directory)) is not None:
            needed["roots"].add(standard.name)
    needed["guests"].add(templates.guest_digest())

    doomed = [path for kind in _KINDS for path in (directory / kind).glob(f"{_DOOMED}*")]
    for kind in _KINDS:
        released = {str(facts[each][_PARTS[kind]]) for each in gone} if kind in _PARTS else set()
        released |= set(dropped) if kind == "roots" else set()
        for path in _listed(directory / kind):
            # The time of the last change of the entry itself: what is unpacked may bring old times along.
            young = time.time() - path.lstat().st_ctime < YOUNG
            if path.name in needed[kind] or (kind != "images" and young and path.name not in released):
                continue
            out = path.with_name(_DOOMED + path.name)
            path.rename(out)
            doomed.append(out)
    return doomed


def _needed_images(directory: Path, facts: dict[str, dict[str, Any]]) -> set[str]:
    needed = {named.template for named in _names(directory)}
    for state in _states(directory):
        needed |= {str(record["template"]) for record in _records(state)}
    needed |= {user.template for user in _users(directory)}
    # What an engine of this release starts with, unless it is told otherwise: then it says so itself.
    with contextlib.suppress(SandboxError):
        standard = find_root(directory)
        for each, known in facts.items():
            if (
                standard is not None
                and known["root"] == standard.name
                and known["guest"] == templates.guest_digest()
                and known["memory_mb"] == templates.DEFAULT_MEMORY_MB
                and not known.keys() & {"start", "ready", "cpu", "disk_mb"}
            ):
                needed.add(each)
    return needed


def _names(directory: Path) -> list[names.Named]:
    try:
        return list(names.Names(directory).all().values())
    except SandboxError as error:
        raise _UnreadableError(error.message) from error


def _users(directory: Path) -> list[names.User]:
    try:
        return names.users(directory)
    except (OSError, ValidationError) as error:
        msg = f"Who uses the templates can't be read ({error}). Repair {str(directory / 'users')!r}."
        raise _UnreadableError(msg) from error


def _states(directory: Path) -> list[Path]:
    """Every state directory that may need a template; each is there, and is what it was."""
    found = {user.state for user in _users(directory)}
    missing = sorted(str(state) for state in found if not (state / names.MARK).is_file())
    if missing:
        msg = (
            f"These state directories use the templates and can't be read: {', '.join(missing)}. Mount one that is "
            "only away; start the engine of one that was moved where it is now; and say of what is gone for good "
            "`sandbox-tools template prune --forget DIR`."
        )
        raise _UnreadableError(msg)
    # Where the templates lie in a state directory, that is one, whatever else is known.
    return sorted(found | ({directory.parent} if (directory.parent / "sandboxes").exists() else set()))


def _records(state: Path) -> Iterator[dict[str, Any]]:
    """What the sandboxes and snapshots of a state directory say of themselves."""
    for kind, name in (("sandboxes", RECORD), ("saved", snapshots.DESCRIPTION)):
        try:
            entries = sorted((state / kind).iterdir())
        except FileNotFoundError:
            continue
        except OSError as error:
            msg = f"{str(state / kind)!r} can't be read ({error.strerror}). Collect as the user whose it is."
            raise _UnreadableError(msg) from error
        for entry in entries:
            path = entry / name
            try:
                record = json.loads(path.read_bytes())
                record["template"], record["runsc"]
            except (FileNotFoundError, NotADirectoryError):
                continue  # left by a crash, for the next engine to sweep
            except (OSError, ValueError, KeyError, TypeError) as error:
                msg = f"{str(path)!r} can't be read ({type(error).__name__}), so what it needs is unknown."
                raise _UnreadableError(msg) from error
            yield record


def _facts(image: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((image / "template.json").read_bytes())
        for part in _PARTS.values():
            facts[part]
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"The template in {str(image)!r} can't be read ({type(error).__name__}), so what it needs is unknown."
        raise _UnreadableError(msg) from error
    return facts


def _listed(directory: Path) -> list[Path]:
    return [path for path in directory.glob("[!.]*") if not path.is_symlink()]


def _size(paths: Iterable[Path]) -> int:
    """Bytes on disk that go with them: a file that has another name elsewhere frees nothing."""
    links: dict[tuple[int, int], int] = {}
    freed = 0
    for path in paths:
        for parent, directories, files in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
            for name in (*directories, *files):
                status = os.lstat(os.path.join(parent, name))
                key = (status.st_dev, status.st_ino)
                links[key] = links.get(key, 0) + 1
                if links[key] == status.st_nlink or name in directories:
                    freed += status.st_blocks * 512
    return freed
