"""What `/execute` and `/contexts` promise, on real kernels."""

from __future__ import annotations

import asyncio
import base64

import pytest

from sandbox_tools.guest import interpreter

from .conftest import Guest, of_type, text

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_an_execution_streams_its_count_then_its_value_then_its_end(guest: Guest) -> None:
    count, result, end = await guest.run("20 + 22")

    assert count == {"type": "number_of_executions", "execution_count": count["execution_count"]}
    assert result == {"type": "result", "is_main_result": True, "text": "42"}
    assert end == {"type": "end_of_execution"}


async def test_health_is_the_json_string_ok(guest: Guest) -> None:
    assert (await guest.http.get("/health")).json() == "OK"


async def test_output_arrives_while_the_code_still_runs(guest: Guest) -> None:
    """The code waits for a file which the reader makes only after it has seen the first line."""
    code = """
import pathlib, sys, time
print("first", flush=True)
while not pathlib.Path("gate").exists(): time.sleep(0.01)
print("second", file=sys.stderr)
"""
    seen = []
    async with guest.stream(code) as events:
        async for event in events:
            seen.append(event)
            if event["type"] == "stdout":
                (guest.cwd / "gate").touch()

    assert text(seen) == "first\n"
    assert text(seen, "stderr") == "second\n"
    assert all("timestamp" in event for event in seen if event["type"] in ("stdout", "stderr"))


async def test_code_that_raises_is_an_event_and_the_variables_stay(guest: Guest) -> None:
    events = await guest.run("kept = 7\n1 / 0")

    (error,) = of_type(events, "error")
    assert (error["name"], error["value"]) == ("ZeroDivisionError", "division by zero")
    assert "1 / 0" in error["traceback"]
    assert "\x1b" not in error["traceback"]
    assert events[-1]["type"] == "end_of_execution"
    assert await guest.value("kept") == "7"


async def test_a_plot_is_a_png_with_its_text(guest: Guest) -> None:
    """Both a shown figure and one that is the last expression."""
    events = await guest.run("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nplt.subplots()[0]")

    shown, last = of_type(events, "result")[:2]
    for result, main in ((shown, False), (last, True)):
        assert base64.b64decode(result["png"], validate=True).startswith(b"\x89PNG")
        assert result["text"].startswith("<Figure")
        assert result["is_main_result"] is main


async def test_every_mime_type_has_its_field_and_unknown_ones_go_into_extra(guest: Guest) -> None:
    """PROTOCOL 3.2; the repr of a string loses its quotes."""
    code = """
from IPython.display import display
display({"text/plain": "'quoted'", "text/html": "<b>", "image/svg+xml": "<svg/>", "application/json": {"a": [1]},
         "e2b/data": {"x": [1, 2]}, "application/x-own": "mine"}, raw=True)
"""
    (result,) = of_type(await guest.run(code), "result")

    assert result == {
        "type": "result",
        "is_main_result": False,
        "text": "quoted",
        "html": "<b>",
        "svg": "<svg/>",
        "json": {"a": [1]},
        "data": {"x": [1, 2]},
        "extra": {"application/x-own": "mine"},
    }


async def test_fifty_megabytes_of_plot_are_one_line(guest: Guest) -> None:
    code = "from IPython.display import display\ndisplay({'image/png': 'A' * 50_000_000}, raw=True)"
    (result,) = of_type(await guest.run(code), "result")

    assert len(result["png"]) == 50_000_000


async def test_long_output_is_cut_into_small_events_and_complete(guest: Guest) -> None:
    events = await guest.run("print('é' * 3_000_000, end='')")

    assert text(events) == "é" * 3_000_000
    assert max(len(event["text"].encode()) for event in of_type(events, "stdout")) <= 64 * 1024


async def test_printing_waits_for_its_reader_and_loses_nothing(guest: Guest) -> None:
    """While nobody reads, the code comes to a halt instead of filling memory; then every byte arrives, in order."""
    code = """
import pathlib
for number in range(300):
    print(f"{number:07}" * 100_000)
    pathlib.Path("progress").write_text(str(number))
"""
    async with guest.stream(code) as events:
        first = await anext(events)
        written = None
        async with asyncio.timeout(30):
            while (now := _read(guest, "progress")) != written or written is None:
                written = now
                await asyncio.sleep(0.5)
        assert int(written) < 299
        lines = text([first, *[event async for event in events]]).splitlines()

    assert lines == [f"{number:07}" * 100_000 for number in range(300)]


