"""What the engine itself asks of a guest, through the tunnel."""

from __future__ import annotations

import json
from collections.abc import Mapping

import httpcore

from sandbox_tools.engine.tunnel import Tunnel, TunnelBackend
from sandbox_tools.errors import EngineError
from sandbox_tools.models import ENVD_PORT


async def initialise(tunnel: Tunnel, *, sandbox_id: str, token: str, env: Mapping[str, str]) -> None:
    """Tell a guest that woke from the template's image whose it is now.

    Raises:
        EngineError: The guest did not take it.
    """
    body = json.dumps({"accessToken": token, "envVars": dict(env), "lifecycleID": sandbox_id}).encode()
    async with httpcore.AsyncConnectionPool(network_backend=TunnelBackend(tunnel)) as pool:
        try:
            response = await pool.request(
                "POST",
                f"http://sandbox:{ENVD_PORT}/init",
                headers={"Content-Type": "application/json", "Content-Length": str(len(body))},
                content=body,
                extensions={"timeout": {"connect": 30.0, "read": 30.0, "write": 30.0}},
            )
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            msg = f"The guest could not be initialised: {type(error).__name__} {error}"
            raise EngineError(msg, op="create", sandbox_id=sandbox_id) from error

    if response.status != 204:
        msg = f"The guest refused its initialisation with {response.status}: {response.content[:300]!r}"
        raise EngineError(msg, op="create", sandbox_id=sandbox_id)
