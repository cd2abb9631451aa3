"""How the providers and the local engine differ, as data: the client asks here and never which provider it has."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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
    scheme: str = "https"
    """How the hosts of the domain are spoken to."""
    sandbox_url: str | None = None
    """One URL for the traffic of all sandboxes. None: the dialect's host rule."""
    url_named: bool = False
    """Whether somebody gave `api_url`, by argument or environment."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One provider's way of speaking E2B's protocol."""

    name: str
    key_env: tuple[str, ...]
    """The names under which the environment may hold the key."""
    key_needed: bool = True
    """Not so where there is no `default_domain`."""
    url_env: str
    sandbox_url_env: str | None = None
    domain_env: str | None = None
    region_env: str | None = None
    """Names a region; wins over `domain_env`."""
    region_domain: str = "{region}"
    insecure_env: str | None = None
    """`true` in it: the domain's hosts are spoken to without TLS."""
    default_domain: str | None = None
    """None: there are no domains; sandboxes are reached at the API's own URL, which is a Unix socket by default."""
    shared_domains: frozenset[str] = frozenset()
    """Domains whose sandboxes share the host `sandbox.<domain>`; elsewhere each has `<port>-<id>.<domain>`."""
    by_domain: Mapping[str, Dialect] = field(default_factory=dict)
    """Domains that speak another dialect under the same key."""
    self_hosted: Dialect | None = None
    """The dialect of a server that is not the provider's own. None: as the provider's."""

    lacks: frozenset[str] = frozenset()
    """The client's verbs, also with an argument, that this provider does not have."""
    create_path: str = "/sandboxes"
    create_with: Mapping[str, Any] = field(default_factory=dict)
    secure: bool | None = True
    """Whether a sandbox asks for its token where the caller does not say. None: the field is not sent."""
    internet_field: str = "allow_internet_access"
    resume_by_metadata: bool = False
    """Whether auto-resume is asked for in the metadata."""
    idempotency_header: bool = False
    """Whether creates with the same `Idempotency-Key` make one sandbox."""
    connect_path: str = "/sandboxes/{id}/connect"
    connect_with: Mapping[str, Any] = field(default_factory=dict)
    pause_body: Mapping[str, Any] | None = field(default_factory=dict)
    """None: the request has no body at all."""
    fork_path: str = "/sandboxes/{id}/fork"
    fork_with: Mapping[str, Any] = field(default_factory=dict)
    metrics_per_second: int = 1
    """How many of the units in which metrics are asked for make a second."""

    id_header: str = "E2b-Sandbox-Id"
    port_header: str = "E2b-Sandbox-Port"
    traffic_header: str = "E2B-Traffic-Access-Token"
    id_has_client: bool = False
    """Whether paths and hosts want `<sandboxID>-<clientID>`."""

    can_freeze: bool = False
    """Whether it stops a sandbox's processes while their RAM is held."""
    abortable: bool = False
    """Whether a connect during a pause ends it at once, rather than when the snapshot is whole."""
    pause_per_gib: float = 4.0
    """Seconds that a pause takes for each GiB of RAM, until somebody has measured: the services' own figure."""
    resume_seconds: float = 1.0
    """Seconds that a resume takes, until somebody has measured: the services' own figure."""
    retention: int | None = None
    """Seconds a paused sandbox is kept, by the provider's documents. None: until it is killed, or unknown."""
    retention_from: Literal["creation", "pause"] = "creation"
    """What they count from; where they don't say, the earlier."""
    max_timeout: int | None = None
    """The longest timeout, in seconds, on the provider's best plan. None: no limit, or unknown."""
    price: Price | None = None
    """None: unknown, or free."""

    def require(self, verb: str) -> None:
        """Raises a `ConfigError` if the provider does not have that verb."""
        if verb in self.lacks or (verb == "freeze" and not self.can_freeze):
            msg = f"There is no `{verb}` at {self.name!r} in this domain's dialect. Do without, or choose another."
            raise ConfigError(msg, op=verb.partition("(")[0])

    def create_body(self, request: CreateRequest, *, secure: bool | None = None) -> dict[str, Any]:
        """What `create` sends.

        Args:
            secure: None: as the provider's own SDK asks.
        """
        self.require(f"create(secure={secure})")
        # Said only where it is not the rule: not every server knows the field.
        unsaid = {"secure"} | ({"auto_pause_memory"} if request.auto_pause_memory else set())
        body = {**self.create_with, **request.model_dump(by_alias=True, exclude_none=True, exclude=unsaid)}
        if self.secure is not None:
            body["secure"] = self.secure if secure is None else secure

        if "allow_internet_access" in body:
            body[self.internet_field] = body.pop("allow_internet_access")

        if request.auto_resume and self.resume_by_metadata:
            del body["autoResume"]
            body["metadata"] = {**request.metadata, "auto_resume": "true"}
        elif not request.auto_pause:
            body.pop("autoResume", None)

        return body

    def sandbox_id(self, sandbox_id: str, client_id: str) -> str:
        """The id that this provider's paths and hosts want."""
        return f"{sandbox_id}-{client_id}" if self.id_has_client and client_id else sandbox_id

    def sandbox_url(self, address: Address, grant: SandboxGrant, port: int, *, public: bool = False) -> str:
        """The URL of one port of a sandbox.

        Args:
            public: A host of the port's own wherever there are domains, since not all who are given it send headers.
        """
        domain = grant.domain or address.domain
        if address.sandbox_url and not (public and domain and self.default_domain):
            return address.sandbox_url

        if domain is None:
            return address.api_url

        shared = domain in self.shared_domains and not public
        name = "sandbox" if shared else f"{port}-{self.sandbox_id(grant.sandbox_id, grant.client_id)}"
        return f"{address.scheme}://{name}.{domain}"

    def sandbox_headers(self, grant: SandboxGrant, port: int) -> dict[str, str]:
        """What routes a request to one port of a sandbox, and the right to use it."""
        headers = {self.id_header: self.sandbox_id(grant.sandbox_id, grant.client_id), self.port_header: str(port)}
        # It opens all of the sandbox, so it is no business of a server that somebody runs in there.
        if grant.envd_access_token and port in (ENVD_PORT, INTERPRETER_PORT):
            headers["X-Access-Token"] = grant.envd_access_token

        if grant.traffic_access_token:
            headers[self.traffic_header] = grant.traffic_access_token

        return headers


