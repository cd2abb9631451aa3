"""How E2B, PPIO, UCloud and the local engine differ, as data: the client asks here and never which provider it has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox_tools.errors import ConfigError
from sandbox_tools.models import ENVD_PORT, INTERPRETER_PORT, CreateRequest, SandboxGrant


@dataclass(frozen=True, kw_only=True)
class Price:
    """Dollars for one second of a running sandbox; a paused one is free."""

    vcpu: float
    gib: float


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where one client sends its requests, resolved from arguments and environment."""

    api_url: str
    api_key: str | None = field(default=None, repr=False)
    domain: str | None = None
    sandbox_url: str | None = None
    """One URL for the traffic of all sandboxes. None: the dialect's host rule."""
    url_named: bool = False
    """Whether somebody gave `api_url`, by argument or environment."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One provider's way of speaking E2B's protocol."""

    name: str
    key_env: str
    url_env: str
    sandbox_url_env: str | None = None
    domain_env: str | None = None
    region_env: str | None = None
    """Names a region; wins over `domain_env`."""
    region_domain: str = "{region}"
    default_domain: str | None = None
    """None: there are no domains; sandboxes are reached at the API's own URL, which is a Unix socket by default."""
    shared_domains: frozenset[str] = frozenset()
    """Domains whose sandboxes share the host `sandbox.<domain>`; elsewhere each has `<port>-<id>.<domain>`."""
    by_domain: Mapping[str, Dialect] = field(default_factory=dict)
    """Domains that speak another dialect under the same key."""

    create_path: str = "/sandboxes"
    create_without: frozenset[str] = frozenset()
    """Fields of the common body that this provider must not be sent."""
    create_with: Mapping[str, Any] = field(default_factory=dict)
    connect_path: str = "/sandboxes/{id}/connect"
    connect_with: Mapping[str, Any] = field(default_factory=dict)
    pause_body: Mapping[str, Any] | None = field(default_factory=dict)
    """None: the request has no body at all."""

    id_header: str = "E2b-Sandbox-Id"
    port_header: str = "E2b-Sandbox-Port"
    traffic_header: str = "E2B-Traffic-Access-Token"
    id_has_client: bool = False
    """Whether paths and hosts want `<sandboxID>-<clientID>`."""

    retention_days: int | None = None
    """Days a paused sandbox is kept, by the provider's documents. None: until it is killed, or unknown."""
    max_timeout: int | None = None
    """The longest timeout, in seconds, on the provider's best plan. None: no limit, or unknown."""
    price: Price | None = None
    """None: unknown, or free."""

    def create_body(self, request: CreateRequest) -> dict[str, Any]:
        """What `create` sends."""
        common = request.model_dump(by_alias=True, exclude_none=True)
        kept = {name: value for name, value in common.items() if name not in self.create_without}
        return {**kept, **self.create_with}

    def sandbox_id(self, sandbox_id: str, client_id: str) -> str:
        """The id that this provider's paths and hosts want."""
        return f"{sandbox_id}-{client_id}" if self.id_has_client and client_id else sandbox_id

    def sandbox_url(self, address: Address, grant: SandboxGrant, port: int) -> str:
        """The URL of one port of a sandbox."""
        if address.sandbox_url:
            return address.sandbox_url

        domain = grant.domain or address.domain
        if domain in self.shared_domains:
            return f"https://sandbox.{domain}"

        return f"https://{port}-{self.sandbox_id(grant.sandbox_id, grant.client_id)}.{domain}"

    def public_url(self, address: Address, grant: SandboxGrant, port: int) -> str:
        """The URL of one port of a sandbox for everybody: a host of its own, where there are domains."""
        domain = grant.domain or address.domain
        if self.default_domain is None or domain is None:
            return self.sandbox_url(address, grant, port)

        return f"https://{port}-{self.sandbox_id(grant.sandbox_id, grant.client_id)}.{domain}"

    def sandbox_headers(self, grant: SandboxGrant, port: int) -> dict[str, str]:
        """What routes a request to one port of a sandbox, and the right to use it."""
        headers = {
            self.id_header: self.sandbox_id(grant.sandbox_id, grant.client_id),
            self.port_header: str(port),
        }
        # It opens all of the sandbox, so it is no business of a server that somebody runs in there.
        if grant.envd_access_token and port in (ENVD_PORT, INTERPRETER_PORT):
            headers["X-Access-Token"] = grant.envd_access_token

        if grant.traffic_access_token:
            headers[self.traffic_header] = grant.traffic_access_token

        return headers


E2B = Dialect(
    name="e2b",
    key_env="E2B_API_KEY",
    url_env="E2B_API_URL",
    sandbox_url_env="E2B_SANDBOX_URL",
    domain_env="E2B_DOMAIN",
    default_domain="e2b.app",
    shared_domains=frozenset({"e2b.app", "e2b.dev", "e2b.pro"}),
    create_path="/v2/sandboxes",
    create_without=frozenset({"secure"}),  # v2 is always secure
    connect_path="/v2/sandboxes/{id}/connect",
    retention_days=30,
    max_timeout=24 * 3600,
    price=Price(vcpu=0.000014, gib=0.0000045),
)

