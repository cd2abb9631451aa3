"""An agent's turn, however it is run and however it ends, uses one sandbox and lets it sleep afterwards."""

from __future__ import annotations

import asyncio
import threading

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, interrupt

from sandbox_tools import SandboxCallback, SandboxToolkit
from sandbox_tools.errors import ConfigError, ServerError
from sandbox_tools.models import Execution, Stdout
from sandbox_tools.policy.pause import PauseAfter
from sandbox_tools.session.bindings import MemoryBindings
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.testing import ScriptedModel, call
from tests.session.provider import ProviderClient, echo

CONFIG = {"configurable": {"thread_id": "t"}}


def make_agent(sessions, script, tools=(), **options):
    model = ScriptedModel(script=script)
    made = create_agent(model, [*SandboxToolkit(sessions).get_tools(), *tools], **options)
    return made.with_config(callbacks=[SandboxCallback(sessions)]), model


def ask(text):
    return {"messages": [("user", text)]}


async def asleep(sessions, provider):
    """Waits for what the callback has posted."""
    async with asyncio.timeout(10):
        while sessions._tasks:
            await asyncio.wait(sessions._tasks)
    return [machine.state for machine in provider.machines.values()] == ["paused"]


async def test_two_turns_of_an_agent_share_one_sandbox_that_sleeps_between_them(process, provider):
    sessions = process(PauseAfter(0))
    agent, model = make_agent(
        sessions,
        [call("run_code", code="one"), "done", call("run_code", code="two"), "done"],
        checkpointer=InMemorySaver(),
    )
    await agent.ainvoke(ask("first"), CONFIG)
    assert await asleep(sessions, provider)
    await agent.ainvoke(ask("second"), CONFIG)
    assert await asleep(sessions, provider)
    assert model.asked[-1][-1].text == "one two"
    assert [verb for verb in provider.verbs() if verb in ("create", "pause")] == ["create", "pause", "pause"]


async def test_parallel_calls_of_one_turn_share_one_sandbox_and_one_pause(process, provider):
    sessions = process(PauseAfter(0))
    calls = [{"name": "run_code", "args": {"code": str(i)}, "id": f"c{i}"} for i in range(3)]
    agent, _ = make_agent(sessions, [AIMessage("", tool_calls=calls), "done"])
    await agent.ainvoke(ask("go"), CONFIG)
    assert await asleep(sessions, provider)
    assert [verb for verb in provider.verbs() if verb in ("create", "pause")] == ["create", "pause"]


async def test_a_turn_without_a_tool_call_creates_nothing(process, provider):
    sessions = process(PauseAfter(0))
    agent, _ = make_agent(sessions, ["hello"])
    await agent.ainvoke(ask("hello"), CONFIG)
    while sessions._tasks:
        await asyncio.wait(sessions._tasks)
    assert provider.log == []


async def test_a_turn_that_dies_of_a_model_error_lets_the_sandbox_sleep(process, provider):
    sessions = process(PauseAfter(0))
    agent, _ = make_agent(sessions, [call("run_code", code="x")])
    with pytest.raises(IndexError):
        await agent.ainvoke(ask("go"), CONFIG)
    assert await asleep(sessions, provider)


async def test_a_turn_cancelled_while_code_runs_lets_the_sandbox_sleep(process, provider):
    sessions = process(PauseAfter(0))
    running = asyncio.Event()

    async def hang(handle, code, on_event):
        running.set()
        await asyncio.Event().wait()

    provider.interpreter = hang
    agent, _ = make_agent(sessions, [call("run_code", code="x")])
    turn = asyncio.create_task(agent.ainvoke(ask("go"), CONFIG))
    await running.wait()
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    assert await asleep(sessions, provider)


async def test_a_stream_the_caller_stops_reading_lets_the_sandbox_sleep(process, provider):
    sessions = process(PauseAfter(0))
    agent, _ = make_agent(sessions, [call("run_code", code="x"), call("run_code", code="y"), "done"])
    stream = agent.astream(ask("go"), CONFIG)
    async for step in stream:
        if "tools" in step:
            break
    await stream.aclose()
    assert await asleep(sessions, provider)


async def test_the_sandbox_sleeps_while_a_human_is_asked(process, provider):
    def approve() -> str:
        """Ask a human."""
        return interrupt("may I?")

    sessions = process(PauseAfter(0))
    agent, _ = make_agent(
        sessions,
        [call("run_code", code="x"), call("approve"), call("run_code", code="y"), "done"],
        tools=[approve],
        checkpointer=InMemorySaver(),
    )
    await agent.ainvoke(ask("go"), CONFIG)
    assert await asleep(sessions, provider)
    await agent.ainvoke(Command(resume="yes"), CONFIG)
    assert await asleep(sessions, provider)
    (machine,) = provider.machines.values()
    assert machine.memory == ["x", "y"]


def run_in_thread(work):
    """In a thread of its own, so that a deadlock is a failed test and not a hung one."""
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(work()), daemon=True)
    thread.start()
    thread.join(20)
    assert outcome, "it did not come back"
    return outcome[0]


def test_synchronous_code_needs_no_event_loop_of_its_own(provider, clock):
    sessions = Sessions(ProviderClient(provider), bindings=MemoryBindings(), policy=PauseAfter(30), clock=clock)
    agent, model = make_agent(sessions, [call("run_code", code="one"), "done"])
    run_in_thread(lambda: agent.invoke(ask("go"), CONFIG))
    assert model.asked[-1][-1].text == "one"
    run_in_thread(lambda: SandboxToolkit(sessions).close() or True)
    assert [machine.state for machine in provider.machines.values()] == ["paused"]