_MONTH = 30 * 24 * 3600  # seconds

_ONCE: dict[str, Any] = {  # The second version of create.
    "create_path": "/v2/sandboxes",
    "idempotency_header": True,
    "secure": None,
    "lacks": frozenset({"create(secure=False)"}),
}

_E2B_CLUSTER = Dialect(
    name="e2b",
    key_env=("E2B_API_KEY",),
    key_needed=False,
    url_env="E2B_API_URL",
    sandbox_url_env="E2B_SANDBOX_URL",
    domain_env="E2B_DOMAIN",
    default_domain="e2b.app",
    shared_domains=frozenset({"e2b.app", "e2b.dev", "e2b.pro"}),
)

E2B = replace(
    _E2B_CLUSTER,
    key_needed=True,
    # The published server has no v2 of these two.
    self_hosted=_E2B_CLUSTER,
    **_ONCE,
    connect_path="/v2/sandboxes/{id}/connect",
    retention=_MONTH,
    max_timeout=24 * 3600,
    price=Price(vcpu=0.000014, gib=0.0000045),
)


def _ppio(name: str, domain: str, *, legacy: str, kept_from: Literal["creation", "pause"]) -> Dialect:
    """PPIO, or a sibling: the same service under other names."""
    common = Dialect(
        name=name.lower(),
        key_env=(f"{name.upper()}_API_KEY",),
        url_env=f"{name.upper()}_API_URL",
        sandbox_url_env=f"{name.upper()}_SANDBOX_URL",
        domain_env=f"{name.upper()}_DOMAIN",
        default_domain=domain,
        lacks=frozenset({"pause(memory=False)", "snapshot(name)"}),
        fork_path="/sandboxes/{id}/clone",
        fork_with={"strict": False},
        id_header=f"{name}-Sandbox-Id",
        port_header=f"{name}-Sandbox-Port",
        retention=_MONTH,
        retention_from=kept_from,
        max_timeout=3600,
    )
    older = replace(
        common,
        lacks=common.lacks | {"snapshot", "list_snapshots", "delete_snapshot"},
        create_with={"allowInternetAccess": True},
        secure=False,
        internet_field="allowInternetAccess",
        resume_by_metadata=True,
        # Connect sets auto-pause anew here. Off, as the vendor's SDK sends it, would turn the next timeout into a kill.
        connect_with={"autoPause": True},
        # Otherwise the answer comes before the snapshot is whole, and calls fail in between.
        pause_body={"sync": True},
        metrics_per_second=1000,
        id_has_client=True,
    )
    return replace(
        common,
        create_with={"allow_internet_access": True, "autoResume": {"enabled": False}},
        pause_body=None,
        by_domain=dict.fromkeys(legacy.split(), older),
    )


PPIO = _ppio("PPIO", "sandbox.ppio.cn", legacy="sandbox.ppio.cn sandbox-test.ppio.cn", kept_from="pause")
PPIO_LEGACY = PPIO.by_domain["sandbox.ppio.cn"]

NOVITA = _ppio(
    "Novita",
    "us-phx-1.sandbox.novita.ai",
    legacy="sandbox.novita.ai us-01.sandbox.novita.ai us-ga-01.sandbox.novita.ai us-ga-1.sandbox.novita.ai "
    "sandbox-dev.novita.ai us-01.sandbox-dev.novita.ai us-ga-01.sandbox-dev.novita.ai us-ca-1.sandbox-dev.novita.ai",
    kept_from="creation",
)