_PPIO: dict[str, Any] = {
    "name": "ppio",
    "key_env": "PPIO_API_KEY",
    "url_env": "PPIO_API_URL",
    "sandbox_url_env": "PPIO_SANDBOX_URL",
    "domain_env": "PPIO_DOMAIN",
    "default_domain": "sandbox.ppio.cn",
    "id_header": "PPIO-Sandbox-Id",
    "port_header": "PPIO-Sandbox-Port",
    "retention_days": 30,
    "max_timeout": 3600,
}

PPIO_LEGACY = Dialect(
    **_PPIO,
    create_with={"secure": False, "allowInternetAccess": True},
    # Connect sets auto-pause anew here. Off, as the vendor's SDK sends it, would turn the next timeout into a kill.
    connect_with={"autoPause": True},
    # Otherwise the answer comes before the snapshot is whole, and calls fail in between.
    pause_body={"sync": True},
    id_has_client=True,
)

PPIO = Dialect(
    **_PPIO,
    create_with={"allow_internet_access": True, "autoResume": {"enabled": False}},
    pause_body=None,
    by_domain={"sandbox.ppio.cn": PPIO_LEGACY, "sandbox-test.ppio.cn": PPIO_LEGACY},
)

UCLOUD = Dialect(
    name="ucloud",
    key_env="UCLOUD_SANDBOX_API_KEY",
    url_env="UCLOUD_SANDBOX_API_URL",
    sandbox_url_env="UCLOUD_SANDBOX_URL",
    domain_env="UCLOUD_SANDBOX_DOMAIN",
    region_env="UCLOUD_SANDBOX_REGION",
    region_domain="{region}.sandbox.ucloudai.com",
    default_domain="cn-wlcb.sandbox.ucloudai.com",
    create_with={"allow_internet_access": True},
    pause_body={"memory": True},
    retention_days=30,
)

LOCAL = Dialect(name="local", key_env="SANDBOX_TOOLS_API_KEY", url_env="SANDBOX_TOOLS_API_URL")

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (E2B, PPIO, UCLOUD, LOCAL)}


def choose(
    provider: str | Dialect | None = None,
    *,
    api_key: str | None = None,
    api_url: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Dialect, Address]:
    """The dialect to speak and where; arguments win over the environment.

    Raises:
        ConfigError: No such provider, several providers' keys, a key that is missing or cannot be a header.
    """
    environ = os.environ if environ is None else environ
    dialect = provider if isinstance(provider, Dialect) else _dialect(provider, api_key, api_url, environ)
    key = api_key or environ.get(dialect.key_env) or None
    named = api_url or environ.get(dialect.url_env)
    if key is None and dialect.default_domain is not None:
        msg = f"There is no API key for {dialect.name!r}. Set `{dialect.key_env}` or pass `api_key`."
        raise ConfigError(msg)

    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        msg = f"The API key for {dialect.name!r} has blanks, line ends or non-ASCII characters in it. Copy it again."
        raise ConfigError(msg)

    domain = _domain(dialect, environ)
    url = (named or (f"https://api.{domain}" if domain else "http://localhost")).rstrip("/")
    sandbox_url = environ.get(dialect.sandbox_url_env) if dialect.sandbox_url_env else None
    if domain is None:
        sandbox_url = url

    address = Address(
        api_url=url,
        api_key=key,
        domain=domain,
        sandbox_url=sandbox_url.rstrip("/") if sandbox_url else None,
        url_named=bool(named),
    )
    return dialect.by_domain.get(domain or "", dialect), address


def _dialect(provider: str | None, api_key: str | None, api_url: str | None, environ: Mapping[str, str]) -> Dialect:
    if provider is not None:
        if provider not in DIALECTS:
            msg = f"There is no provider {provider!r}. Pass one of {', '.join(map(repr, sorted(DIALECTS)))}."
            raise ConfigError(msg)

        return DIALECTS[provider]

    set_by = {
        dialect.name: name
        for dialect in DIALECTS.values()
        for name in (dialect.url_env if dialect is LOCAL else dialect.key_env,)
        if environ.get(name)
    }
    if len(set_by) > 1:
        names = ", ".join(f"`{name}`" for name in set_by.values())
        msg = f"Several providers are configured: {names}. Pass `provider`, or unset all but one."
        raise ConfigError(msg)

    if not set_by and api_key and not api_url:
        msg = "An `api_key` alone does not say whose it is. Pass `provider` as well."
        raise ConfigError(msg)

    return DIALECTS[next(iter(set_by), LOCAL.name)]


def _domain(dialect: Dialect, environ: Mapping[str, str]) -> str | None:
    region = environ.get(dialect.region_env) if dialect.region_env else None
    if region:
        return dialect.region_domain.format(region=region)

    chosen = environ.get(dialect.domain_env) if dialect.domain_env else None
    return chosen or dialect.default_domain
