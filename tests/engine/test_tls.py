"""TLS on the engine's own address, as clients use it that can speak nothing else."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import ssl
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from sandbox_tools.engine.tls import RENEWED, VALID, Certificates, names_of
from sandbox_tools.errors import ConfigError
from tests.conftest import own_state
from tests.engine.servers import APPLICATION
from tests.machine import PATIENCE, Box, EngineProcess

KEY = "e2b_secret"
NOW = datetime(2026, 11, 25, tzinfo=UTC)


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        return first.getsockname()[1], second.getsockname()[1]


class Tcp(EngineProcess):
    """An engine on two TCP ports, one of them with TLS."""

    def __init__(self, state: Path, *options: str) -> None:
        self.plain, self.tls = free_ports()
        ports = ("--host", "127.0.0.1", "--port", str(self.plain), "--tls-port", str(self.tls))
        super().__init__(state, options=(*ports, "--api-key", KEY, *options))

    def http(self) -> httpx.Client:
        base = f"http://127.0.0.1:{self.plain}"
        return httpx.Client(base_url=base, headers={"X-API-KEY": KEY}, timeout=PATIENCE, trust_env=False)

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.state / "tls" / "ca.pem")

    def https(self) -> httpx.Client:
        return httpx.Client(timeout=PATIENCE, verify=self.trust(), trust_env=False)


@pytest.fixture(scope="module")
def tcp(templates: Path) -> Iterator[Tcp]:
    with own_state() as state:
        engine = Tcp(state).start()
        yield engine
        engine.clear()
        assert engine.stop() == 0
        assert engine.containers() == []


def test_both_addresses_and_the_authority_are_said(tcp: Tcp) -> None:
    assert f"Listening on http://127.0.0.1:{tcp.plain}" in tcp.log()
    assert f"Listening on https://127.0.0.1:{tcp.tls}" in tcp.log()
    assert f"Certificate authority: {tcp.state / 'tls' / 'ca.pem'}" in tcp.log()


def test_the_authoritys_key_is_its_owners_only(tcp: Tcp) -> None:
    assert stat.S_IMODE((tcp.state / "tls").stat().st_mode) == 0o700
    assert stat.S_IMODE((tcp.state / "tls" / "ca.key").stat().st_mode) == 0o600
    assert sorted(os.listdir(tcp.state / "tls")) == ["ca.key", "ca.pem"]


def test_with_the_authority_alone_a_client_trusts_every_name_of_the_engine(tcp: Tcp) -> None:
    for name in ("127.0.0.1", "localhost"):
        with socket.create_connection(("127.0.0.1", tcp.tls)) as plain:
            with tcp.trust().wrap_socket(plain, server_hostname=name) as connection:
                assert connection.version() in ("TLSv1.2", "TLSv1.3")
    with pytest.raises(ssl.SSLCertVerificationError), socket.create_connection(("127.0.0.1", tcp.tls)) as plain:
        tcp.trust().wrap_socket(plain, server_hostname="example.com")


def test_the_control_plane_needs_the_key_and_the_traffic_of_a_sandbox_its_own(tcp: Tcp) -> None:
    base = f"https://127.0.0.1:{tcp.tls}"
    with tcp.https() as https:
        assert https.get(f"{base}/health").status_code == 200
        assert https.get(f"{base}/v2/sandboxes").status_code == 401
        assert https.get(f"{base}/v2/sandboxes", headers={"X-API-KEY": KEY}).json() == []


def test_code_runs_through_the_domain_that_create_answers(tcp: Tcp) -> None:
    """All that PPIO's SDK has for `run_code`: `https://49999-<id>.<domain>`, whose `@` makes a user name of the id."""
    with tcp.http() as http:
        grant = http.post("/sandboxes", json={"templateID": "base", "timeout": 600}).json()
    assert grant["domain"] == f"sbx@127.0.0.1:{tcp.tls}"

    code = {"code": "6 * 7", "context_id": None, "language": None, "env_vars": None}
    url = f"https://49999-{grant['sandboxID']}.{grant['domain']}"
    with tcp.https() as https:
        answer = https.post(f"{url}/execute", json=code, headers={"X-Access-Token": grant["envdAccessToken"]})
        assert https.post(f"{url}/execute", json=code).status_code == 401

    events = [json.loads(line) for line in answer.text.splitlines()]
    assert [event["text"] for event in events if event["type"] == "result"] == ["42"]

    box = Box(tcp, grant)
    assert box.post("pause").status_code == 204
    with tcp.http() as http:
        woken = http.post(f"/sandboxes/{box.id}/connect", json={"timeout": 600})
    assert (woken.status_code, woken.json()["domain"]) == (201, grant["domain"])
    box.kill()


