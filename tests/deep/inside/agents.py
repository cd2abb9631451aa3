"""deepagents end to end: agent, backend, session, client, engine and gVisor, all real but for the model."""

from __future__ import annotations

import asyncio

import pytest
from deepagents import create_deep_agent
from langchain_core.messages import ToolMessage
from langgraph.checkpoint.memory import InMemorySaver

from sandbox_tools import Client, PauseAfter, SandboxCallback, SandboxError, SandboxToolkit, Sessions, configured
from sandbox_tools.session.bindings import SqliteBindings
from sandbox_tools.testing import ScriptedModel, call
from sandbox_tools.tools import portal
from sandbox_tools.tools.deepagents import SandboxBackend


@pytest.fixture
async def own(client):
    """A registry on the test's loop that pauses when the turn ends."""
    async with Sessions(client, bindings=SqliteBindings(":memory:"), policy=PauseAfter(0)) as sessions:
        yield sessions


def deep(sessions, *script, backend=None, callback=None, **options):
    backend = backend or SandboxBackend(sessions)
    model = ScriptedModel(script=[*script, "done"])
    agent = create_deep_agent(model, backend=backend, checkpointer=InMemorySaver(), **options)
    return agent.with_config(callbacks=[callback or SandboxCallback(sessions)]), model


def of(thread, **more):
    return {"configurable": {"thread_id": thread, **more}}


def answers(result):
    """What the tools said since the last question."""
    said = []
    for message in result["messages"]:
        said = [] if message.type == "human" else said
        if isinstance(message, ToolMessage):
            said.append(message.text)
    return said


async def turn(agent, thread, **more):
    return answers(await agent.ainvoke({"messages": [("user", "go")]}, of(thread, **more)))


async def settled(sessions):
    """The pause runs behind the turn's back."""
    async with asyncio.timeout(60):
        while sessions._tasks:
            await asyncio.wait(sessions._tasks)


async def states(client):
    return [info.state async for info in client.list()]


async def test_two_turns_with_the_sandbox_paused_in_between_and_all_of_it_kept(own, client):
    server = "nohup python3 -m http.server 8000 >/dev/null 2>&1 & echo $! | tee server.pid"
    agent, _ = deep(
        own,
        call("write_file", file_path="/home/user/notes.md", content="# Notes\none\n"),
        call("execute", command=server),
        "the first turn is over",
        call("edit_file", file_path="/home/user/notes.md", old_string="one", new_string="two"),
        call("read_file", file_path="/home/user/notes.md"),
        call("execute", command="kill -0 $(cat server.pid) && curl -s localhost:8000/server.pid"),
    )
    _, pid = await turn(agent, "two turns")
    await settled(own)
    assert await states(client) == ["paused"]
    edited, notes, served = await turn(agent, "two turns")
    assert "Successfully replaced" in edited or "1 occurrence" in edited or "notes.md" in edited
    assert "two" in notes
    assert "one" not in notes
    assert served.split()[0] == pid.split()[0]
    await settled(own)
    assert await states(client) == ["paused"]


async def test_the_application_hands_files_in_and_out(own):
    backend = SandboxBackend(own, thread="files")
    double = "python -c \"print(open('/tmp/in.txt').read() * 2, end='')\" > out"
    agent, _ = deep(own, call("execute", command=double))
    files = [("/tmp/in.txt", b"ab"), ("in.txt", b""), ("/proc/nowhere/x", b""), ("/home", b""), ("/etc/passwd/x", b"")]
    up = await backend.aupload_files(files)
    assert [each.path for each in up] == [path for path, _ in files]
    assert [each.error for each in up] == [None, "invalid_path", "permission_denied", "is_directory", "invalid_path"]

    await turn(agent, "files")
    paths = ["/nothing", "/home/user/out", "/home/user", "/proc/1/mem", "out"]
    down = await backend.adownload_files(paths)
    assert [each.path for each in down] == paths
    assert [each.error for each in down] == [
        "file_not_found",
        None,
        "is_directory",
        "permission_denied",
        "invalid_path",
    ]
    assert down[1].content == b"abab"


async def test_two_threads_of_one_backend_never_meet(own, client):
    backend = SandboxBackend(own)
    threads = [f"thread {n}" for n in range(3)]
    agents = [
        deep(own, *[call("execute", command=f"echo {thread} >> mine; cat mine") for _ in range(2)], backend=backend)[0]
        for thread in threads
    ]
    said = await asyncio.gather(*(turn(agent, thread) for agent, thread in zip(agents, threads, strict=True)))
    for thread, (first, second) in zip(threads, said, strict=True):
        assert first.split("\n")[0] == thread
        assert second.split("\n")[:2] == [thread, thread]
    await settled(own)
    assert await states(client) == ["paused"] * 3


async def test_two_owners_with_the_same_thread_id_never_meet(own, client):
    owner = configured("user")
    backend = SandboxBackend(own, owner=owner)
    callback = SandboxCallback(own, owner=owner)
    for user in ("ann", "bob"):
        agent, _ = deep(own, call("execute", command=f"ls; touch {user}"), backend=backend, callback=callback)
        (said,) = await turn(agent, "same", user=user)
        assert "ann" not in said
    await settled(own)
    assert await states(client) == ["paused", "paused"]


