"""One engine on TCP, and every SDK's scenario taken against it, each once and in the SDK's own environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.conftest import own_state
from tests.machine import PATIENCE, EngineProcess
from tests.sdk import texts
from tests.sdk.environments import JAVASCRIPT, environment

ROOT = Path(__file__).parents[2]
KEY = "e2b_of_the_tests"
AT_ONCE = 2  # scenarios; they mostly wait, but each has a few sandboxes
MINUTES = 8  # in which a scenario that has not ended is broken


class TcpEngine(EngineProcess):
    """An engine with both of its doors open on loopback: plain, and with TLS."""

    def __init__(self, state: Path) -> None:
        super().__init__(state, options=("--host", "127.0.0.1", "--port", "0", "--tls-port", "0", "--api-key", KEY))

    def http(self) -> httpx.Client:
        """A plain client of the control plane."""
        return httpx.Client(base_url=self.url("http"), headers={"X-API-KEY": KEY}, timeout=PATIENCE)

    def url(self, scheme: str) -> str:
        """Where it said that it listens."""
        if said := re.search(rf"Listening on ({scheme}://\S+)", self.log()):
            return said[1]
        raise httpx.ConnectError("It does not listen yet.")


@dataclass(frozen=True, kw_only=True)
class Sdk:
    """One half of one SDK, and how its user points it at another service than its maker's."""

    environment: str
    command: tuple[str, ...]
    prefix: str
    """Of its variables."""
    by_domain: bool
    """By its domain alone, so that all goes over TLS to addresses made of it; else by the two URLs."""

    def variables(self, engine: TcpEngine) -> dict[str, str]:
        """What its user exports."""
        authority = str(engine.state / "tls" / "ca.pem")
        trust = {"SSL_CERT_FILE": authority, "NODE_EXTRA_CA_CERTS": authority, f"{self.prefix}API_KEY": KEY}
        if self.by_domain:
            return {**trust, f"{self.prefix}DOMAIN": "sbx@" + engine.url("https").removeprefix("https://")}
        url = engine.url("http")
        sandbox = "URL" if self.prefix == "UCLOUD_SANDBOX_" else "SANDBOX_URL"
        return {**trust, f"{self.prefix}API_URL": url, f"{self.prefix}{sandbox}": url}


def _python(spelling: str, half: str, prefix: str, *, by_domain: bool) -> Sdk:
    command = ("-m", "tests.sdk.user", spelling, half)
    name = spelling.removesuffix("-legacy")
    return Sdk(environment=name, command=command, prefix=prefix, by_domain=by_domain)


SDKS = {
    "e2b-sync": _python("e2b", "sync", "E2B_", by_domain=False),
    "e2b-async": _python("e2b", "async", "E2B_", by_domain=True),
    "e2b-javascript": Sdk(environment="javascript", command=("user.mjs",), prefix="E2B_", by_domain=False),
    "ppio-sync": _python("ppio", "sync", "PPIO_", by_domain=True),
    "ppio-async": _python("ppio", "async", "PPIO_", by_domain=True),
    # Without a domain of the user's own this SDK speaks as it did to the service's first one.
    "ppio-legacy-sync": _python("ppio-legacy", "sync", "PPIO_", by_domain=False),
    "ppio-legacy-async": _python("ppio-legacy", "async", "PPIO_", by_domain=False),
    "ucloud-sync": _python("ucloud", "sync", "UCLOUD_SANDBOX_", by_domain=False),
    "ucloud-async": _python("ucloud", "async", "UCLOUD_SANDBOX_", by_domain=True),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one step: `kept`, `failed` with a traceback, or `absent` with what the SDK lacks."""

    outcome: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What came of all steps of one SDK's scenario."""

    steps: Mapping[str, Outcome]
    ending: str
    """Its exit code and what it wrote on stderr."""


@pytest.fixture(scope="session")
def tcp_engine(templates: Path) -> Iterator[TcpEngine]:
    """The engine that all SDKs use at the same time; nothing of theirs may be left of it."""
    with own_state() as state:
        engine = TcpEngine(state)
        engine.start()
        try:
            yield engine
        finally:
            engine.clear()
            engine.stop()
        assert engine.containers() == []


@pytest.fixture(scope="session")
def scenarios(tcp_engine: TcpEngine, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Scenario]]]:
    """The scenarios that the chosen tests need, begun a few at a time."""
    chosen = {item.callspec.params.get("sdk") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(_take, sdk, tcp_engine) for name, sdk in SDKS.items() if name in chosen}


@pytest.fixture(scope="session")
def sdk(request: pytest.FixtureRequest, scenarios: dict[str, Future[Scenario]]) -> Scenario:
    """One SDK's scenario, once it has ended."""
    return scenarios[request.param].result()


def _take(sdk: Sdk, engine: TcpEngine) -> Scenario:
    home = environment(sdk.environment)
    directory = engine.state / "-".join((sdk.environment, *sdk.command))
    directory.mkdir()
    if sdk.environment == "javascript":
        # Modules are looked for beside the script.
        shutil.copytree(JAVASCRIPT, directory, dirs_exist_ok=True)
        (directory / "node_modules").symlink_to(home / "node_modules")
        (directory / "texts.json").write_text(json.dumps(texts.SHARED))
        command, cwd = [str(home / "bin" / "node"), *sdk.command], directory
    else:
        command, cwd = [str(home / "bin" / "python"), *sdk.command], ROOT
    with (directory / "stdout").open("w") as stdout, (directory / "stderr").open("w") as stderr:
        variables = {"PATH": os.environ["PATH"], "HOME": str(directory), **sdk.variables(engine)}
        try:
            code = subprocess.run(
                command, cwd=cwd, env=variables, stdout=stdout, stderr=stderr, timeout=MINUTES * 60
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    steps = {}
    for line in (directory / "stdout").read_text().splitlines():
        told = json.loads(line)
        steps[told["promise"]] = Outcome(outcome=told["outcome"], words=told["words"])
    return Scenario(steps=steps, ending=f"exit code {code}\n{(directory / 'stderr').read_text()}")