async def test_two_thousand_results_in_a_row_all_arrive(guest: Guest) -> None:
    """More than ZeroMQ's queues hold."""
    events = await guest.run("from IPython.display import display\nfor n in range(2000): display(n)")

    assert [result["text"] for result in of_type(events, "result")] == [str(n) for n in range(2000)]


async def test_executions_of_one_context_at_the_same_time_each_get_their_own_output(guest: Guest) -> None:
    runs = await asyncio.gather(*(guest.run(f"print({number})") for number in range(8)))

    assert [text(events) for events in runs] == [f"{number}\n" for number in range(8)]


async def test_contexts_run_at_the_same_time_and_share_no_variables(guest: Guest) -> None:
    """The default context waits for a file that only the other one makes."""
    other = await guest.context()
    wait = "import pathlib, time\nmine = 1\nwhile not pathlib.Path('other').exists(): time.sleep(0.01)"

    await asyncio.wait_for(
        asyncio.gather(guest.run(wait), guest.run("open('other', 'w').close()", context_id=other)), 20
    )

    (error,) = of_type(await guest.run("mine", context_id=other), "error")
    assert error["name"] == "NameError"
    assert (await guest.http.delete(f"/contexts/{other}")).status_code == 200


async def test_a_silent_execution_sends_keepalives(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "KEEPALIVE_INTERVAL", 0.05)
    code = "import pathlib, time\nwhile not pathlib.Path('awake').exists(): time.sleep(0.01)"
    async with guest.stream(code) as events:
        async for event in events:
            if event["type"] == "keepalive":
                (guest.cwd / "awake").touch()

    assert event["type"] == "end_of_execution"
    assert (guest.cwd / "awake").exists()


async def test_a_context_has_its_directory_is_listed_restarts_empty_and_can_be_deleted(guest: Guest) -> None:
    """PROTOCOL 3.1: the three keys, 200 with `null`, and 404 text once it is gone."""
    made = (await guest.http.post("/contexts", json={"language": "python", "cwd": "/tmp"})).json()
    assert made == {"id": made["id"], "language": "python", "cwd": "/tmp"}
    assert made in (await guest.http.get("/contexts")).json()
    assert await guest.value("import os\nos.getcwd()", context_id=made["id"]) == "/tmp"

    restarted = await guest.http.post(f"/contexts/{made['id']}/restart")
    assert (restarted.status_code, restarted.json()) == (200, None)
    (error,) = of_type(await guest.run("os", context_id=made["id"]), "error")
    assert error["name"] == "NameError"

    deleted = await guest.http.delete(f"/contexts/{made['id']}")
    assert (deleted.status_code, deleted.json()) == (200, None)
    for gone in (
        await guest.http.delete(f"/contexts/{made['id']}"),
        await guest.http.post(f"/contexts/{made['id']}/restart"),
        await guest.http.post("/execute", json={"code": "1", "context_id": made["id"]}),
    ):
        assert (gone.status_code, gone.text) == (404, f"Context {made['id']} not found")


async def test_restarting_a_context_ends_what_runs_in_it_with_an_error_event(guest: Guest) -> None:
    context = await guest.context()
    async with guest.stream("while True: pass", context_id=context) as events:
        assert (await anext(events))["type"] == "number_of_executions"
        restarting = asyncio.create_task(guest.http.post(f"/contexts/{context}/restart"))
        (error,) = of_type([event async for event in events], "error")

    assert error["name"] == "ContextRestarting"
    assert (await restarting).status_code == 200
    assert await guest.value("1", context_id=context) == "1"
    await guest.http.delete(f"/contexts/{context}")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"{}", "`code`"),
        (b'{"code": 1}', "`code`"),
        (b'{"code": "1", "env_vars": {"A": 1}}', "`env_vars`"),
        (b'{"code": "1", "context_id": "x", "language": "python"}', "exclude"),
        (b'{"code": "1", "language": "r"}', "'r'"),
    ],
)
async def test_a_malformed_execution_is_refused_in_words(guest: Guest, body: bytes, word: str) -> None:
    answer = await guest.http.post("/execute", content=body)

    assert answer.status_code == 400
    assert word in answer.text


async def test_a_context_in_a_directory_that_is_not_there_is_refused_in_words(guest: Guest) -> None:
    answer = await guest.http.post("/contexts", json={"cwd": "/no/such/directory"})

    assert answer.status_code == 500
    assert "/no/such/directory" in answer.text
    assert len((await guest.http.get("/contexts")).json()) == 1


def _read(guest: Guest, name: str) -> str | None:
    path = guest.cwd / name
    return path.read_text() or None if path.exists() else None
