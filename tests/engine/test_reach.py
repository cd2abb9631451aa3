"""The rule for addresses, and what a proxy makes of a request; both without a network."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.engine.outside import RefusedError, is_own, parse
from sandbox_tools.engine.reach import ALL_TRAFFIC, CLOSED, Address, Rules, may_reach
from sandbox_tools.errors import ConfigError

addresses = st.one_of(
    st.ip_addresses(v=4),
    st.ip_addresses(v=6),
    # Most of what is special is too small to be hit by chance.
    *(st.ip_addresses(network=each) for each in CLOSED),
    st.ip_addresses(network="2000::/3"),
)


def by_the_library(address: Address) -> bool:
    """What Python says of it, read of the same registries: a witness of its own."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return by_the_library(address.ipv4_mapped)
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_link_local)


@given(addresses)
def test_nothing_is_reached_that_is_not_global(address: Address) -> None:
    assert not may_reach(address) or by_the_library(address)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_that_is_global_is_reached(address: IPv4Address) -> None:
    special = ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")

    assert may_reach(address) or not by_the_library(address) or any(address in ip_network(each) for each in special)


@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:{}", "::{}", "64:ff9b::{}", "64:ff9b:1::{}", "fe80::{}"]))
def test_no_spelling_in_ipv6_reaches_more_than_the_address_itself(address: IPv4Address, spelling: str) -> None:
    assert not may_reach(ip_address(spelling.format(address))) or may_reach(address)


@given(st.ip_addresses(v=4))
def test_no_address_that_holds_another_one_is_reached(address: IPv4Address) -> None:
    """6to4 (RFC 3056) and Teredo (RFC 4380): a router on the way would unpack it."""
    assert not may_reach(IPv6Address((0x2002 << 112) | (int(address) << 80)))
    assert not may_reach(IPv6Address((0x20010000 << 96) | (int(address) ^ 0xFFFFFFFF)))


@pytest.mark.parametrize("public", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1", "2a00:1450::1"])
def test_the_internet_is_reached_and_this_machine_is_not_under_its_public_address(public: str) -> None:
    assert may_reach(ip_address(public))
    assert not may_reach(ip_address(public), own=lambda address: str(address) == public)
    assert not may_reach(ip_address("::ffff:8.8.8.8"), own=lambda address: str(address) == "8.8.8.8")


@pytest.mark.parametrize(
    "closed",
    [
        *("169.254.169.254", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
        *("127.0.0.1", "127.255.0.1", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1", "fe80::1", "fec0::1", "fc00::1"),
        *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.255.1", "100.64.0.1", "224.0.0.1", "255.255.255.255"),
        *("ff02::1", "2001:db8::1", "2002:a00:1::", "64:ff9b::a00:1", "198.18.0.1", "240.0.0.1"),
    ],
)
def test_it_is_closed(closed: str) -> None:
    assert not may_reach(ip_address(closed))


def test_this_machines_addresses_are_known_without_asking_anybody() -> None:
    assert is_own(ip_address("127.0.0.1"))
    assert is_own(ip_address("127.1.2.3")) or not may_reach(ip_address("127.1.2.3"))
    assert not is_own(ip_address("8.8.8.8"))


@given(
    st.lists(st.ip_addresses(v=4).map(str), max_size=3), st.lists(st.ip_addresses(v=4).map(str), max_size=3), addresses
)
def test_what_is_allowed_counts_before_what_is_denied(allow: list[str], deny: list[str], address: Address) -> None:
    rules = Rules.of({"allowOut": allow, "denyOut": deny})

    assert rules.permit("a.test", address) == (str(address) in allow or str(address) not in deny)


@given(addresses)
def test_with_all_traffic_denied_names_that_are_allowed_are_what_is_left(address: Address) -> None:
    rules = Rules.of({"allowOut": ["Site.test", "*.below.test"], "denyOut": [str(ALL_TRAFFIC)]})

    for name in ("site.test", "SITE.TEST.", "a.below.test", "a.b.below.test"):
        assert rules.permit(name, address)
    for name in ("other.test", "sub.site.test", "below.test", "xbelow.test", "site.test.evil.test"):
        assert not rules.permit(name, address)


def test_without_rules_all_passes() -> None:
    for nothing in (None, {}, {"allowOut": None, "denyOut": []}):
        assert Rules.of(nothing).permit("a.test", ip_address("8.8.8.8"))


@pytest.mark.parametrize(
    "rules", [{"denyOut": ["name.test"]}, {"allowOut": ["10.0.0.0/99"]}, {"allowOut": ["a b"]}, {"allowOut": [""]}]
)
def test_a_rule_that_says_nothing_is_refused(rules: dict[str, list[str]]) -> None:
    """A denial that was dropped would let through what somebody meant to stop."""
    with pytest.raises(ConfigError, match="network"):
        Rules.of(rules)


def test_a_request_becomes_what_its_server_understands() -> None:
    sent = (b"GET http://user:x@site.test:81/a?b=c HTTP/1.1", b"Host: site.test", b"Proxy-Authorization: x")

    asked = parse(b"\r\n".join((*sent, b"Connection: keep-alive")))

    assert (asked.host, asked.port, asked.tunnelled) == ("site.test", 81, False)
    assert asked.first == b"GET /a?b=c HTTP/1.1\r\nHost: site.test\r\nConnection: close\r\n\r\n"
    assert parse(b"GET http://site.test?b HTTP/1.1").first.startswith(b"GET /?b HTTP/1.1\r\n")
    assert parse(b"CONNECT [2606:4700::1]:443 HTTP/1.1").host == "2606:4700::1"
    assert parse(b"CONNECT site.test:443 HTTP/1.1").tunnelled


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda each: b"CONNECT " + each + b" HTTP/1.1")))
def test_whatever_is_sent_is_a_host_and_a_port_or_refused(head: bytes) -> None:
    with contextlib.suppress(RefusedError):
        asked = parse(head)
        assert 0 < asked.port < 65536
        assert asked.host


@pytest.mark.parametrize(
    "head",
    [
        *(b"", b"\r\n", b"GET / HTTP/1.1", b"GET ftp://site.test/ HTTP/1.1", b"CONNECT site.test HTTP/1.1"),
        *(b"CONNECT site.test:0 HTTP/1.1", b"CONNECT :80 HTTP/1.1", b"CONNECT a b:80 HTTP/1.1", b"PRI * HTTP/2.0"),
        b"CONNECT site.test:99999 HTTP/1.1",
    ],
)
def test_what_is_no_request_of_a_proxys_is_refused(head: bytes) -> None:
    with pytest.raises(RefusedError) as refused:
        parse(head)

    assert refused.value.status == 400
