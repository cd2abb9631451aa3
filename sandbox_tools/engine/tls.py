"""TLS for the engine's own address: a certificate authority of this state directory, and what it certifies."""

from __future__ import annotations

import ipaddress
import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from sandbox_tools.engine.images.snapshots import write_durably
from sandbox_tools.errors import ConfigError

VALID = timedelta(days=365)
"""How long a server's certificate is good; some clients take none that is good for longer than about 400 days."""

RENEWED = timedelta(days=30)
"""How long before its end it is replaced."""

_OWNER = "sandbox-tools"


def names_of(host: str, domain: str | None) -> list[str]:
    """The host names and addresses that the server is certified for.

    Args:
        host: Where it listens.
        domain: What create and connect answer; what precedes an `@` in it is no part of the name. None: nothing.
    """
    named = (domain or "").rpartition("@")[2]
    bare = named.removeprefix("[").partition("]")[0] if named.startswith("[") else named.partition(":")[0]
    # Not everybody takes a wildcard directly under a top-level name: OpenSSL doesn't.
    names = ["localhost", "*.localhost", "127.0.0.1", "::1", host.strip("[]"), bare]
    names += [f"*.{bare}"] if bare and not _is_ip(bare) else []
    return [name for name in dict.fromkeys(names) if name]


class Certificates:
    """The authority, made once and kept, and the server's certificate, which lives in memory only.

    Args:
        directory: Where the authority is kept: `ca.pem`, which clients are given, and `ca.key`, which is its owner's.
        names: What the server is certified for.

    Raises:
        ConfigError: The directory can't be used, or what is in it is no authority.
    """

    def __init__(self, directory: Path, names: list[str], *, now: datetime | None = None) -> None:
        self.ca_path = directory / "ca.pem"
        self._names = names
        try:
            self._ca = _authority(directory)
        except (OSError, ValueError) as error:
            msg = f"The certificate authority in {str(directory)!r} can't be used: {error}. Remove it for a new one."
            raise ConfigError(msg, op="serve") from error
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self.end = datetime.min.replace(tzinfo=UTC)
        self.renew(now or datetime.now(UTC))

    def renew(self, now: datetime) -> bool:
        """Replace the server's certificate if its end is near, for all connections from now on; whether it was."""
        if self.end - now > RENEWED:
            return False

        # In force since long ago: a client's clock may be behind.
        leaf = self._ca.issue_cert(*self._names, organization_name=_OWNER, not_after=now + VALID)
        leaf.configure_cert(self.context)
        self.end = now + VALID
        return True


def _authority(directory: Path) -> trustme.CA:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificate, key = directory / "ca.pem", directory / "ca.key"
    if certificate.exists() and key.exists():
        return trustme.CA.from_pem(certificate.read_bytes(), key.read_bytes())

    made = trustme.CA(path_length=0, organization_name=_OWNER, organization_unit_name="local certificate authority")
    before = os.umask(0o077)
    try:
        # The certificate comes last: where it is, its key is.
        certificate.unlink(missing_ok=True)
        write_durably(key, made.private_key_pem.bytes().decode())
        write_durably(certificate, made.cert_pem.bytes().decode())
    finally:
        os.umask(before)
    return made


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
