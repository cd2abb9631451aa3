"""Whether a provider elsewhere can be used: its key, and whether its control plane answers."""

from __future__ import annotations

import time

from sandbox_tools.client import Client
from sandbox_tools.client.dialects import choose
from sandbox_tools.engine.doctor import Finding
from sandbox_tools.errors import SandboxError


async def look(provider: str | None, api_url: str | None) -> list[Finding] | None:
    """What was found. None: the sandboxes are this machine's own."""
    try:
        dialect, address = choose(provider, api_url=api_url)
    except SandboxError as error:
        return [Finding(what="provider", ok=False, words=error.message)]
    if dialect.default_domain is None and not address.url_named:
        return None

    findings = [Finding(what="provider", ok=True, words=f"{dialect.name} at {address.api_url}")]
    began = time.monotonic()
    try:
        async with Client(provider=provider, api_url=api_url, request_timeout=15) as client:
            count = len([info async for info in client.list()])
    except SandboxError as error:
        return [*findings, Finding(what="reachability", ok=False, words=error.message)]
    words = f"it answered within {time.monotonic() - began:.1f} s; this key has {count} sandboxes"
    return [*findings, Finding(what="reachability", ok=True, words=words)]
