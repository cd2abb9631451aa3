"""Every language, and what code shows, through a real engine: as an ordinary user, in little memory, over a pause."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.machine import Box, EngineProcess


@pytest.fixture(scope="module")
def box(engine: EngineProcess) -> Iterator[Box]:
    box = engine.create()
    yield box
    box.kill()


def written(events: list[dict[str, object]]) -> str:
    """What code that did not fail has written."""
    assert not [event for event in events if event["type"] == "error"], events
    return "".join(str(event["text"]) for event in events if event["type"] == "stdout")


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", "import os, pathlib; print(os.getuid(), pathlib.Path.cwd())"),
        ("bash", "echo $(id -u) $PWD"),
        ("javascript", "console.log(Deno.uid(), Deno.cwd())"),
        ("typescript", "console.log(Deno.uid() as number, Deno.cwd() as string)"),
    ],
)
def test_each_language_runs_as_the_user_at_home(box: Box, language: str, code: str) -> None:
    assert written(box.run(code, language=language)) == "1000 /home/user\n"


def test_a_language_that_the_template_lacks_is_refused_in_words(box: Box) -> None:
    with box.engine.http() as http:
        answer = http.post("/execute", json={"code": "1", "language": "java"}, headers=box.headers)

    assert answer.status_code == 400
    assert "python, javascript, typescript, bash" in answer.text


@pytest.mark.parametrize(
    ("language", "keep", "work", "look"),
    [
        ("bash", "kept=5; echo", "echo running; sleep 600", "echo $kept"),
        ("javascript", "let kept = 5", 'console.log("running"); while (true) {}', "console.log(kept)"),
    ],
)
def test_leaving_code_interrupts_it_and_keeps_the_variables(
    box: Box, language: str, keep: str, work: str, look: str
) -> None:
    """Bash is interrupted through its terminal, V8 by a message."""
    box.run(keep, language=language)
    with box.stream(work, language=language) as events:
        assert next(event for event in events if event["type"] == "stdout")["text"] == "running\n"

    assert written(box.run(look, language=language)) == "5\n"


@pytest.mark.parametrize(
    ("language", "code", "name"),
    [
        ("bash", "exec python3 -c 'b = bytearray(4 << 30)'", "ContextRestarting"),
        ("bash", "python3 -c 'b = bytearray(4 << 30)'", "ExitCode"),
        ("javascript", "const all = []; for (;;) all.push(new Array(1e6).fill(0.5))", "ContextRestarting"),
        ("javascript", "new Uint8Array(3e9).length", "RangeError"),
    ],
)
def test_code_that_wants_too_much_memory_fails_and_the_sandbox_lives(
    box: Box, language: str, code: str, name: str
) -> None:
    box.run("alive = True")

    (error,) = (event for event in box.run(code, language=language) if event["type"] == "error")
    assert error["name"] == name
    assert box.value("alive") == "True"


def test_frames_and_charts_come_out_of_a_sandbox(box: Box) -> None:
    events = box.run("import pandas; pandas.DataFrame({'a': [1, 2]})")
    assert next(event for event in events if event["type"] == "result")["data"] == {"a": [1, 2]}

    events = box.run("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()")
    assert next(event for event in events if event["type"] == "result")["chart"]["type"] == "line"


def test_variables_of_all_languages_and_a_background_job_outlive_a_pause(engine: EngineProcess) -> None:
    """Deno's sockets, a bash behind its terminal, and what runs in it."""
    box = engine.create()
    box.run("kept = 1")
    box.run("kept=2; sleep 600 & job=$!", language="bash")
    box.run("let kept = 3", language="js")

    assert box.post("pause").status_code == 204
    assert box.post("connect", timeout=600).status_code == 201

    assert box.value("kept") == "1"
    assert written(box.run("kill -0 $job && echo $kept", language="bash")) == "2\n"
    assert written(box.run("console.log(kept)", language="js")) == "3\n"
    box.kill()


@pytest.mark.parametrize("end", ["kill", "pause"])
def test_a_stream_is_broken_not_ended_when_its_sandbox_goes(engine: EngineProcess, end: str) -> None:
    """PROTOCOL 3.2: an SDK takes a stream that ends cleanly for success."""
    box = engine.create()
    seen: list[str] = []

    def watch() -> None:
        with box.stream("print(1, flush=True)\nwhile True: pass") as events:
            for event in events:
                seen.append(event["type"])
                if event["type"] == "stdout":
                    threading.Thread(target=box.kill if end == "kill" else lambda: box.post("pause")).start()

    with pytest.raises(httpx.RemoteProtocolError):
        watch()
    assert seen[-1] == "stdout"
    if end == "pause":
        box.wait_for("paused")
        box.kill()
