"""The keys that snapshots are sealed with: where they come from, and how one is replaced by another."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sandbox_tools.engine.images.snapshots import write_durably
from sandbox_tools.errors import ConfigError, EngineError

KEY_BYTES = 32
"""AES-256's."""

VARIABLE, COMMAND = "SANDBOX_TOOLS_SNAPSHOT_KEY", "SANDBOX_TOOLS_SNAPSHOT_KEY_COMMAND"

_COMMAND_SECONDS = 60
_NONCE_BYTES = 12


class Keyring:
    """The keys that there are: the first seals, all of them open.

    Each snapshot has a random key of its own, kept beside it under the keyring's first one; so a replaced key costs a
    small file a snapshot and no snapshot is written again.

    Args:
        keys: Of `KEY_BYTES` each, the newest first; one at least.
        source: Where they were found, for messages.
    """

    def __init__(self, keys: Sequence[bytes], source: str) -> None:
        self._keys = {_id_of(key): key for key in keys}
        self.newest = _id_of(keys[0])
        """Names the key that seals."""
        self.source = source

    @property
    def changing(self) -> bool:
        """Whether there are older keys than the one that seals."""
        return len(self._keys) > 1

    def wrap(self, key: bytes, context: str) -> str:
        """Seal a snapshot's own key under the newest; `context` names the snapshot, and no other opens with it."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = AESGCM(self._keys[self.newest]).encrypt(nonce, key, context.encode())
        return base64.b64encode(nonce + sealed).decode()

    def unwrap(self, key_id: str, wrapped: str, context: str) -> bytes:
        """A snapshot's own key.

        Args:
            key_id: Names the key that sealed it.

        Raises:
            EngineError: The key that sealed it is not here, or this was never sealed for that snapshot.
        """
        ours = self._keys.get(key_id)
        if ours is None:
            msg = (
                f"The snapshot {context!r} is sealed with key {key_id}, which is not among those in "
                f"{self.source} ({', '.join(self._keys)}). Add it there and start the engine again."
            )
            raise EngineError(msg, op="restore")

        try:
            blob = base64.b64decode(wrapped, validate=True)
            return AESGCM(ours).decrypt(blob[:_NONCE_BYTES], blob[_NONCE_BYTES:], context.encode())
        except (InvalidTag, ValueError) as error:
            msg = f"The key of the snapshot {context!r} is damaged or another snapshot's. It cannot be resumed."
            raise EngineError(msg, op="restore") from error


def load(state: Path, key_file: Path | None = None) -> Keyring:
    """The keyring of an engine: `SANDBOX_TOOLS_SNAPSHOT_KEY`, else what `SANDBOX_TOOLS_SNAPSHOT_KEY_COMMAND` prints,
    else a file; each holds keys in base64, the newest first, with blanks or line breaks between them.

    Args:
        state: The engine's state directory.
        key_file: The file. None: `snapshot.key` in the state directory. One that is missing is made, with a new key.

    Raises:
        ConfigError: What was found there is no keyring, or others than its owner may read the file.
    """
    if text := os.environ.get(VARIABLE):
        return Keyring(_parsed(text, f"`{VARIABLE}`"), f"`{VARIABLE}`")
    if command := os.environ.get(COMMAND):
        return Keyring(_parsed(_printed(command), f"what `{COMMAND}` prints"), f"what `{COMMAND}` prints")

    path = key_file or default_file(state)
    if not path.exists():
        write(path, [secrets.token_bytes(KEY_BYTES)])
    return Keyring(read(path), repr(str(path)))


def default_file(state: Path) -> Path:
    """Where keys are, unless something else is said."""
    return state / "snapshot.key"


def read(path: Path) -> list[bytes]:
    """The keys in a file. Raises as `load` does."""
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"The key file {str(path)!r} can't be read: {error}. Without it no snapshot can be resumed."
        raise ConfigError(msg, op="serve") from error
    if mode & 0o077:
        msg = f"Others may read the key file {str(path)!r}. Run `chmod 600` on it."
        raise ConfigError(msg, op="serve")

    return _parsed(text, repr(str(path)))


def write(path: Path, keys: Sequence[bytes]) -> None:
    """Make a key file, its owner's only and durably; a crash leaves the old one or the new."""
    try:
        write_durably(path, "".join(f"{base64.b64encode(key).decode()}\n" for key in keys), mode=0o600)
    except OSError as error:
        msg = f"The key file {str(path)!r} can't be written: {error.strerror}. Name another with `--key-file`."
        raise ConfigError(msg, op="serve") from error


def _parsed(text: str, source: str) -> list[bytes]:
    try:
        keys = [base64.b64decode(word, validate=True) for word in text.split()]
    except (binascii.Error, ValueError):
        keys = []
    if not keys or any(len(key) != KEY_BYTES for key in keys):
        # Never the text itself: it may be a key with a typing error.
        msg = f"{source} holds no keys. Put one there: `openssl rand -base64 {KEY_BYTES}` makes one."
        raise ConfigError(msg, op="serve")

    return list(dict.fromkeys(keys))


def _printed(command: str) -> str:
    """What a command prints; it may ask a key service, or a person on another terminal."""
    try:
        done = subprocess.run(
            shlex.split(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip()[-300:]
        msg = f"The command in `{COMMAND}` gave no key ({type(error).__name__}: {said or 'it said nothing'})."
        raise ConfigError(msg, op="serve") from error
    return done.stdout


def _id_of(key: bytes) -> str:
    return hashlib.sha256(b"sandbox-tools snapshot key" + key).hexdigest()[:8]