def test_websockets_and_large_bodies_go_through_tls_too(tcp: Tcp) -> None:
    box = tcp.create()
    box.run(APPLICATION)
    user = base64.b64encode(f"8002-{box.id}.sbx:".encode()).decode()
    uri = f"wss://127.0.0.1:{tcp.tls}/talk"
    with connect(uri, ssl=tcp.trust(), additional_headers={"Authorization": f"Basic {user}"}, proxy=None) as talk:
        talk.send("hello")
        assert talk.recv(PATIENCE) == "hello"
    with tcp.https() as https:
        url = f"https://8000-{box.id}.sbx@127.0.0.1:{tcp.tls}"
        assert https.post(f"{url}/digest", content=bytes(8 << 20)).json()["bytes"] == 8 << 20
        assert len(https.get(f"{url}/blob/8").content) == 8 << 20
    box.kill()


def test_a_domain_of_ones_own_is_answered_and_certified(templates: Path) -> None:
    with own_state() as state:
        engine = Tcp(state, "--domain", "box.test").start()
        try:
            box = engine.create()
            with engine.http() as http:
                grant = http.post(f"/sandboxes/{box.id}/connect", json={"timeout": 600}).json()
            assert grant["domain"] == "box.test"
            with socket.create_connection(("127.0.0.1", engine.tls)) as plain:
                with engine.trust().wrap_socket(plain, server_hostname=f"49983-{box.id}.box.test") as connection:
                    connection.sendall(f"GET /health HTTP/1.1\r\nHost: 49983-{box.id}.box.test\r\n\r\n".encode())
                    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 204")
        finally:
            engine.clear()
            assert engine.stop() == 0


def test_the_authority_stays_the_same_and_the_certificate_is_renewed_before_its_end(tmp_path: Path) -> None:
    first = Certificates(tmp_path / "tls", ["localhost"], now=NOW)
    authority = first.ca_path.read_bytes()

    assert first.end == NOW + VALID
    assert not first.renew(NOW + VALID - RENEWED - timedelta(seconds=1))
    assert first.renew(NOW + VALID - RENEWED)
    assert first.end == NOW + 2 * VALID - RENEWED
    assert Certificates(tmp_path / "tls", ["localhost"]).ca_path.read_bytes() == authority


def test_half_an_authority_is_made_anew_and_a_broken_one_is_said(tmp_path: Path) -> None:
    Certificates(tmp_path / "tls", ["localhost"])
    (tmp_path / "tls" / "ca.pem").unlink()
    Certificates(tmp_path / "tls", ["localhost"])
    assert re.search(rb"BEGIN CERTIFICATE", (tmp_path / "tls" / "ca.pem").read_bytes())

    (tmp_path / "tls" / "ca.key").write_text("nonsense")
    with pytest.raises(ConfigError, match="Remove it"):
        Certificates(tmp_path / "tls", ["localhost"])


@pytest.mark.parametrize(
    ("host", "domain", "more"),
    [
        ("127.0.0.1", None, []),
        ("10.0.0.7", "sbx@10.0.0.7:8443", ["10.0.0.7"]),
        ("[::1]", "sbx@[::1]:8443", []),
        ("box", "box.test", ["box", "box.test", "*.box.test"]),
        ("127.0.0.1", "box.test:8443", ["box.test", "*.box.test"]),
    ],
)
def test_the_names_are_those_that_clients_call(host: str, domain: str | None, more: list[str]) -> None:
    assert names_of(host, domain) == ["localhost", "*.localhost", "127.0.0.1", "::1", *more]
