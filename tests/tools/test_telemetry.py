"""What OpenTelemetry, LangSmith and the log are told of a conversation: ids and times, and nothing that ran in it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from langchain_core.tracers import LangChainTracer
from langsmith import Client as LangSmith
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sandbox_tools import PauseAfter, SandboxToolkit
from sandbox_tools.errors import ServerError
from tests.tools.house import on_the_engine

CONFIG = {"configurable": {"thread_id": "t"}}
SECRET = "password = 'hunter2'"


@pytest.fixture(scope="session")
def exporters():
    """A process sets its providers once."""
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider([reader]))
    return spans, reader


@pytest.fixture
def spans(exporters):
    exporters[0].clear()
    return exporters[0]


@pytest.fixture
async def sessions(process):
    return process(PauseAfter(0))


async def run_code(sessions, code=SECRET, config=CONFIG):
    tool = next(tool for tool in SandboxToolkit(sessions).get_tools() if tool.name == "run_code")
    return await tool.ainvoke({"code": code}, config)


async def asleep(sessions):
    await sessions.sweep()
    while sessions._tasks:
        await next(iter(sessions._tasks))


async def test_a_tool_call_is_a_span_over_what_it_did_to_the_sandbox(spans, sessions, provider):
    await run_code(sessions)
    await asleep(sessions)
    await run_code(sessions)
    await asleep(sessions)
    told = {span.context.span_id: span for span in spans.get_finished_spans()}
    named = [(span.name, told[span.parent.span_id].name if span.parent else None) for span in told.values()]
    assert named == [
        ("sandbox.create", "execute_tool run_code"),
        ("execute_tool run_code", None),
        ("sandbox.pause", None),
        ("sandbox.resume", "execute_tool run_code"),
        ("execute_tool run_code", None),
        ("sandbox.pause", None),
    ]
    [machine] = provider.machines
    last = [span for span in told.values() if span.name == "execute_tool run_code"][-1]
    bound = await sessions.bindings.find("default", "t")
    assert dict(last.attributes) == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "run_code",
        "gen_ai.tool.type": "function",
        "gen_ai.conversation.id": "t",
        "enduser.id": "default",
        "sandbox.id": machine,
        "sandbox.handle": bound.handle,
    }
    assert "hunter2" not in "".join(span.to_json() for span in told.values())


async def test_what_runs_in_a_sandbox_is_a_span_without_a_word_of_it(spans, engine, tmp_path):
    async with on_the_engine(engine, tmp_path) as house:
        await run_code(house.sessions, f"{SECRET}\nprint(password)")
        async with house.sessions.session("t").lease() as sandbox:
            assert (await sandbox.commands.run("echo hunter2")).stdout == "hunter2\n"
    told = {span.context.span_id: span for span in spans.get_finished_spans()}
    ran = [span for span in told.values() if span.name == "sandbox.exec"]
    assert [dict(span.attributes) for span in ran] == [{"sandbox.id": sandbox.id}] * 2
    assert told[ran[0].parent.span_id].name == "execute_tool run_code"
    assert "hunter2" not in "".join(span.to_json() for span in told.values())


async def test_a_call_that_fails_is_told_by_the_class_of_its_error_alone(spans, sessions, provider):
    provider.fail("create", ServerError("hunter2 was in it", status_code=500, retryable=False))
    assert "may have run" in str(await run_code(sessions))
    told = spans.get_finished_spans()
    assert {span.attributes["error.type"] for span in told} == {"ServerError"}
    assert {span.status.status_code for span in told} == {trace.StatusCode.ERROR}
    assert "hunter2" not in "".join(span.to_json() for span in told)


async def test_seconds_awake_and_paused_add_up_in_a_counter(exporters, sessions, clock):
    def seconds():
        data = exporters[1].get_metrics_data()
        found = {}
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        state = point.attributes.get("sandbox.state")
                        found[metric.name, state] = getattr(point, "value", None) or getattr(point, "count", 0)
        return found

    before = seconds()
    async with sessions.session("t").lease():
        clock.advance(7)
    await asleep(sessions)
    clock.advance(100)
    await run_code(sessions)
    await asleep(sessions)
    after = seconds()

    def grown(*key):
        return after[key] - before.get(key, 0)

    assert grown("sandbox.time", "running") == pytest.approx(7)
    assert grown("sandbox.time", "paused") == pytest.approx(100)
    assert {"sandbox.resume.duration", "sandbox.pause.duration", "gen_ai.execute_tool.duration"} <= {
        name for name, _ in after
    }


async def test_log_records_bear_the_ids_and_no_code(sessions, caplog):
    with caplog.at_level(logging.DEBUG, "sandbox_tools"):
        await run_code(sessions)
        await asleep(sessions)
    bound = await sessions.bindings.find("default", "t")
    paused = next(record for record in caplog.records if record.getMessage() == f"{bound.handle} is paused")
    ids = (paused.owner_id, paused.thread_id, paused.sandbox_handle, paused.sandbox_id)
    assert ids == ("default", "t", bound.handle, bound.sandbox_id)
    assert "hunter2" not in caplog.text


class Runs(LangSmith):
    """Keeps what it would have sent."""

    def __init__(self):
        super().__init__(api_url="http://127.0.0.1:1", api_key="none", auto_batch_tracing=False)
        self.ended = []

    def create_run(self, *_arguments, **_run):
        pass

    def update_run(self, *_arguments, **run):
        self.ended.append(run)


async def test_langsmith_shows_the_sandbox_in_the_metadata_of_the_tools_run(sessions, provider):
    runs = Runs()
    await run_code(sessions, config={**CONFIG, "callbacks": [LangChainTracer(client=runs)]})
    [machine] = provider.machines
    [run] = runs.ended
    bound = await sessions.bindings.find("default", "t")
    expected = {"sandbox_id": machine, "sandbox_handle": bound.handle, "thread_id": "t", "owner_id": "default"}
    assert run["name"] == "run_code"
    assert expected.items() <= run["extra"]["metadata"].items()


WITHOUT = """
import sys
sys.modules["opentelemetry"] = None
from sandbox_tools import telemetry
with telemetry.span("sandbox.pause", {"sandbox_id": "s"}):
    telemetry.identify({"sandbox_id": "s"})
    telemetry.passed("running", 1.0)
print(sorted(name for name in sys.modules if name.startswith(("opentelemetry.", "langsmith"))))
"""


def test_without_opentelemetry_nothing_is_told_and_nothing_fails():
    ended = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("[]\n", "")
