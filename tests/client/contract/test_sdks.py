"""The vendors' own SDKs, in their own environments, against the same recorder: the tables say what they send."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.client.contract.conftest import Trust
from tests.client.contract.recorder import Recorded, Recorder
from tests.client.contract.service import KEY, well
from tests.client.contract.test_requests import odd
from tests.client.contract.vendors import TABLES, of
from tests.sdk.environments import BuildError, environment

ROOT = Path(__file__).parents[3]
MINUTES = 3  # in which an SDK that has not said everything is broken


@dataclass(frozen=True, kw_only=True)
class Vendor:
    """An SDK and its variables."""

    sdk: str
    prefix: str
    sandbox_url: str = "SANDBOX_URL"
    domain: str | None = None


VENDORS: Mapping[str, Vendor] = {
    "e2b": Vendor(sdk="e2b", prefix="E2B_"),
    "ucloud": Vendor(sdk="ucloud", prefix="UCLOUD_SANDBOX_", sandbox_url="URL"),
    "ppio": Vendor(sdk="ppio", prefix="PPIO_", domain="cn-beijing-1.sandbox.ppio.com"),
    "ppio-legacy": Vendor(sdk="ppio", prefix="PPIO_"),
    "novita": Vendor(sdk="novita", prefix="NOVITA_"),
    "novita-legacy": Vendor(sdk="novita", prefix="NOVITA_", domain="sandbox.novita.ai"),
}


@pytest.mark.parametrize("name", VENDORS)
async def test_the_sdk_sends_what_its_table_says(name: str, recorder: Recorder, trust: Trust, state: Path) -> None:
    """Each verb of the table, field by field, so that no difference hides behind a row copied wrongly."""
    vendor = VENDORS[name]
    try:
        home = await asyncio.to_thread(environment, vendor.sdk)
    except BuildError as error:
        pytest.skip(f"The SDK's environment can't be made: {error}")

    said = await _said_by(home, name, list(TABLES[name]), recorder, trust, state)

    assert {verb: words for verb, (words, _) in said.items() if words} == {}
    for verb, (_, requests) in said.items():
        theirs = [of(request).flat() for request in requests]
        table = [row.flat() for row in TABLES[name][verb]]
        assert len(table) == len(theirs), (verb, theirs)
        for wanted, sent in zip(table, theirs, strict=True):
            assert odd(wanted, sent) == {}, verb


async def _said_by(
    home: Path, name: str, verbs: list[str], recorder: Recorder, trust: Trust, state: Path
) -> dict[str, tuple[str, list[Recorded]]]:
    """By verb: how it failed, and its requests."""
    vendor = VENDORS[name]
    # Code goes to the grant's domain whatever the URLs are, with one SDK: a user name in front makes that loopback.
    well(recorder, domain=f"sbx@127.0.0.1:{recorder.tls_port}")
    url = f"http://127.0.0.1:{recorder.port}"
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(state),
        "SSL_CERT_FILE": str(trust.authority),
        f"{vendor.prefix}API_KEY": KEY,
        f"{vendor.prefix}API_URL": url,
        f"{vendor.prefix}{vendor.sandbox_url}": url,
        **({f"{vendor.prefix}DOMAIN": vendor.domain} if vendor.domain else {}),
    }
    speaker = await asyncio.create_subprocess_exec(
        str(home / "bin" / "python"),
        *("-m", "tests.client.contract.speaker", name, url, *verbs),
        cwd=ROOT,
        env=variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(MINUTES * 60):
            stdout, stderr = await speaker.communicate()
    finally:
        if speaker.returncode is None:
            speaker.kill()
            await speaker.wait()

    assert speaker.returncode == 0, stderr.decode()
    failures = dict(json.loads(line) for line in stdout.decode().splitlines())
    requests: dict[str, list[Recorded]] = {}
    for request in recorder.requests:
        if request.path.startswith("/-/"):
            requests[verb := urllib.parse.unquote(request.path.removeprefix("/-/"))] = []
        elif requests:  # before the first verb comes what gave the sandbox
            requests[verb].append(request)

    return {verb: (failures[verb], requests[verb]) for verb in verbs}
