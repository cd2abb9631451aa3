"""A recorder behind every host of the providers, with certificates that a client trusts as it would any."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme

from tests.client.contract.places import PLACES
from tests.client.contract.recorder import Recorder
from tests.client.contract.service import well


@dataclass(frozen=True, kw_only=True)
class Trust:
    """An authority of the tests' own, and a server's side of it."""

    authority: Path
    """PEM."""
    server: ssl.SSLContext


@pytest.fixture(scope="session")
def trust() -> Iterator[Trust]:
    """Made once: keys take time."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    names = {"127.0.0.1", "*.other.example", "*.e2b.dev", *(n for place in PLACES.values() for n in place.certified())}
    authority.issue_cert(*sorted(names)).configure_cert(server)
    server.sni_callback = lambda asked, name, _: setattr(asked, "server_name_asked", name)
    with tempfile.NamedTemporaryFile(suffix=".pem") as pem:
        authority.cert_pem.write_to_path(pem.name)
        yield Trust(authority=Path(pem.name), server=server)


@pytest.fixture
async def recorder(trust: Trust, state: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Recorder]:
    """A service that is well; every name leads to it, and what nobody expected fails the test."""
    recorder = Recorder()
    well(recorder)
    monkeypatch.setenv("SSL_CERT_FILE", str(trust.authority))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)

    connect = anyio.connect_tcp

    async def resolved(host: str, port: int, **options: Any) -> Any:
        # As a resolver would that gives one address for all names; the names stay in `Host` and in TLS.
        ports = {443: recorder.tls_port, 80: recorder.port}
        return await connect("127.0.0.1", ports.get(port, port), **options)

    async with recorder.serving(trust.server, state / "engine.sock"):
        monkeypatch.setattr(
            anyio, "connect_tcp", lambda remote_host, remote_port, **o: resolved(remote_host, remote_port, **o)
        )
        yield recorder

    assert not recorder.unexpected
