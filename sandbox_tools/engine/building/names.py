"""What templates are called, and who uses them: small files beside the templates, read anew whenever they are asked."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from sandbox_tools.engine.building.builds import BUILT_IN, Recipe, is_name
from sandbox_tools.engine.images.snapshots import write_durably
from sandbox_tools.errors import EngineError, NotFoundError

USE_LOCK = "use.lock"
"""Shared by whoever makes a template or a sandbox of one; alone with it, a collection finds nothing half-done."""

MARK = "templates.used"
"""Lies in each state directory that is known to use templates: one without it is not what it was."""


class Named(BaseModel):
    """What a name means.

    Attributes:
        template: The template version.
        roots: All root file systems it was made from, the last of which it has: they make the next build quick.
    """

    template: str
    roots: list[str]
    recipe: Recipe
    built_at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class User(BaseModel):
    """A state directory that uses the templates, and what its engine makes sandboxes from by default."""

    state: Path
    template: str


class Names:
    """The names of one templates directory, whichever process gave them.

    Args:
        templates: Where the templates are.
    """

    def __init__(self, templates: Path) -> None:
        self.templates = templates
        self._directory = templates / "names"

    def give(self, named: Named) -> None:
        """Let a name mean a template from now on, durably."""
        self._directory.mkdir(parents=True, exist_ok=True)
        write_durably(self._path(named.recipe.name), named.model_dump_json(exclude_none=True))

    def find(self, name: str) -> Named | None:
        """What a name means. None: nothing, or it is a built-in template's.

        Raises:
            EngineError: It can't be read.
        """
        if not is_name(name):
            return None

        path = self._path(name)
        try:
            return Named.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            msg = f"What the template name {name!r} means can't be read ({type(error).__name__}). Build it again."
            raise EngineError(msg, op="create") from error

    def all(self) -> dict[str, Named]:
        """Every name with what it means; raises as `find` does."""
        paths = sorted(self._directory.glob("[!.]*.json"))
        found = {path.stem: self.find(path.stem) for path in paths}
        return {name: named for name, named in found.items() if named is not None}

    def every(self) -> list[str]:
        """All names that a sandbox can be made from, the built-in ones among them."""
        return sorted(BUILT_IN | {path.stem for path in self._directory.glob("[!.]*.json")})

    def take(self, name: str) -> list[str]:
        """Let a name mean nothing; sandboxes made from its template live on.

        Returns:
            The root file systems that it was made from.

        Raises:
            NotFoundError: It does not.
        """
        roots: list[str] = []
        with contextlib.suppress(EngineError):
            found = self.find(name)
            roots = found.roots if found else []
        try:
            if not is_name(name):
                raise FileNotFoundError
            self._path(name).unlink()
        except FileNotFoundError:
            own = [each for each in self.every() if each not in BUILT_IN]
            msg = f"There is no template {name!r} of your own. Those that there are: {', '.join(own) or 'none'}."
            raise NotFoundError(msg, op="delete") from None
        return roots

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"


@asynccontextmanager
async def used(templates: Path) -> AsyncIterator[None]:
    """While templates, or sandboxes of them, are made: nothing is collected meanwhile."""
    templates.mkdir(parents=True, exist_ok=True)
    lock = os.open(templates / USE_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


def enter_user(templates: Path, state: Path, template_id: str) -> None:
    """Have it known that a state directory uses the templates: what its sandboxes need is kept from now on."""
    state = state.absolute()
    entry = User(state=state, template=template_id)
    path = _entry(templates, state)
    if (state / MARK).exists() and path.exists() and path.read_text() == entry.model_dump_json():
        return

    path.parent.mkdir(parents=True, exist_ok=True)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_durably(state / MARK, f"{templates}\n")
    write_durably(path, entry.model_dump_json())


def leave_user(templates: Path, state: Path) -> None:
    """Have it known that a state directory needs no template any more."""
    _entry(templates, state.absolute()).unlink(missing_ok=True)


def users(templates: Path) -> list[User]:
    """The state directories that use the templates.

    Raises:
        OSError: One entry can't be read.
        ValidationError: The same.
    """
    return [User.model_validate_json(path.read_bytes()) for path in (templates / "users").glob("[!.]*.json")]


def _entry(templates: Path, state: Path) -> Path:
    return templates / "users" / f"{hashlib.sha256(os.fsencode(state)).hexdigest()[:16]}.json"
