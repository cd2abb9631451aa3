"""Which addresses a sandbox may reach: decided here, in pure functions, and nowhere else.

Sources: IANA's special-purpose address registries (RFC 6890, updated 2025) for IPv4 and IPv6, and the addresses under
which clouds serve their metadata: 169.254.169.254 (most), 100.100.100.200 (Alibaba), 168.63.129.16 (Azure, a public
address that leads to the host), 192.0.0.192 (Oracle), fd00:ec2::254 (AWS), fd20:ce::254 (Google).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from sandbox_tools.errors import ConfigError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

CLOSED = tuple(
    IPv4Network(each)
    for each in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' shared space
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",  # link-local
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",  # documentation, as are 198.51.100 and 203.0.113
        "192.88.99.0/24",  # into 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
)

# All else of IPv6 is loopback, local, multicast, a way to say an IPv4 address, or not in use.
_OPEN_6 = IPv6Network("2000::/3")

CLOSED_6 = tuple(
    IPv6Network(each)
    for each in (
        "2001::/23",  # protocols, Teredo among them, which holds IPv4 addresses
        "2001:db8::/32",  # documentation, as is 3fff
        "2002::/16",  # 6to4, which holds IPv4 addresses
        "3fff::/20",
    )
)

ALL_TRAFFIC = IPv4Network("0.0.0.0/0")
"""Means IPv6 too, as in E2B's SDKs."""


def may_reach(address: Address, *, own: Callable[[Address], bool] = lambda _: False) -> bool:
    """Whether an address is one of the internet's, and not of this machine or a network around it.

    Args:
        own: Says of an address whether it is this machine's.
    """
    if isinstance(address, IPv6Address):
        # `::ffff:10.0.0.1` is 10.0.0.1 to the kernel.
        if address.ipv4_mapped is not None:
            return may_reach(address.ipv4_mapped, own=own)
        public = address in _OPEN_6 and not any(address in each for each in CLOSED_6)
    else:
        public = not any(address in each for each in CLOSED)
    return public and not own(address)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a sandbox's creator allows and denies beyond that, as E2B's `network` has it: what is allowed counts first.

    Attributes:
        hosts: Names that are allowed; `*.` in front means all below.
    """

    allowed: tuple[Network, ...] = ()
    hosts: tuple[str, ...] = ()
    denied: tuple[Network, ...] = ()

    @classmethod
    def of(cls, network: Mapping[str, Any] | None) -> Rules:
        """The rules in a create's `network`. None: there are none.

        Raises:
            ConfigError: One is neither an address nor a network, nor, where it allows, a name.
        """
        given = network or {}
        allowed: list[Network] = []
        hosts: list[str] = []
        for each in given.get("allowOut") or ():
            try:
                allowed.append(ip_network(each, strict=False))
            except ValueError:
                if not _is_name(each):
                    raise _bad("allowOut", each, "an address, a network or a host's name") from None
                hosts.append(each.lower().rstrip("."))
        try:
            denied = [ip_network(each, strict=False) for each in given.get("denyOut") or ()]
        except ValueError as error:
            raise _bad("denyOut", str(error), "an address or a network") from None
        return cls(allowed=tuple(allowed), hosts=tuple(hosts), denied=tuple(denied))

    def permit(self, host: str, address: Address) -> bool:
        """Whether they let a call for `host`, which is at that address, pass."""
        name = host.lower().rstrip(".")
        if any(name == each or (each.startswith("*.") and name.endswith(each[1:])) for each in self.hosts):
            return True
        if any(_within(address, each) for each in self.allowed):
            return True
        return not any(_within(address, each) for each in self.denied)


def _within(address: Address, network: Network) -> bool:
    return network == ALL_TRAFFIC or address in network


def _is_name(text: str) -> bool:
    labels = text.removeprefix("*.").rstrip(".").split(".")
    return all(label and label.replace("-", "").isalnum() for label in labels) and not labels[-1].isdigit()


def _bad(field: str, what: str, wanted: str) -> ConfigError:
    msg = f"`network.{field}` has {what!r}, which is not {wanted}. Correct it, or leave it out."
    return ConfigError(msg, op="create")


def parsed(text: str) -> Address | None:
    """The address that a text is; None for a name."""
    try:
        return ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return None
