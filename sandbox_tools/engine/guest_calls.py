"""What the engine itself asks of a guest, through the tunnel."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from sandbox_tools.engine.http1 import call
from sandbox_tools.engine.tunnel import Tunnel
from sandbox_tools.errors import EngineError
from sandbox_tools.models import ENVD_PORT, INTERPRETER_PORT

HEALTH_SECONDS = 5.0
"""How long a guest may take to say that it is well; E2B's SDK gives it as long."""


async def initialise(
    tunnel: Tunnel, *, sandbox_id: str, token: str, env: Mapping[str, str] | None, let_out: bool
) -> None:
    """Tell a guest that woke from an image whose it is now.

    Args:
        env: The environment variables of the whole sandbox. None: those that the image has.
        let_out: Whether its programs are told of the way out.

    Raises:
        EngineError: The guest did not take it.
    """
    variables = None if env is None else dict(env)
    body = {"accessToken": token, "envVars": variables, "lifecycleID": sandbox_id, "letOut": let_out}
    await _ask(tunnel, "POST", "/init", token=token, body=body, sandbox_id=sandbox_id)


async def reboot(tunnel: Tunnel, *, sandbox_id: str, token: str) -> None:
    """End every process inside but the guest's own, and drop what they held in memory; files stay.

    Raises:
        EngineError: The guest did not answer, or something could not be ended.
    """
    await _ask(tunnel, "POST", "/reboot", token=token, sandbox_id=sandbox_id)


async def warm(tunnel: Tunnel, *, sandbox_id: str) -> None:
    """Have a guest that nobody has asked for yet touch what the first code will need; it leaves no trace.

    Raises:
        EngineError: The guest did not answer, or its kernel is no more.
    """
    await _ask(tunnel, "POST", "/warm", token="", sandbox_id=sandbox_id)
    # The way of an execution through the guest itself; what is empty is neither counted nor kept.
    body = {"code": "", "context_id": None, "language": None, "env_vars": None}
    await _ask(tunnel, "POST", "/execute", token="", body=body, sandbox_id=sandbox_id, port=INTERPRETER_PORT)


async def check_health(tunnel: Tunnel, *, sandbox_id: str, token: str) -> None:
    """Have a sign of life from a guest.

    Raises:
        EngineError: It gave none within `HEALTH_SECONDS`.
    """
    await _ask(tunnel, "GET", "/health", token=token, sandbox_id=sandbox_id, seconds=HEALTH_SECONDS)


async def _ask(
    tunnel: Tunnel,
    method: str,
    path: str,
    *,
    token: str,
    sandbox_id: str,
    body: object = None,
    seconds: float = 30.0,
    port: int = ENVD_PORT,
) -> None:
    content = b"" if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "X-Access-Token": token}
    try:
        async with asyncio.timeout(seconds):
            status, answer = await call(tunnel, port, method, path, headers=headers, body=content)
    except (ConnectionError, TimeoutError) as error:
        msg = f"The guest did not answer {path!r}: {type(error).__name__} {error}"
        raise EngineError(msg, sandbox_id=sandbox_id) from error

    if status not in (200, 204):
        msg = f"The guest refused {path!r} with {status}: {answer[:300]!r}"
        raise EngineError(msg, sandbox_id=sandbox_id)
