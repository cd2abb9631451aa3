"""What each tool does in a real sandbox, and what the model reads of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sandbox_tools import Artifacts, Client, PauseAfter, Sessions
from sandbox_tools.errors import ConfigError
from sandbox_tools.session.bindings import MemoryBindings
from sandbox_tools.session.session import Session
from sandbox_tools.tools.catalog import CATALOG, choose
from sandbox_tools.tools.render import TEXT_LIMIT, Rendered, RetryableByModel

TOOLS = {tool.name: tool for tool in CATALOG}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session(engine) -> AsyncIterator[Session]:
    client = Client(provider="local", state_dir=engine.state)
    async with client, Sessions(client, bindings=MemoryBindings(), policy=PauseAfter(600)) as sessions:
        session = sessions.session("tools", owner="ann")
        async with session.turn():
            yield session
        await session.kill()


async def use(session: Session, which: str, tools=TOOLS, /, *, heard: list | None = None, **arguments) -> Rendered:
    tool = tools[which]

    async def emit(piece) -> None:
        if heard is not None:
            heard.append(piece)

    return await tool(session, tool.arguments.model_validate(arguments), emit)


def text_of(rendered: Rendered) -> str:
    return "\n".join(block["text"] for block in rendered.blocks if block["type"] == "text")


# One sandbox for all of them; what is not asynchronous ignores it.
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:The test .* is marked with '@pytest.mark.asyncio' but it is not an async"),
]


async def test_a_command_says_what_it_puts_out_and_how_it_failed(session: Session) -> None:
    heard: list[dict[str, str]] = []
    done = await use(session, "run_command", command="echo out; echo err >&2; exit 3", heard=heard)
    assert text_of(done) == "out\nStandard error:\nerr\nIt failed: exit status 3."
    assert done.artifact["exit_code"] == 3
    assert {piece["stream"]: piece["text"].strip() for piece in heard} == {"stdout": "out", "stderr": "err"}
    assert text_of(await use(session, "run_command", command="pwd", cwd="/tmp")) == "/tmp"
    assert text_of(await use(session, "run_command", command="true")) == "The command ran and put nothing out."


async def test_a_command_past_its_timeout_says_what_it_had_put_out(session: Session) -> None:
    done = await use(session, "run_command", command="echo begun; sleep 100", timeout=1)
    assert "killed after 1 s" in text_of(done)
    assert text_of(done).endswith("begun")
    assert done.artifact["error"] == "timeout"


async def test_long_output_is_cut_for_the_model_and_whole_for_the_program(session: Session) -> None:
    done = await use(session, "run_command", command="seq 1 10000")
    assert len(text_of(done)) < TEXT_LIMIT + 200
    assert "characters are left out here" in text_of(done)
    assert done.artifact["whole"].split() == [str(number) for number in range(1, 10_001)]


async def test_a_job_runs_behind_its_call_and_is_read_and_stopped_by_name(session: Session) -> None:
    started = await use(session, "start_job", command="echo begun; sleep 1000")
    job = started.artifact["job"]
    assert job in text_of(started)
    async with asyncio.timeout(20):
        while "begun" not in text_of(read := await use(session, "read_job", job=job)):
            await asyncio.sleep(0.05)
    assert read.artifact["running"] is True
    assert text_of(await use(session, "stop_job", job=job)) == f"Stopped {job}."
    ended = await use(session, "read_job", job=job)
    assert (ended.artifact["running"], ended.artifact["exit_code"]) == (False, None)
    assert "had ended already" in text_of(await use(session, "stop_job", job=job))
    assert "sleep 1000" not in text_of(await use(session, "run_command", command="ps ax"))


async def test_a_job_that_ended_tells_its_exit_code_and_the_end_of_its_output(session: Session) -> None:
    job = (await use(session, "start_job", command="seq 1 100000; (exit 4)")).artifact["job"]
    async with asyncio.timeout(20):
        while (read := await use(session, "read_job", job=job)).artifact["running"]:
            await asyncio.sleep(0.05)
    assert read.artifact["exit_code"] == 4
    assert "bytes before this are left out" in text_of(read)
    assert text_of(read).endswith("99999\n100000\n")


async def test_an_unknown_job_is_an_error_that_the_model_can_act_on(session: Session) -> None:
    with pytest.raises(RetryableByModel, match="no job"):
        await use(session, "read_job", job="job-aaaaaaaa")
    with pytest.raises(ValueError, match="pattern"):
        await use(session, "read_job", job="../../etc/passwd")


async def test_a_file_is_written_listed_and_read_in_parts(session: Session) -> None:
    lines = [f"line {number}" for number in range(1, 1001)]
    written = await use(session, "write_file", path="notes/long.txt", content="\n".join(lines))
    assert text_of(written) == "Wrote 8892 bytes to /home/user/notes/long.txt."
    listed = text_of(await use(session, "list_files", path="notes"))
    assert listed == "/home/user/notes/long.txt  8892 bytes"

    first = text_of(await use(session, "read_file", path="notes/long.txt"))
    assert first.startswith("line 1\n")
    assert first.endswith("line 500\n[Lines 1 to 500 of 1000. Go on with `first_line` 501.]")
    rest = text_of(await use(session, "read_file", path="notes/long.txt", first_line=999))
    assert rest == "line 999\nline 1000"
    beyond = text_of(await use(session, "read_file", path="notes/long.txt", first_line=2000))
    assert beyond == "[The file has only 1000 lines.]"


async def test_an_image_is_seen_and_other_bytes_are_described(session: Session) -> None:
    await use(session, "run_code", code="import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.savefig('plot.png')")
    await use(session, "run_code", code="open('raw', 'wb').write(bytes(range(256)))")
    [image] = (await use(session, "read_file", path="plot.png")).blocks
    assert (image["type"], image["mime_type"]) == ("image", "image/png")
    assert "is not text: 256 bytes" in text_of(await use(session, "read_file", path="raw"))


async def test_a_long_file_of_long_lines_stays_within_what_a_model_reads(session: Session) -> None:
    await use(session, "run_code", code="open('wide', 'w').write('\u00e9' * 3_000_000 + '\\nend')")
    read = await use(session, "read_file", path="wide")
    assert len(text_of(read)) < TEXT_LIMIT + 200
    assert read.artifact["whole"] is False


@pytest.mark.parametrize(("name", "more"), [("read_file", {}), ("list_files", {})])
async def test_a_path_that_is_not_there_is_an_error_that_the_model_can_act_on(session, name, more) -> None:
    with pytest.raises(RetryableByModel, match="'missing'"):
        await use(session, name, path="missing", **more)


async def test_a_directory_is_no_file(session: Session) -> None:
    with pytest.raises(RetryableByModel, match="directory"):
        await use(session, "read_file", path="/tmp")


async def test_a_data_frame_is_a_table_for_the_model(session: Session) -> None:
    done = await use(session, "run_code", code="import pandas as pd\npd.DataFrame({'a': [1]})")
    assert text_of(done) == "|  | a |\n| --- | --- |\n| 0 | 1 |"


async def test_a_traceback_is_the_users_own_frames(session: Session) -> None:
    done = await use(session, "run_code", code="import json\njson.loads('{')")
    assert "json.loads('{')" in text_of(done)
    assert "of libraries left out" in text_of(done)
    assert "decoder.py" not in text_of(done)


async def test_silence_is_broken_by_signs_of_life(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox_tools.tools.live.SILENCE", 0.3)
    heard: list[dict[str, str]] = []
    await use(session, "run_code", code="import time; time.sleep(1)", heard=heard)
    assert [piece["stream"] for piece in heard][:2] == ["progress", "progress"]


async def test_a_port_is_opened_where_something_listens_and_keeps_the_sandbox_awake(session: Session) -> None:
    with pytest.raises(RetryableByModel, match="Nothing listens"):
        await use(session, "expose_port", port=8000)
    job = (await use(session, "start_job", command="python3 -m http.server 8000")).artifact["job"]
    async with asyncio.timeout(30):
        while True:
            try:
                shown = await use(session, "expose_port", port=8000, minutes=5)
                break
            except RetryableByModel:
                await asyncio.sleep(0.1)
    assert text_of(shown).startswith("Port 8000 is open to the user for 5 minutes")
    # This engine has no address but its socket.
    assert (shown.artifact["url"], shown.artifact["seconds"]) == (None, 300)
    await use(session, "stop_job", job=job)


class TestArtifacts:
    """Files handed in and out."""

    @pytest.fixture
    def artifacts(self, tmp_path: Path) -> Artifacts:
        return Artifacts(tmp_path / "artifacts")

    @pytest.fixture
    def directory(self, artifacts: Artifacts, session: Session) -> Path:
        directory = artifacts.directory(session.owner, session.thread)
        directory.mkdir(parents=True)
        return directory

    async def test_a_file_goes_in_and_its_result_comes_out(self, session, artifacts, directory) -> None:
        tools = {tool.name: tool for tool in artifacts.tools()}
        (directory / "data.csv").write_text("a,b\n1,2\n")
        await use(session, "upload_file", tools, name="data.csv")
        await use(session, "run_code", code="open('sum.txt', 'w').write(open('data.csv').read().upper())")
        done = await use(session, "download_file", tools, path="sum.txt")
        assert (directory / "sum.txt").read_text() == "A,B\n1,2\n"
        assert done.artifact["file"] | {"sha256": ""} == {
            "name": "sum.txt",
            "bytes": 8,
            "sha256": "",
            "mime_type": "text/plain",
        }
        assert sorted(os.listdir(directory)) == ["data.csv", "sum.txt"]

    @pytest.mark.parametrize("name", ["../data.csv", "/etc/passwd", "link", "", ".hidden", "missing", "a\0b", "fifo"])
    async def test_no_name_leads_out_of_the_conversations_directory(self, session, artifacts, directory, name) -> None:
        (directory.parent / "data.csv").write_text("another's")
        (directory / "link").symlink_to("/etc/passwd")
        (directory / ".hidden").write_text("")
        os.mkfifo(directory / "fifo")
        tools = {tool.name: tool for tool in artifacts.tools()}
        with pytest.raises(RetryableByModel, match="attached no"):
            await use(session, "upload_file", tools, name=name)

    @pytest.mark.parametrize("name", ["../out", "/tmp/out", "..", ".ssh"])
    async def test_nothing_is_handed_out_under_a_name_that_leads_elsewhere(self, session, artifacts, name) -> None:
        await use(session, "write_file", path="report", content="x")
        tools = {tool.name: tool for tool in artifacts.tools()}
        with pytest.raises(RetryableByModel, match="no name"):
            await use(session, "download_file", tools, path="report", name=name)

    async def test_what_is_missing_or_too_large_leaves_nothing_behind(
        self, session, artifacts, directory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sandbox_tools.tools.artifacts.LIMIT", 10)
        tools = {tool.name: tool for tool in artifacts.tools()}
        await use(session, "write_file", path="report", content="x" * 11)
        for path in ("report", "missing"):
            with pytest.raises(RetryableByModel):
                await use(session, "download_file", tools, path=path)
        assert os.listdir(directory) == []

    def test_no_two_conversations_share_a_directory(self, artifacts: Artifacts) -> None:
        pairs = [
            ("a", "b/c"),
            ("a/b", "c"),
            ("a", "b"),
            ("..", ".."),
            ("a%2Fb", "c"),
            ("x" * 300, "c"),
            ("x" * 301, "c"),
        ]
        directories = {artifacts.directory(owner, thread) for owner, thread in pairs}
        assert len(directories) == len(pairs)
        for directory in directories:
            assert directory.parent.parent == artifacts.root
            assert directory.resolve() == directory


async def test_deleting_is_for_good(session: Session) -> None:
    await use(session, "run_code", code="x = 1")
    assert "Deleted your sandbox" in text_of(await use(session, "delete_sandbox"))
    assert "no sandbox to delete" in text_of(await use(session, "delete_sandbox"))
    assert "NameError" in text_of(await use(session, "run_code", code="x"))


def test_tools_are_chosen_renamed_and_described() -> None:
    assert [tool.name for tool in choose()] == ["run_code", "pause_sandbox", "resume_sandbox", "list_paused_sandboxes"]
    [tool] = choose(["run_code"], renamed={"run_code": "python"}, described={"run_code": "Our own words."})
    assert (tool.name, tool.description) == ("python", "Our own words.")
    assert len(choose(["*"], artifacts=Artifacts("/nowhere"))) == len(CATALOG) + 2


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["run"], {}, "no tool 'run'"),
        (["upload_file"], {}, "needs `artifacts`"),
        (None, {"renamed": {"nothing": "x"}}, "no tool 'nothing'"),
        (None, {"renamed": {"run_code": "pause_sandbox"}}, "same name"),
    ],
)
def test_a_choice_that_can_not_work_is_refused(names, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(names, **options)


def test_every_tool_is_described_with_its_arguments() -> None:
    for tool in choose(["*"], artifacts=Artifacts("/nowhere")):
        assert len(tool.description) > 40, tool.name
        for name, field in tool.arguments.model_fields.items():
            assert field.description, (tool.name, name)
