"""From one key to the next: every snapshot's own key is put under the newest, and no snapshot is written again."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sandbox_tools.engine.exclusive import AlreadyRunningError, sole_engine
from sandbox_tools.engine.images import keys
from sandbox_tools.engine.images.keys import Keyring
from sandbox_tools.engine.images.store import Store
from sandbox_tools.errors import ConfigError, EngineError


@dataclass(frozen=True, kw_only=True)
class Rotated:
    """What came of it."""

    key_id: str
    """Names the key that is the only one now."""
    moved: int
    """Snapshots that were put under it."""
    lost: tuple[str, ...]
    """Those that are under a key which was not here before either."""


def rotate(state: Path, key_file: Path | None, on_step: Callable[[int, int], None] = lambda done, of: None) -> Rotated:
    """Make a new key in the key file, put everything under it, and forget the old ones.

    Whatever it dies of, at every moment each snapshot's key is in the file, and the next call ends what was begun.

    Args:
        state: The engine's state directory; no engine may run on it.
        key_file: None: that of the state directory.
        on_step: Told how many snapshots were looked at, of how many.

    Raises:
        ConfigError: An engine runs, or the keys do not come from a file, or can't be read or written.
        OSError: The disk is full or failing.
    """
    for variable in (keys.VARIABLE, keys.COMMAND):
        if os.environ.get(variable):
            msg = f"The keys come from `{variable}`. Put a new one before the others there, and start the engine again."
            raise ConfigError(msg, op="rotate")

    path = key_file or keys.default_file(state)
    try:
        with sole_engine(state):
            every = [secrets.token_bytes(keys.KEY_BYTES), *(keys.read(path) if path.exists() else ())]
            keys.write(path, every)
            ring = Keyring(every, repr(str(path)))
            moved, lost = move_all(state, Store(ring), on_step)
            keys.write(path, every[:1])
    except AlreadyRunningError as error:
        msg = f"An engine runs on {str(state)!r}. Stop it first (SIGTERM: it pauses what runs), and try again."
        raise ConfigError(msg, op="rotate") from error
    return Rotated(key_id=ring.newest, moved=moved, lost=tuple(lost))


def move_all(
    state: Path, store: Store, on_step: Callable[[int, int], None] = lambda done, of: None
) -> tuple[int, list[str]]:
    """Put every snapshot of a state directory under the newest key: how many were, and those whose key is not here."""
    snapshots = [*(state / "snapshots").glob("*/*"), *(state / "saved").glob("*")]
    moved, lost = 0, []
    for number, snapshot in enumerate(snapshots, 1):
        try:
            moved += store.rewrap(snapshot)
        except EngineError:
            lost.append(f"{snapshot.parent.name}/{snapshot.name}")
        on_step(number, len(snapshots))
    return moved, lost
