"""The MCP server over HTTP: only who has a token, each only to its own sandboxes, and no page of another origin."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator

import httpx
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.shared.exceptions import MCPError

from sandbox_tools.errors import ConfigError
from sandbox_tools.tools.principals import Tokens

TOKENS = {"ann": "ann-0123456789abcdef", "bob": "bob-0123456789abcdef"}
MODES = ["auto", "legacy"]
CALL = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
ACCEPT = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}


class Served:
    """`python -m sandbox_tools.mcp --http` over the shared engine."""

    def __init__(self, engine, directory, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self.log = (directory / "log").open("wb")
        command = [sys.executable, "-m", "sandbox_tools.mcp", "--http", "--port", str(self.port), *options]
        variables = {**os.environ, "SANDBOX_TOOLS_STATE_DIR": str(engine.state)}
        self.process = subprocess.Popen(command, env=variables, stdout=self.log, stderr=self.log)

    async def ready(self) -> None:
        async with httpx.AsyncClient() as http, asyncio.timeout(60):
            while True:
                assert self.process.poll() is None, open(self.log.name).read()
                with contextlib.suppress(httpx.TransportError):
                    await http.get(self.url)
                    return
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) in (0, -15)
        self.log.close()

    @contextlib.asynccontextmanager
    async def client(self, token: str | None = None, mode: str = "auto") -> AsyncIterator[Client]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with (
            create_mcp_http_client(headers) as http,
            Client(streamable_http_client(self.url, http_client=http), mode=mode) as client,
        ):
            yield client


@pytest.fixture
async def served(engine, tmp_path):
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(TOKENS))
    served = Served(engine, tmp_path, "--tokens", str(tokens), "--pause-after", "600", "--tools", "*")
    try:
        await served.ready()
        yield served
    finally:
        served.stop()
        engine.clear()


def text(result) -> str:
    return "\n".join(block.text for block in result.content if block.type == "text")


@pytest.mark.parametrize("mode", MODES)
async def test_a_principal_finds_its_sandbox_from_connection_to_connection(served, mode):
    async with served.client(TOKENS["ann"], mode) as client:
        await client.call_tool("run_code", {"code": "words = ['kept']"})
    async with served.client(TOKENS["ann"], mode) as client:
        assert text(await client.call_tool("run_code", {"code": "print(words)"})) == "['kept']"


@pytest.mark.parametrize("mode", MODES)
async def test_one_principal_can_not_reach_anothers_sandbox_nor_wake_it(served, engine, mode):
    where = {"conversation": "shared name"}
    async with served.client(TOKENS["ann"], mode) as ann:
        done = await ann.call_tool("run_code", {"code": "secret = 'hunter2'; open('s', 'w').write(secret)", **where})
        handle = done.structured_content["sandbox"]
        await ann.call_tool("pause_sandbox", where)
    [before] = engine.rows()
    assert before["state"] == "paused"

    async with served.client(TOKENS["bob"], mode) as bob:
        heard = [
            await bob.call_tool("run_code", {"code": "print(secret)", "sandbox": handle}),
            await bob.call_tool("read_file", {"path": "s", "sandbox": handle}),
            await bob.call_tool("resume_sandbox", {"handle": handle}),
            await bob.call_tool("pause_sandbox", {"handle": handle}),
            await bob.call_tool("delete_sandbox", {"sandbox": handle}),
            await bob.call_tool("list_paused_sandboxes", where),
            await bob.call_tool("run_code", {"code": "print('secret' in globals())", **where}),
        ]
        assert [result.is_error for result in heard] == [True] * 5 + [False] * 2
        said = "\n".join(text(result) for result in heard)
        assert "hunter2" not in said
        assert handle not in said
        assert text(heard[-1]).endswith("False")
        assert (await bob.list_resources()).resources == []
        for uri in (f"sandbox://{handle}", f"sandbox://{handle}/home/user/s"):
            with pytest.raises(MCPError):
                await bob.read_resource(uri)
    [after] = [row for row in engine.rows() if row["sandboxID"] == before["sandboxID"]]
    assert (after["state"], after["startedAt"]) == ("paused", before["startedAt"])

    async with served.client(TOKENS["ann"], mode) as ann:
        assert text(await ann.call_tool("run_code", {"code": "print(secret)", **where})) == "hunter2"


async def status(served, headers, url=None) -> int:
    async with httpx.AsyncClient() as http:
        return (await http.post(url or served.url, json=CALL, headers={**ACCEPT, **headers})).status_code


async def test_without_a_token_that_is_known_nothing_is_answered(served, engine):
    for token in (None, "wrong-0123456789abcdef", "x", TOKENS["ann"] + "x"):
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        assert await status(served, headers) == 401
    assert engine.rows() == []


async def test_a_session_of_one_principal_is_no_session_of_another(served):
    """What an old client sends in place of a token's holder: somebody else's session id, seen on the wire."""
    information = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    begin = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": information}
    async with httpx.AsyncClient(headers=ACCEPT, timeout=30) as http:
        ann, bob = ({"Authorization": f"Bearer {TOKENS[name]}"} for name in ("ann", "bob"))
        begun = await http.post(served.url, json=begin, headers=ann)
        session = {"Mcp-Session-Id": begun.headers["mcp-session-id"], "MCP-Protocol-Version": "2025-11-25"}
        assert (await http.post(served.url, json=CALL, headers={**ann, **session})).status_code == 200
        assert (await http.post(served.url, json=CALL, headers={**bob, **session})).status_code in (403, 404)


async def test_a_page_of_another_origin_and_a_name_that_was_rebound_are_refused(served):
    ann = {"Authorization": f"Bearer {TOKENS['ann']}"}
    assert await status(served, {**ann, "Origin": "http://evil.example"}) == 403
    assert await status(served, {**ann, "Host": "evil.example"}) == 421


async def test_on_loopback_no_token_is_needed_and_old_sessions_are_conversations(engine, tmp_path):
    served = Served(engine, tmp_path, "--pause-after", "600")
    try:
        await served.ready()
        async with served.client(mode="legacy") as one, served.client(mode="legacy") as two:
            await one.call_tool("run_code", {"code": "name = 'one'"})
            assert text(await two.call_tool("run_code", {"code": "print('name' in globals())"})) == "False"
            assert text(await one.call_tool("run_code", {"code": "print(name)"})) == "one"
    finally:
        served.stop()
        engine.clear()


def test_beyond_loopback_a_token_is_made_and_names_are_asked_for(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "sandbox_tools.mcp", "--http", "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "SANDBOX_TOOLS_STATE_DIR": str(tmp_path)},
    )
    assert ended.returncode == 1
    assert "--allow-host" in ended.stderr


@pytest.mark.parametrize("tokens", [{"ann": "short"}, {"": "0123456789abcdef"}, {"a": "0" * 16, "b": "0" * 16}])
def test_tokens_that_could_be_guessed_or_confused_are_refused(tokens):
    with pytest.raises(ConfigError, match="token"):
        Tokens(tokens)
