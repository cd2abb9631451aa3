from __future__ import annotations

from dataclasses import replace

import pytest

from sandbox_tools.client import Client
from sandbox_tools.client.dialects import DIALECTS, LOCAL, PPIO, PPIO_LEGACY, choose
from sandbox_tools.errors import ConfigError
from sandbox_tools.models import CreateRequest, SandboxGrant

REQUEST = CreateRequest(timeout=123, auto_pause=True, metadata={"k": "v"}, env_vars={"A": "1"})
GRANT = SandboxGrant(sandbox_id="i1", template_id="t", client_id="c", envd_access_token="secret")


def test_without_any_key_the_local_engine_is_chosen() -> None:
    dialect, address = choose(environ={})

    assert LOCAL is dialect
    assert not address.url_named


@pytest.mark.parametrize("name", ["e2b", "ppio", "novita", "ucloud"])
def test_the_key_in_the_environment_chooses_the_provider(name: str) -> None:
    dialect, address = choose(environ={DIALECTS[name].key_env[0]: "k"})

    assert name == dialect.name
    assert "k" == address.api_key
    assert f"https://api.{address.domain}" == address.api_url


def test_an_engine_elsewhere_is_chosen_by_its_url() -> None:
    dialect, address = choose(environ={"SANDBOX_TOOLS_API_URL": "http://engine:7000/", "SANDBOX_TOOLS_API_KEY": "k"})

    assert LOCAL is dialect
    assert ("http://engine:7000", "http://engine:7000") == (address.api_url, address.sandbox_url)


@pytest.mark.parametrize(
    ("environ", "api_url", "domain", "sandbox"),
    [
        (
            {"E2B_API_URL": "https://api.own.example"},
            "https://api.own.example",
            "own.example",
            "https://49999-i1.own.example",
        ),
        ({"E2B_API_URL": "http://api.lan"}, "http://api.lan", "lan", "http://49999-i1.lan"),
        ({"E2B_API_URL": "http://10.0.0.7:3000/"}, "http://10.0.0.7:3000", None, "http://10.0.0.7:3000"),
        ({"E2B_DOMAIN": "own.example"}, "https://api.own.example", "own.example", "https://49999-i1.own.example"),
        (
            {"E2B_API_URL": "http://10.0.0.7:3000", "E2B_SANDBOX_URL": "http://10.0.0.7:3002"},
            "http://10.0.0.7:3000",
            None,
            "http://10.0.0.7:3002",
        ),
    ],
    ids=["api host", "plain api host", "address", "domain", "two addresses"],
)
def test_a_cluster_of_ones_own_needs_only_its_url(
    environ: dict[str, str], api_url: str, domain: str | None, sandbox: str
) -> None:
    """Its sandboxes' tokens go nowhere near the provider's own domain, and no key is asked for."""
    dialect, address = choose(None if "E2B_API_URL" in environ else "e2b", environ=environ)

    assert ("e2b", None, api_url, domain) == (dialect.name, address.api_key, address.api_url, address.domain)
    # The published server has no second version of create.
    assert "/sandboxes" == dialect.create_path
    assert sandbox == dialect.sandbox_url(address, GRANT, 49999)
    theirs = GRANT.model_copy(update={"domain": "theirs.example"})
    assert "E2B_SANDBOX_URL" in environ or f"{address.scheme}://49999-i1.theirs.example" == dialect.sandbox_url(
        address, theirs, 49999
    )
    assert Client(provider="e2b", api_url=api_url).dialect is dialect


def test_e2bs_own_url_and_key_stay_e2bs_own() -> None:
    environ = {"E2B_API_KEY": "k", "E2B_API_URL": "https://api.e2b.app"}
    dialect, address = choose(environ=environ)

    assert DIALECTS["e2b"] is dialect
    assert "https://sandbox.e2b.app" == dialect.sandbox_url(address, GRANT, 49999)
    with pytest.raises(ConfigError, match=r"E2B_API_KEY.*E2B_API_URL"):
        choose("e2b", environ={})
    with pytest.raises(ConfigError, match="UCLOUD_SANDBOX_API_KEY"):
        choose("ucloud", api_url="http://10.0.0.7:3000", environ={})


