"""What the engine itself asks of a guest, through the tunnel."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from sandbox_tools.engine.http1 import call
from sandbox_tools.engine.tunnel import Tunnel
from sandbox_tools.errors import EngineError
from sandbox_tools.models import ENVD_PORT

_SECONDS = 30.0
"""How long a guest may take: milliseconds, unless a loaded machine is still paging it in."""


async def initialise(tunnel: Tunnel, *, sandbox_id: str, token: str, env: Mapping[str, str]) -> None:
    """Tell a guest that woke from the template's image whose it is now.

    Raises:
        EngineError: The guest did not take it.
    """
    body = json.dumps({"accessToken": token, "envVars": dict(env), "lifecycleID": sandbox_id}).encode()
    try:
        async with asyncio.timeout(_SECONDS):
            status, answer = await call(
                tunnel, ENVD_PORT, "POST", "/init", headers={"Content-Type": "application/json"}, body=body
            )
    except (ConnectionError, TimeoutError) as error:
        msg = f"The guest could not be initialised: {type(error).__name__} {error}"
        raise EngineError(msg, op="create", sandbox_id=sandbox_id) from error

    if status != 204:
        msg = f"The guest refused its initialisation with {status}: {answer[:300]!r}"
        raise EngineError(msg, op="create", sandbox_id=sandbox_id)
