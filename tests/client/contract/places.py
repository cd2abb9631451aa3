"""Where the client is pointed at, and which vendor's table says what it is to send there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_tools.client import Client
from tests.client.contract.recorder import Recorder
from tests.client.contract.service import ID, KEY
from tests.client.contract.vendors import LEGACY_ID, PORTS, Where


@dataclass(frozen=True, kw_only=True)
class Place:
    """One provider as a user's environment names it."""

    table: str
    environ: Mapping[str, str]
    """`{url}` stands for the recorder's own."""
    api: str
    """The host of the control plane."""
    sandbox: str
    """That of a sandbox; `{port}` stands for one of its ports."""
    tls: bool = True
    key: bool = True
    arguments: Mapping[str, str] = field(default_factory=dict)
    """To `Client`."""
    whole: bool = True
    """Whether all verbs are said here. False: only one of each kind, because it differs from another in hosts alone."""

    def client(self, recorder: Recorder, state: Path, **more: float) -> Client:
        """A client as a user makes it, once the environment is set."""
        return Client(**{"state_dir": state, **self.arguments, **more})  # type: ignore[arg-type]

    def variables(self, recorder: Recorder) -> dict[str, str]:
        """What the user exports."""
        return {name: value.format(url=f"http://127.0.0.1:{recorder.port}") for name, value in self.environ.items()}

    def host(self, to: Where, recorder: Recorder) -> str:
        """The host that a request must name."""
        pattern = self.api if to == "api" else self.sandbox
        return pattern.format(port=PORTS.get(to), own=f"127.0.0.1:{recorder.port}")

    def certified(self) -> set[str]:
        """The names that TLS must vouch for."""
        return {self.api, *(self.sandbox.format(port=port) for port in PORTS.values())} if self.tls else set()


PLACES: Mapping[str, Place] = {
    "e2b": Place(
        table="e2b",
        environ={"E2B_API_KEY": KEY},
        api="api.e2b.app",
        sandbox="sandbox.e2b.app",
    ),
    "e2b's published server by a domain": Place(
        table="e2b-cluster",
        environ={"E2B_API_KEY": KEY, "E2B_DOMAIN": "own.example"},
        api="api.own.example",
        sandbox=f"{{port}}-{ID}.own.example",
    ),
    "e2b's published server by its URL alone": Place(
        table="e2b-cluster",
        environ={"E2B_API_URL": "https://api.own.example"},
        api="api.own.example",
        sandbox=f"{{port}}-{ID}.own.example",
        key=False,
        whole=False,
    ),
    "e2b's published server by its URLs": Place(
        table="e2b-cluster",
        environ={"E2B_API_KEY": KEY, "E2B_API_URL": "{url}", "E2B_SANDBOX_URL": "{url}/"},
        api="{own}",
        sandbox="{own}",
        tls=False,
        whole=False,
    ),
    "ucloud": Place(
        table="ucloud",
        environ={"UCLOUD_SANDBOX_API_KEY": KEY},
        api="api.cn-wlcb.sandbox.ucloudai.com",
        sandbox=f"{{port}}-{ID}.cn-wlcb.sandbox.ucloudai.com",
    ),
    "ucloud in another region": Place(
        table="ucloud",
        environ={"AGENTBOX_API_KEY": KEY, "UCLOUD_SANDBOX_REGION": "eu", "UCLOUD_SANDBOX_DOMAIN": "not.this"},
        api="api.eu.sandbox.ucloudai.com",
        sandbox=f"{{port}}-{ID}.eu.sandbox.ucloudai.com",
        whole=False,
    ),
    "ppio": Place(
        table="ppio",
        environ={"PPIO_API_KEY": KEY, "PPIO_DOMAIN": "cn-beijing-1.sandbox.ppio.com"},
        api="api.cn-beijing-1.sandbox.ppio.com",
        sandbox=f"{{port}}-{ID}.cn-beijing-1.sandbox.ppio.com",
    ),
    "ppio on its first domain": Place(
        table="ppio-legacy",
        environ={"PPIO_API_KEY": KEY},
        api="api.sandbox.ppio.cn",
        sandbox=f"{{port}}-{LEGACY_ID}.sandbox.ppio.cn",
    ),
    "novita": Place(
        table="novita",
        environ={"NOVITA_API_KEY": KEY},
        api="api.us-phx-1.sandbox.novita.ai",
        sandbox=f"{{port}}-{ID}.us-phx-1.sandbox.novita.ai",
    ),
    "novita on an older domain": Place(
        table="novita-legacy",
        environ={"NOVITA_API_KEY": KEY, "NOVITA_DOMAIN": "us-01.sandbox.novita.ai"},
        api="api.us-01.sandbox.novita.ai",
        sandbox=f"{{port}}-{LEGACY_ID}.us-01.sandbox.novita.ai",
    ),
    "local by a URL": Place(
        table="local",
        environ={"SANDBOX_TOOLS_API_URL": "{url}", "SANDBOX_TOOLS_API_KEY": KEY},
        api="{own}",
        sandbox="{own}",
        tls=False,
    ),
    "local by its socket": Place(
        table="local",
        environ={},
        api="localhost",
        sandbox="localhost",
        tls=False,
        key=False,
        whole=False,
    ),
}