def test_ucloud_has_two_names_for_its_key_that_must_agree() -> None:
    assert "k" == choose(environ={"AGENTBOX_API_KEY": "k"})[1].api_key
    assert "k" == choose(environ={"AGENTBOX_API_KEY": "k", "UCLOUD_SANDBOX_API_KEY": "k"})[1].api_key
    environ = {"AGENTBOX_API_KEY": "s3cret", "UCLOUD_SANDBOX_API_KEY": "t0ken"}
    with pytest.raises(ConfigError, match=r"`UCLOUD_SANDBOX_API_KEY` and `AGENTBOX_API_KEY`") as caught:
        choose(environ=environ)
    assert not [secret for secret in environ.values() if secret in str(caught.value)]
    assert "k" == choose("ucloud", api_key="k", environ=environ)[1].api_key


def test_ucloud_without_tls_is_reached_without_tls() -> None:
    environ = {"UCLOUD_SANDBOX_API_KEY": "k", "UCLOUD_SANDBOX_INSECURE_HTTP": "TRUE"}
    dialect, address = choose(environ=environ)

    assert "http://api.cn-wlcb.sandbox.ucloudai.com" == address.api_url
    assert "http://49999-i1.cn-wlcb.sandbox.ucloudai.com" == dialect.sandbox_url(address, GRANT, 49999)
    assert "https" == choose(environ={**environ, "UCLOUD_SANDBOX_INSECURE_HTTP": "false"})[1].scheme


def test_novita_is_ppios_sibling_under_its_own_names() -> None:
    """As its SDK 2.1.1 has them."""
    dialect, address = choose(environ={"NOVITA_API_KEY": "k"})
    legacy, _ = choose(environ={"NOVITA_API_KEY": "k", "NOVITA_DOMAIN": "us-01.sandbox.novita.ai"})

    assert ("novita", "https://api.us-phx-1.sandbox.novita.ai") == (dialect.name, address.api_url)
    assert {"Novita-Sandbox-Id": "i1", "Novita-Sandbox-Port": "49983", "X-Access-Token": "secret"} == (
        dialect.sandbox_headers(GRANT, 49983)
    )
    assert (None, {"sync": True}) == (dialect.pause_body, legacy.pause_body)
    assert "i1-c" == legacy.sandbox_id("i1", "c")


def test_several_keys_are_refused_by_name_unless_a_provider_is_given() -> None:
    environ = {"E2B_API_KEY": "a", "PPIO_API_KEY": "b"}

    with pytest.raises(ConfigError, match=r"`E2B_API_KEY`, `PPIO_API_KEY`"):
        choose(environ=environ)
    with pytest.raises(ConfigError, match=r"`E2B_API_URL`, `NOVITA_API_KEY`"):
        choose(environ={"E2B_API_URL": "http://10.0.0.7:3000", "NOVITA_API_KEY": "b"})
    assert "b" == choose("ppio", environ=environ)[1].api_key