async def test_subagents_work_in_the_conversation_s_own_sandbox(own, client):
    task = call("task", description="look", subagent_type="general-purpose")
    agent, _ = deep(
        own,
        call("execute", command="echo here > found"),
        task,
        call("execute", command="cat found; echo by the subagent >> found"),
        "the subagent is done",
        call("execute", command="cat found"),
    )
    *_, found = await turn(agent, "subagents")
    assert found.split("\n")[:2] == ["here", "by the subagent"]
    await settled(own)
    assert await states(client) == ["paused"]


def test_synchronous_invoke_does_the_same(sessions):
    agent, _ = deep(
        sessions,
        call("write_file", file_path="/home/user/a.txt", content="kept"),
        "the first turn is over",
        call("grep", pattern="kept", path="/home/user", output_mode="content"),
        call("execute", command="cat a.txt"),
        call("delete", file_path="/home/user/a.txt"),
        call("execute", command="ls"),
    )
    agent.invoke({"messages": [("user", "go")]}, of("synchronous"))
    session = sessions.session("synchronous")
    assert portal.run(sessions, session.pause)
    found, kept, _, gone = answers(agent.invoke({"messages": [("user", "go")]}, of("synchronous")))
    assert "a.txt" in found
    assert kept.startswith("kept")
    assert "a.txt" not in gone


async def test_the_model_reads_exit_codes_and_what_a_command_said_in_the_order_it_said_it(own):
    loud = "echo 1; sleep 0.2; echo 2 >&2; sleep 0.2; echo 3; exit 7"
    agent, _ = deep(
        own,
        call("execute", command=loud),
        call("execute", command="echo begun; sleep 100", timeout=1),
        call("execute", command="kill -9 $$"),
    )
    failed, late, killed = await turn(agent, "exit codes")
    assert failed == "1\n2\n3\n\n[Command failed with exit code 7]"
    assert late == "begun\n\n[The command was killed after 1 s.]\n[Command failed with exit code 124]"
    assert killed == "[signal: killed]\n[Command failed with exit code -1]"


async def test_what_is_too_long_for_the_model_lies_in_a_file_that_it_can_read(own):
    agent, _ = deep(
        own,
        call("execute", command="seq 100000"),
        call("execute", command="tail -n 4 /large_tool_results/*"),
    )
    long, file = await turn(agent, "long")
    assert len(long) < 20_000
    assert "/large_tool_results/" in long
    assert "100000" in file


async def test_output_past_all_limits_keeps_its_beginning_and_end_and_says_so(own):
    backend = SandboxBackend(own, thread="endless")
    done = await backend.aexecute("echo first; head -c 12000000 /dev/zero | tr '\\0' x; echo; echo last")
    assert done.truncated
    assert done.output.startswith("first\n")
    assert done.output.endswith("\nlast\n")
    assert "characters left out" in done.output
    assert len(done.output) < 10_100_000


async def test_a_lost_sandbox_is_told_once(own, client):
    agent, _ = deep(own, call("execute", command="echo x > x"))
    await turn(agent, "lost")
    await settled(own)
    async for info in client.list():
        await client.kill(info.sandbox_id)
    agent, _ = deep(own, call("execute", command="cat x"), call("execute", command="echo again"))
    told, again = await turn(agent, "lost")
    assert "your earlier sandbox is gone" in told
    assert "No such file" in told
    assert again.startswith("again")


async def test_a_cancelled_turn_kills_its_command_and_lets_the_sandbox_sleep(own, client):
    backend = SandboxBackend(own)
    agent, _ = deep(own, call("execute", command="touch begun; sleep 1000"), backend=backend)
    running = asyncio.create_task(turn(agent, "cancelled"))
    look = SandboxBackend(own, thread="cancelled")
    async with asyncio.timeout(60):
        while (await look.adownload_files(["/home/user/begun"]))[0].error:
            await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    await settled(own)
    assert await states(client) == ["paused"]
    assert (await look.aexecute("pgrep -x sleep")).exit_code == 1


async def test_the_model_is_never_told_an_id(own, client):
    agent, model = deep(
        own,
        call("execute", command="env; hostname; cat /etc/hostname"),
        call("execute", command="true"),
        call("ls", path="/"),
    )
    await turn(agent, "ids")
    (info,) = [info async for info in client.list()]
    read = str([message.model_dump() for asked in model.asked for message in asked])
    assert "hostname" in read
    assert info.sandbox_id not in read
    assert SandboxBackend(own).id == "sandbox-tools"


async def test_a_run_without_a_thread_is_the_operators_fault_not_the_model_s(own):
    agent = create_deep_agent(
        ScriptedModel(script=[call("execute", command="true"), "done"]), backend=SandboxBackend(own)
    )
    with pytest.raises(SandboxError, match="thread id"):
        await agent.ainvoke({"messages": [("user", "go")]})


async def test_an_engine_that_is_not_there_is_said_in_words(tmp_path):
    """The model may try again; nothing was run."""
    async with Client(provider="local", state_dir=tmp_path, api_url="http://127.0.0.1:9") as client:
        async with Sessions(client, bindings=SqliteBindings(":memory:")) as sessions:
            done = await SandboxBackend(sessions, thread="nobody").aexecute("true")
    assert done.exit_code == 1
    assert "could not be reached; nothing was run" in done.output


async def test_the_toolkit_and_the_backend_share_one_sandbox(own):
    toolkit = SandboxToolkit(own)
    agent, _ = deep(
        own,
        call("execute", command="echo 41 > number"),
        call("run_code", code="n = int(open('number').read()) + 1; open('number', 'w').write(str(n))"),
        call("execute", command="cat number"),
        tools=toolkit.get_tools(),
    )
    *_, number = await turn(agent, "shared")
    assert number.startswith("42")