async def test_a_synchronous_call_inside_a_running_loop_works_as_in_a_notebook(provider, clock):
    sessions = Sessions(ProviderClient(provider), bindings=MemoryBindings(), clock=clock)
    agent, model = make_agent(sessions, [call("run_code", code="one"), "done"])
    agent.invoke(ask("go"), CONFIG)
    assert model.asked[-1][-1].text == "one"
    SandboxToolkit(sessions).close()


async def test_a_synchronous_tool_call_from_a_worker_thread_joins_the_applications_loop(process, provider):
    sessions = process()
    async with sessions.session("t").lease() as sandbox:
        sandbox.remember("from the loop")
    run_code = SandboxToolkit(sessions).get_tools()[0]
    answer = await asyncio.to_thread(run_code.invoke, {"code": "from a thread"}, CONFIG)
    assert answer[0]["text"] == "from the loop from a thread"


async def test_a_synchronous_tool_call_on_the_loop_itself_is_refused(process):
    sessions = process()
    async with sessions:
        run_code = SandboxToolkit(sessions).get_tools()[0]
        with pytest.raises(ConfigError, match="ainvoke"):
            run_code.invoke({"code": "x"}, CONFIG)


async def test_a_run_without_a_thread_id_is_told_how_to_pass_one(process, provider):
    run_code = SandboxToolkit(process()).get_tools()[0]
    with pytest.raises(ConfigError, match="thread_id"):
        await run_code.ainvoke({"code": "x"})
    assert provider.log == []


async def test_arguments_the_model_made_up_do_not_reach_the_session(process, provider):
    sessions = process()
    forged = {"code": "x", "config": {"configurable": {"thread_id": "other"}}}
    agent, model = make_agent(sessions, [call("run_code", **forged), call("run_code"), "done"])
    await agent.ainvoke(ask("go"), CONFIG)
    answers = [message for message in model.asked[-1] if isinstance(message, ToolMessage)]
    assert [answer.status for answer in answers] == ["error", "error"]
    assert "`config`" in answers[0].text
    assert "`code`: Field required" in answers[1].text
    assert provider.log == []


async def test_the_model_pauses_lists_and_resumes_by_handle_and_never_sees_an_id(process, provider):
    sessions = process()
    agent, model = make_agent(
        sessions,
        [
            call("run_code", code="x"),
            call("pause_sandbox"),
            call("list_paused_sandboxes"),
            call("resume_sandbox"),
            "done",
        ],
    )
    await agent.ainvoke(ask("go"), CONFIG)
    paused, listed, resumed = [message.text for message in model.asked[-1] if isinstance(message, ToolMessage)][1:]
    handle = paused.split()[1].removesuffix(".")
    assert handle.startswith("sbx-")
    assert handle in listed
    assert "this conversation's own" in listed
    assert handle in resumed
    assert "machine1" not in paused + listed + resumed


async def test_a_foreign_handle_is_an_error_the_model_can_act_on(process, provider):
    sessions = process()
    agent, model = make_agent(sessions, [call("resume_sandbox", handle="sbx-nosuchword"), "done"])
    await agent.ainvoke(ask("go"), CONFIG)
    answer = model.asked[-1][-1]
    assert answer.status == "error"
    assert "list_paused_sandboxes" in answer.text


async def test_a_lost_state_is_said_once_in_words(process, provider, clock):
    sessions = process()
    agent, model = make_agent(sessions, [call("run_code", code=str(i)) for i in range(3)] + ["done"])

    async def lose_after_the_first(handle, code, on_event):
        outcome = await echo(handle, code, on_event)
        if code == "0":
            provider.machines.clear()
            clock.advance(10)
        return outcome

    provider.interpreter = lose_after_the_first
    await agent.ainvoke(ask("go"), CONFIG)
    first, second, third = [message.text for message in model.asked[-1] if isinstance(message, ToolMessage)]
    assert "lost" not in first
    assert "lost" in second
    assert "1" in second
    assert third == "1 2"


async def test_a_broken_connection_is_not_taken_for_code_that_did_not_run(process, provider):
    sessions = process()

    async def broken(handle, code, on_event):
        handle.remember(code)
        raise ServerError("the sandbox m1 answered 500")

    provider.interpreter = broken
    agent, model = make_agent(sessions, [call("run_code", code="x"), "done"])
    await agent.ainvoke(ask("go"), CONFIG)
    assert "may have run" in model.asked[-1][-1].text
    assert "machine1" not in model.asked[-1][-1].text
    (machine,) = provider.machines.values()
    assert machine.memory == ["x"]


async def test_output_is_heard_while_the_code_still_runs(process, provider):
    sessions = process()
    heard = asyncio.Event()

    async def talk(handle, code, on_event):
        on_event(Stdout(text="early"))
        await heard.wait()
        return Execution(stdout="early")

    provider.interpreter = talk
    agent, _ = make_agent(sessions, [call("run_code", code="x"), "done"])
    pieces = []
    async with asyncio.timeout(10):
        async for event in agent.astream_events(ask("go"), CONFIG, version="v2"):
            if event["event"] == "on_custom_event" and event["name"] == "sandbox.output":
                pieces.append(event["data"])
                heard.set()
    assert pieces == [{"stream": "stdout", "text": "early"}]
