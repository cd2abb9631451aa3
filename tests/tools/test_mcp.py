"""The tools for any MCP client: what it sees, what it is asked, and whose sandbox it gets."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys

import pytest
from mcp import Client, StdioServerParameters
from mcp.shared.exceptions import MCPError
from mcp_types import ElicitResult

from sandbox_tools import PauseAfter
from sandbox_tools.tools.catalog import CATALOG, DEFAULT
from sandbox_tools.tools.mcp import create_server
from tests.tools.house import on_the_engine

MODES = ["auto", "legacy"]
"""How a client speaks: as since 2026-07-28, without sessions, or as before."""


@pytest.fixture
async def house(engine, tmp_path):
    async with on_the_engine(engine, tmp_path, PauseAfter(600)) as house:
        yield house


def text(result) -> str:
    return "\n".join(block.text for block in result.content if block.type == "text")


async def test_a_client_sees_the_catalogue_with_schemas_and_hints(house):
    async with Client(create_server(house.sessions, tools=["*"])) as client:
        listed = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert list(listed) == [tool.name for tool in CATALOG]
    for tool in CATALOG:
        seen = listed[tool.name]
        assert (seen.title, seen.description) == (tool.title, tool.description)
        assert seen.annotations.read_only_hint == tool.hints.read_only
        assert seen.annotations.destructive_hint == tool.hints.destructive
        assert seen.annotations.idempotent_hint == tool.hints.idempotent
        own = seen.input_schema["properties"].keys() - {"conversation", "sandbox"}
        assert own == tool.schema()["properties"].keys()
        assert seen.input_schema.get("required") == tool.schema().get("required")
        assert seen.input_schema["additionalProperties"] is False
        assert seen.output_schema["properties"].keys() == {"text", "sandbox", "facts"}


@pytest.mark.parametrize("mode", MODES)
async def test_code_keeps_its_variables_and_its_output_comes_while_it_runs(house, mode):
    heard = []

    async def progress(done, total, message):
        heard.append((done, message))

    async with Client(create_server(house.sessions), mode=mode) as client:
        code = "words = ['kept']\nprint('begun', flush=True)\nimport time; time.sleep(0.2)\nprint('done')"
        first = await client.call_tool("run_code", {"code": code}, progress_callback=progress)
        second = await client.call_tool("run_code", {"code": "print(words)"})
    assert text(first) == "begun\ndone"
    assert [number for number, _ in heard] == list(range(1, len(heard) + 1))
    assert heard[0][1].strip() == "begun"
    assert text(second) == "['kept']"
    assert second.structured_content["text"] == "['kept']"
    assert second.structured_content["sandbox"] == first.structured_content["sandbox"]
    assert second.structured_content["facts"]["failure"] is None


async def test_a_plot_is_an_image(house):
    async with Client(create_server(house.sessions)) as client:
        plot = "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.show()"
        drawn = await client.call_tool("run_code", {"code": plot})
    [image] = [block for block in drawn.content if block.type == "image"]
    assert image.mime_type == "image/png"
    assert base64.b64decode(image.data).startswith(b"\x89PNG")


async def test_what_a_model_gets_wrong_is_said_to_it(house):
    async with Client(create_server(house.sessions)) as client:
        made_up = await client.call_tool("run_code", {"code": "1", "owner": "ann"})
        unknown = await client.call_tool("resume_sandbox", {"handle": "sbx-unknown"})
        failing = await client.call_tool("run_code", {"code": "1 / 0"})
    assert made_up.is_error
    assert "owner" in text(made_up)
    assert unknown.is_error
    assert "no such sandbox for you" in text(unknown)
    assert not failing.is_error
    assert "ZeroDivisionError" in text(failing)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("answer", ["accept", "no", "decline", "cancel"])
async def test_a_person_is_asked_before_a_sandbox_is_deleted(house, mode, answer):
    asked = []

    async def ask(context, params):
        asked.append(params.message)
        if answer in ("accept", "no"):
            return ElicitResult(action="accept", content={"approved": answer == "accept"})
        return ElicitResult(action=answer)

    server = create_server(house.sessions, tools=["run_code", "delete_sandbox"])
    async with Client(server, mode=mode, elicitation_callback=ask) as client:
        await client.call_tool("run_code", {"code": "x = 1"})
        deleted = await client.call_tool("delete_sandbox", {})
    assert asked == ["May `delete_sandbox` be done?"]
    assert deleted.is_error == (answer != "accept")
    assert len(await house.states()) == (answer != "accept")


async def test_a_client_that_can_not_ask_is_trusted_to_have_asked(house):
    async with Client(create_server(house.sessions, tools=["run_code", "delete_sandbox"])) as client:
        await client.call_tool("run_code", {"code": "x = 1"})
        assert "Deleted" in text(await client.call_tool("delete_sandbox", {}))
    assert await house.states() == []


async def test_each_conversation_has_its_own_sandbox_and_a_handle_leads_to_any(house):
    async with Client(create_server(house.sessions)) as client:

        async def run(code, **where):
            done = await client.call_tool("run_code", {"code": code, **where})
            return text(done), done.structured_content["sandbox"]

        _, first = await run("name = 'first'", conversation="one")
        _, second = await run("name = 'second'", conversation="two")
        assert first != second
        assert await run("print(name)", conversation="one") == ("first", first)
        assert await run("print(name)", sandbox=second) == ("second", second)
        assert await run("print(name)", sandbox=first, conversation="two") == ("first", first)
        assert await run("print('name' in globals())") not in [("True", first), ("True", second)]


async def test_paused_sandboxes_and_files_are_resources(house):
    async with Client(create_server(house.sessions)) as client:
        assert (await client.list_resources()).resources == []
        done = await client.call_tool("run_code", {"code": "open('note.txt', 'w').write('kept')"})
        handle = done.structured_content["sandbox"]
        await client.call_tool("pause_sandbox", {})
        [listed] = (await client.list_resources()).resources
        assert listed.uri == f"sandbox://{handle}"
        [facts] = (await client.read_resource(listed.uri)).contents
        assert json.loads(facts.text)["handle"] == handle
        assert await house.states() == ["paused"]
        [file] = (await client.read_resource(f"sandbox://{handle}/home/user/note.txt")).contents
        assert (file.text, file.mime_type) == ("kept", "text/plain")
        for missing in (
            f"sandbox://{handle}/home/user/no",
            "sandbox://sbx-unknown",
            "sandbox://sbx-unknown/etc/passwd",
        ):
            with pytest.raises(MCPError):
                await client.read_resource(missing)


async def test_between_calls_the_sandbox_sleeps_after_its_idle_time(engine, tmp_path):
    async with on_the_engine(engine, tmp_path, PauseAfter(0.2)) as house:
        async with Client(create_server(house.sessions)) as client:
            await client.call_tool("run_code", {"code": "x = 41"})
            async with asyncio.timeout(30):
                while await house.states() != ["paused"]:
                    await asyncio.sleep(0.05)
            assert text(await client.call_tool("run_code", {"code": "print(x + 1)"})) == "42"


def over_stdio(engine, *options):
    # The session's bindings lie in the engine's state directory, as for any process of this user.
    variables = {"SANDBOX_TOOLS_STATE_DIR": str(engine.state)}
    return StdioServerParameters(command=sys.executable, args=["-m", "sandbox_tools.mcp", *options], env=variables)


@pytest.fixture
def swept(engine):
    yield engine
    engine.clear()


async def test_over_stdio_a_process_is_a_conversation_and_its_end_pauses(swept):
    async with Client(over_stdio(swept)) as client:
        first = await client.call_tool("run_code", {"code": "words = ['kept']"})
    [row] = swept.rows()
    assert row["state"] == "paused"
    async with Client(over_stdio(swept)) as client:
        assert text(await client.call_tool("run_code", {"code": "print('words' in globals())"})) == "False"
        handle = first.structured_content["sandbox"]
        assert handle in text(await client.call_tool("list_paused_sandboxes", {}))
        await client.call_tool("resume_sandbox", {"handle": handle})
        assert text(await client.call_tool("run_code", {"code": "print(words)"})) == "['kept']"


def test_on_stdout_is_nothing_but_the_protocol_whatever_code_prints(swept):
    """Without the client's library, which may skip over what it does not understand."""
    server = over_stdio(swept)
    process = subprocess.Popen(
        [server.command, *server.args],
        env=server.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    noise = "import os, sys\nprint('out')\nprint('err', file=sys.stderr)\nos.system('echo shell')\nos.write(1, b'raw')"
    information = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    lines = [
        {"id": 1, "method": "initialize", "params": information},
        {"method": "notifications/initialized"},
        {"id": 2, "method": "tools/call", "params": {"name": "run_code", "arguments": {"code": noise}}},
        {"id": 3, "method": "tools/call", "params": {"name": "no_such_tool", "arguments": {}}},
    ]
    try:
        for line in lines:
            process.stdin.write(json.dumps({"jsonrpc": "2.0", **line}) + "\n")
            process.stdin.flush()
        answers = {}
        while not {1, 2, 3} <= answers.keys():
            answer = json.loads(process.stdout.readline())
            assert answer["jsonrpc"] == "2.0"
            answers[answer.get("id")] = answer
        process.stdin.close()
        assert process.stdout.read() == ""
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert re.search("out.*shell|shell.*out", answers[2]["result"]["content"][0]["text"], re.DOTALL)
    assert answers[3]["result"]["isError"]


async def test_the_catalogue_is_the_default_four_where_nobody_says_otherwise(swept):
    async with Client(over_stdio(swept)) as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == [tool.name for tool in DEFAULT]
    async with Client(over_stdio(swept, "--tools", "run_code,read_file")) as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == ["run_code", "read_file"]
