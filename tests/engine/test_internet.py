"""The way out of a sandbox, in a network that the tests make: what it reaches, and what it never does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.attempts import Attempts
from tests.engine.internet import CLOSED, ENGINE, ENGINE_6, OTHER, SITE, SITE_6, engine_with_internet
from tests.machine import Box, EngineProcess

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: makes network namespaces for the test's internet"
)

PROXY = "http://127.0.0.1:49982"


@pytest.fixture(scope="module")
def net(templates: Path) -> Iterator[tuple[EngineProcess, Path]]:
    with engine_with_internet("--allow-internet") as net:
        yield net


@pytest.fixture
def box(net: tuple[EngineProcess, Path]) -> Iterator[Box]:
    box = net[0].create()
    yield box
    box.kill()


def get(box: Box, url: str, options: str = "") -> str:
    """What curl says, with the status behind it."""
    return Attempts(box).run(f"curl -sS -m 20 {options} '{url}' -w ' %{{http_code}}'")


def connections(engine: EngineProcess) -> int:
    """The engine's established connections to port 7000 of the internet (proc_pid_net(5))."""
    rows = [row.split() for row in Path(f"/proc/{engine.pid}/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(":1B58") and row[3] == "01" for row in rows)


def test_programs_reach_the_internet_without_being_told_how(box: Box) -> None:
    """By name and by address, IPv4 and IPv6, and through the tunnel that TLS needs."""
    assert box.info()["allowInternetAccess"] is True
    assert '"path": "/a?b=c"' in get(box, "http://site.test/a?b=c")
    assert f'"at": "{SITE_6}"' in get(box, "http://six.test/")
    assert '"host": "site.test"' in get(box, "http://site.test/", "-p")
    python = "import urllib.request\nurllib.request.urlopen('http://site.test/of-a-kernel').read()"
    assert "of-a-kernel" in box.value(python)


def test_much_goes_out_and_comes_in_unharmed(box: Box) -> None:
    said = Attempts(box).run(
        "head -c 20000000 /dev/zero >/tmp/up; curl -sS --data-binary @/tmp/up http://site.test/; echo;"
        "curl -sS http://site.test/big | sha256sum; head -c 33554432 /dev/zero | tr '\\0' x | sha256sum"
    )

    up, down, right = said.splitlines()
    assert up == "20000000"
    assert down == right


@pytest.mark.parametrize("user", ["user", "root"])
def test_what_is_not_the_internet_is_never_reached(box: Box, net: tuple[EngineProcess, Path], user: str) -> None:
    """The server answers at each of these addresses, or the engine's own host does; some are spelt oddly."""
    literal = [f"[{each}]" if ":" in each else each for each in (*CLOSED, ENGINE, ENGINE_6)]
    odd = ["127.0.0.1", "localhost", "[::1]", "[::ffff:10.1.2.3]", "0x0a010203", "167838211", "0", "[::]"]
    names = ["inner.test", "metadata.test", "own.test"]
    hosts = [*literal, *odd, *names]
    curl = f"curl -s -m 20 --noproxy '' -x {PROXY} -o /dev/null -w '%{{http_code}}%{{http_connect}} '"
    script = "; ".join(f"{curl} {how} 'http://{host}/closed'" for host in hosts for how in ("", "-p"))

    codes = Attempts(box).run(script, user).split()

    assert set(codes) <= {"403000", "000403", "502000", "000502"}, list(zip(hosts * 2, codes, strict=False))
    assert codes.count("403000") >= len(literal) + len(names)
    assert "/closed" not in net[1].read_text()


def test_of_a_name_with_several_addresses_only_the_public_ones_are_called(box: Box) -> None:
    assert SITE in get(box, "http://mixed.test/")


def test_without_the_proxy_there_is_no_network(box: Box) -> None:
    told = Attempts(box).told("socket.if_nameindex()", f"socket.create_connection(({SITE!r}, 80), 3)")

    assert list(told.values()) == ["[(1, 'lo')]", "EHOSTUNREACH"]


def test_what_cannot_be_carried_out_is_said_in_words(box: Box) -> None:
    assert "a name without an address" in get(box, "http://nowhere.test/")
    assert f"{SITE}:81 could not be called: connection refused" in get(box, f"http://{SITE}:81/")
    assert "private, local and metadata addresses are closed" in get(box, "http://inner.test/")


def test_whoever_is_not_to_reach_it_does_not(net: tuple[EngineProcess, Path]) -> None:
    closed = net[0].create(allow_internet_access=False)

    assert closed.info()["allowInternetAccess"] is False
    assert "PROXY" not in Attempts(closed).run("env").upper()
    assert get(closed, "http://site.test/forbidden", f"-x {PROXY}").endswith(" 000")
    assert "/forbidden" not in net[1].read_text()
    closed.kill()


def test_rules_of_its_own_narrow_what_a_sandbox_reaches(net: tuple[EngineProcess, Path]) -> None:
    box = net[0].create(network={"denyOut": ["0.0.0.0/0"], "allowOut": ["site.test", f"{OTHER}/32", "10.0.0.0/8"]})

    assert get(box, "http://site.test/").endswith(" 200")
    assert get(box, f"http://{OTHER}/").endswith(" 200")
    assert "denied by the rules of this sandbox" in get(box, "http://six.test/")
    assert "denied" in get(box, f"http://{SITE}/")
    assert get(box, "http://inner.test/").endswith(" 403")  # what is closed, no rule opens
    box.kill()

    with net[0].http() as http:
        answer = http.post("/sandboxes", json={"templateID": "base", "network": {"denyOut": ["site.test"]}})
    assert answer.status_code == 400
    assert "denyOut" in answer.json()["message"]


def test_copies_reach_what_their_original_did(net: tuple[EngineProcess, Path], box: Box) -> None:
    copy = box.post("fork").json()[0]["sandbox"]

    assert get(Box(net[0], copy), "http://site.test/").endswith(" 200")
    Box(net[0], copy).kill()


CONVERSATION = """
import socket
talk = socket.create_connection(("127.0.0.1", 49982))
talk.sendall(b"CONNECT site.test:7000 HTTP/1.1\\r\\n\\r\\n")
assert b" 200 " in talk.recv(1000)
talk.sendall(b"before")
assert talk.recv(100) == b"before"
"""


def test_a_freeze_keeps_a_connection_and_a_pause_breaks_it_and_leaves_nothing(box: Box) -> None:
    box.run(CONVERSATION)
    assert connections(box.engine) == 1

    assert box.post("freeze").status_code == 204
    assert box.value("talk.sendall(b'thawed'); talk.recv(100)") == "b'thawed'"

    assert box.post("pause").status_code == 204
    assert connections(box.engine) == 0
    assert box.post("connect", timeout=600).status_code == 201
    assert "ConnectionResetError" in str(box.run("talk.sendall(b'x'); talk.recv(100)"))
    assert get(box, "http://site.test/").endswith(" 200")


def test_after_a_crash_the_next_engine_lets_out_only_where_it_is_told_to(templates: Path) -> None:
    with engine_with_internet("--allow-internet") as (engine, log):
        box = engine.create()
        box.run(CONVERSATION)
        engine.kill()
        engine.start()
        assert "ConnectionResetError" in str(box.run("talk.sendall(b'x'); talk.recv(100)"))
        assert get(box, "http://site.test/").endswith(" 200")

        engine.kill()
        engine.options = ()
        engine.start()
        assert get(box, "http://site.test/too-late").endswith(" 000")
        assert "/too-late" not in log.read_text()
        box.kill()


def test_one_that_was_kept_ready_reaches_what_its_creator_asked_for(templates: Path) -> None:
    with engine_with_internet("--allow-internet", "--pool", "2") as (engine, _):
        for asked, status in ((True, " 200"), (False, " 000")):
            box = engine.create(allow_internet_access=asked)
            assert get(box, "http://site.test/", "" if asked else f"-x {PROXY}").endswith(status)
            box.kill()


def test_without_the_flag_nothing_is_let_out_whatever_is_asked_for(engine: EngineProcess) -> None:
    for asked in ({}, {"allow_internet_access": True}, {"allowInternetAccess": True}):
        box = engine.create(**asked)
        assert box.info()["allowInternetAccess"] is False
        assert "PROXY" not in Attempts(box).run("env").upper()
        assert get(box, "http://127.0.0.1/", f"-x {PROXY} --noproxy ''").endswith(" 000")
        box.kill()


ASK = """
import socket, time
hoard = []
def ask():
    one = socket.create_connection(("127.0.0.1", 49982))
    one.settimeout(20)
    one.sendall(b"CONNECT site.test:7000 HTTP/1.1\\r\\n\\r\\n")
    try:
        return one, one.recv(1000)
    except ConnectionResetError:
        return one, b"reset"
"""


def test_a_sandbox_has_so_many_connections_and_no_more_and_others_are_served(
    net: tuple[EngineProcess, Path], box: Box
) -> None:
    other = net[0].create()
    box.run(ASK)

    assert box.value("hoard += [ask() for _ in range(128)]; sum(b' 200 ' in said for _, said in hoard)") == "128"
    assert box.value("ask()[1] in (b'', b'reset')") == "True"
    assert get(other, "http://site.test/").endswith(" 200")
    box.run("[one.close() for one, _ in hoard]; time.sleep(0.5)")
    assert get(box, "http://site.test/").endswith(" 200")
    other.kill()