UCLOUD = Dialect(
    name="ucloud",
    key_env=("UCLOUD_SANDBOX_API_KEY", "AGENTBOX_API_KEY"),
    url_env="UCLOUD_SANDBOX_API_URL",
    sandbox_url_env="UCLOUD_SANDBOX_URL",
    domain_env="UCLOUD_SANDBOX_DOMAIN",
    region_env="UCLOUD_SANDBOX_REGION",
    region_domain="{region}.sandbox.ucloudai.com",
    insecure_env="UCLOUD_SANDBOX_INSECURE_HTTP",
    default_domain="cn-wlcb.sandbox.ucloudai.com",
    create_with={"allow_internet_access": True},
    pause_body={"memory": True},
    retention=_MONTH,
)

LOCAL = Dialect(
    name="local",
    key_env=("SANDBOX_TOOLS_API_KEY",),
    url_env="SANDBOX_TOOLS_API_URL",
    **_ONCE,
    can_freeze=True,
    pause_per_gib=1.0,
    resume_seconds=0.4,
)

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (E2B, PPIO, NOVITA, UCLOUD, LOCAL)}


def choose(
    provider: str | Dialect | None = None,
    *,
    api_key: str | None = None,
    api_url: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Dialect, Address]:
    """The dialect to speak and where; arguments win over the environment.

    Args:
        provider: Its name, or a `Dialect`, which is spoken also where a name would stand for that of a cluster.

    Raises:
        ConfigError: No such provider, several providers' keys, a key that is missing or cannot be a header.
    """
    environ = os.environ if environ is None else environ
    dialect = provider if isinstance(provider, Dialect) else _dialect(provider, api_key, api_url, environ)
    named, region = api_url or environ.get(dialect.url_env), environ.get(dialect.region_env or "")
    domain = dialect.region_domain.format(region=region) if region else environ.get(dialect.domain_env or "")
    if dialect.self_hosted and (named or domain):
        # A cluster's sandboxes live beside its API; the provider's own domain must not be sent their tokens.
        host = urllib.parse.urlsplit(named or "").hostname or ""
        domain = domain or (host.removeprefix("api.") if host.startswith("api.") else None)
        if domain not in dialect.shared_domains and not isinstance(provider, Dialect):
            dialect = dialect.self_hosted
    else:
        domain = domain or dialect.default_domain

    insecure = environ.get(dialect.insecure_env or "", "").lower() == "true"
    insecure = insecure or (not dialect.key_needed and (named or "").startswith("http:"))
    scheme = "http" if insecure else "https"
    url = (named or (f"{scheme}://api.{domain}" if domain else "http://localhost")).rstrip("/")
    sandbox_url = environ.get(dialect.sandbox_url_env or "", "").rstrip("/")
    address = Address(
        api_url=url,
        api_key=_key(dialect, api_key, environ),
        domain=domain,
        scheme=scheme,
        sandbox_url=url if dialect.default_domain is None else sandbox_url or None,
        url_named=bool(named),
    )
    return dialect.by_domain.get(domain or "", dialect), address


def _dialect(provider: str | None, api_key: str | None, api_url: str | None, environ: Mapping[str, str]) -> Dialect:
    if provider is not None:
        if provider not in DIALECTS:
            msg = f"There is no provider {provider!r}. Pass one of {', '.join(map(repr, sorted(DIALECTS)))}."
            raise ConfigError(msg)

        return DIALECTS[provider]

    signs = {dialect.name: dialect.key_env for dialect in DIALECTS.values()}
    signs |= {E2B.name: (E2B.url_env, *E2B.key_env), LOCAL.name: (LOCAL.url_env,)}
    set_by = {provider: name for provider, names in signs.items() for name in names if environ.get(name)}
    if len(set_by) > 1:
        names = ", ".join(f"`{name}`" for name in set_by.values())
        msg = f"Several providers are configured: {names}. Pass `provider`, or unset all but one."
        raise ConfigError(msg)

    if not set_by and api_key and not api_url:
        msg = "An `api_key` alone does not say whose it is. Pass `provider` as well."
        raise ConfigError(msg)

    return DIALECTS[next(iter(set_by), LOCAL.name)]


def _key(dialect: Dialect, api_key: str | None, environ: Mapping[str, str]) -> str | None:
    found = {api_key} if api_key else {value for name in dialect.key_env if (value := environ.get(name))}
    key = next(iter(found), None)
    if len(found) > 1:
        names = " and ".join(f"`{name}`" for name in dialect.key_env)
        msg = f"{names} hold different keys for {dialect.name!r}. Unset one, or pass `api_key`."
        raise ConfigError(msg)

    if key is None and dialect.key_needed and dialect.default_domain is not None:
        own = f" A cluster of your own needs only its URL: `{dialect.url_env}`." if dialect.self_hosted else ""
        msg = f"There is no API key for {dialect.name!r}. Set `{dialect.key_env[0]}` or pass `api_key`.{own}"
        raise ConfigError(msg)

    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        msg = f"The API key for {dialect.name!r} has blanks, line ends or non-ASCII characters in it. Copy it again."
        raise ConfigError(msg)

    return key
