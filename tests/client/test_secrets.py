"""Whatever a server quotes of what it was sent, no secret comes back in an error, a repr or a log."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.client.transport import SECRETS
from sandbox_tools.errors import SandboxError

CALLS = 6  # that `nothing_secret_is_said` makes
KEY, TOKEN, TRAFFIC = "k3y-of-the-client", "t0ken-of-the-sandbox", "tr4ffic-token-of-the-sandbox"


class Echo:
    """Answers each request to a sandbox with what it was sent, in the manner that is set."""

    def __init__(self) -> None:
        self.manner = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request, _, lines = head.decode().partition("\r\n")
        words = " ".join([*lines.split(), "x" * 440, KEY, TOKEN])
        if "/connect" in request:
            grant = {"templateID": "t", "sandboxID": "i1", "envdAccessToken": TOKEN, "trafficAccessToken": TRAFFIC}
            writer.write(answer(200, json.dumps(grant)))
        elif request.startswith("GET /sandboxes/"):
            writer.write(answer(500, json.dumps({"code": 500, "message": words})))
        elif self.manner == "malformed":
            writer.write(b"HTTP/1.1 200 OK\r\n" + lines.replace(": ", " ").encode() + b"\r\n\r\n")
        elif self.manner == "long":
            writer.write(f"HTTP/1.1 200 OK\r\nno header {'x' * 500} {words}\r\n\r\n".encode())
        elif self.manner == "connect":
            writer.write(answer(400, json.dumps({"code": "invalid_argument", "message": words})))
        elif self.manner == "shapeless":
            event = {"type": "stdout", "text": [words]}
            writer.write(
                answer(200, json.dumps({**event, "entry": {"path": [words]}, "processes": words, "entries": words}))
            )
        else:
            writer.write(answer(int(self.manner), words))
        writer.close()


def answer(status: int, body: str) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nX-Request-Id: {TOKEN}\r\n\r\n{body}".encode()


@pytest.fixture
async def echo() -> AsyncIterator[tuple[Echo, Sandbox]]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with Client(provider="e2b", api_key=KEY, api_url=url, request_timeout=0.3) as client:
        yield echo, await client.connect("i1")
    server.close()


MANNERS = ["400", "401", "404", "409", "500", "502", "malformed", "long", "connect", "200", "shapeless"]


@pytest.mark.parametrize("manner", MANNERS)
async def test_a_sandbox_that_quotes_secrets_cannot_put_them_into_errors_or_logs(
    echo: tuple[Echo, Sandbox], manner: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, sandbox = echo
    server.manner = manner
    caplog.set_level("DEBUG", "sandbox_tools")

    await nothing_secret_is_said(sandbox, caplog, 3 if manner in ("200", "shapeless") else CALLS)


@pytest.mark.parametrize("manner", MANNERS)
async def test_a_client_keeps_the_secrets_of_another_one_s_grant(
    echo: tuple[Echo, Sandbox], manner: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, theirs = echo
    server.manner = manner
    caplog.set_level("DEBUG", "sandbox_tools")
    url = theirs._client.address.api_url
    async with Client(provider="e2b", api_key=KEY, api_url=url, request_timeout=0.3) as client:
        sandbox = Sandbox(client, theirs._grant)

        await nothing_secret_is_said(sandbox, caplog, 3 if manner in ("200", "shapeless") else CALLS)


async def test_the_secrets_of_a_sandbox_in_use_outlast_those_of_any_number_of_others(
    echo: tuple[Echo, Sandbox], caplog: pytest.LogCaptureFixture
) -> None:
    server, sandbox = echo
    server.manner = "400"
    others = [sandbox._grant.model_copy(update={"envd_access_token": f"other-{n}"}) for n in range(SECRETS)]
    assert [Sandbox(sandbox._client, grant) for grant in others]

    await nothing_secret_is_said(sandbox, caplog, CALLS)


async def nothing_secret_is_said(sandbox: Sandbox, caplog: pytest.LogCaptureFixture, at_least: int) -> None:
    calls: list[Any] = [
        sandbox.run_code("1", timeout=5),
        sandbox.files.read("f"),
        sandbox.files.info("f"),
        sandbox.files.list("d"),
        sandbox.commands.run("true", timeout=5),
        sandbox.commands.list(),
    ]

    said, failed = repr(sandbox), 0
    for call in calls:
        try:
            await call
        except SandboxError as error:
            failed += 1
            said += "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))

    assert failed >= at_least
    for secret in (KEY, TOKEN, TRAFFIC):
        assert secret not in said + caplog.text
        assert secret[: len(secret) // 2] not in said + caplog.text