@pytest.mark.parametrize(
    ("provider", "api_key"),
    [("e2b", None), ("nobody", None), (None, "k"), ("e2b", "k\n"), ("e2b", "ké"), ("e2b", "k k")],
)
def test_what_cannot_work_is_refused_before_any_request(provider: str | None, api_key: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(provider, api_key=api_key, environ={})

    assert api_key is None or api_key == "k" or api_key not in str(caught.value)


def test_a_key_is_never_shown() -> None:
    _, address = choose("e2b", api_key="s3cret", environ={})

    assert "s3cret" not in repr(address) + repr(Client(provider="e2b", api_key="s3cret"))
    assert "secret" not in repr(GRANT)


def test_ppio_speaks_its_legacy_form_on_its_default_domain_and_the_modern_one_elsewhere() -> None:
    environ = {"PPIO_API_KEY": "k"}

    assert PPIO_LEGACY is choose(environ=environ)[0]
    assert PPIO is choose(environ={**environ, "PPIO_DOMAIN": "cn-beijing-1.sandbox.ppio.com"})[0]


def test_a_ucloud_region_wins_over_a_domain() -> None:
    environ = {"UCLOUD_SANDBOX_API_KEY": "k", "UCLOUD_SANDBOX_DOMAIN": "d", "UCLOUD_SANDBOX_REGION": "eu"}

    assert "eu.sandbox.ucloudai.com" == choose(environ=environ)[1].domain


COMMON = {
    "templateID": "code-interpreter-v1",
    "timeout": 123,
    "autoPause": True,
    "metadata": {"k": "v"},
    "envVars": {"A": "1"},
}


@pytest.mark.parametrize(
    ("dialect", "path", "extra", "pause"),
    [
        (DIALECTS["e2b"], "/v2/sandboxes", {}, {}),
        (choose("e2b", api_url="http://cluster:3000", environ={})[0], "/sandboxes", {"secure": True}, {}),
        (DIALECTS["ucloud"], "/sandboxes", {"secure": True, "allow_internet_access": True}, {"memory": True}),
        (PPIO, "/sandboxes", {"secure": True, "allow_internet_access": True, "autoResume": {"enabled": False}}, None),
        (PPIO_LEGACY, "/sandboxes", {"secure": False, "allowInternetAccess": True}, {"sync": True}),
        (LOCAL, "/v2/sandboxes", {}, {}),
    ],
    ids=["e2b", "e2b cluster", "ucloud", "ppio", "ppio-legacy", "local"],
)
def test_each_provider_is_sent_what_its_own_sdk_sends(dialect, path, extra, pause) -> None:
    """Bodies as recorded from the vendors' SDKs; legacy pause is the synchronous one that its SDK offers too."""
    assert path == dialect.create_path
    assert {**COMMON, **extra} == dialect.create_body(REQUEST)
    assert pause == dialect.pause_body


@pytest.mark.parametrize(
    ("provider", "domain", "url", "sandbox_id"),
    [
        ("e2b", None, "https://sandbox.e2b.app", "i1"),
        ("e2b", "own.example", "https://49999-i1.own.example", "i1"),
        ("ppio", None, "https://49999-i1-c.sandbox.ppio.cn", "i1-c"),
        ("ucloud", None, "https://49999-i1.cn-wlcb.sandbox.ucloudai.com", "i1"),
        ("local", None, "http://localhost", "i1"),
    ],
)
def test_each_provider_has_its_own_way_to_a_sandbox(
    provider: str, domain: str | None, url: str, sandbox_id: str
) -> None:
    """The domain of the grant wins over the configured one."""
    dialect, address = choose(provider, api_key="k", environ={})
    grant = GRANT.model_copy(update={"domain": domain, "traffic_access_token": "t"})
    headers = dialect.sandbox_headers(grant, 49999)

    assert url == dialect.sandbox_url(address, grant, 49999)
    assert sandbox_id == headers[dialect.id_header]
    assert ("49999", "secret", "t") == (
        headers[dialect.port_header],
        headers["X-Access-Token"],
        headers["E2B-Traffic-Access-Token"],
    )


def test_one_url_for_all_sandboxes_wins_over_every_host_rule() -> None:
    dialect, address = choose(environ={"E2B_API_KEY": "k", "E2B_SANDBOX_URL": "http://127.0.0.1:1/"})

    assert "http://127.0.0.1:1" == dialect.sandbox_url(address, GRANT, 49999)


def test_a_provider_of_ones_own_is_one_dialect() -> None:
    own = replace(DIALECTS["e2b"], name="own", key_env=("OWN_KEY",), default_domain="own.example")

    assert "https://api.own.example" == choose(own, environ={"OWN_KEY": "k"})[1].api_url
