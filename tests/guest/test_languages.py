"""Code in other languages than Python: bash through `bash_kernel`, JavaScript and TypeScript through Deno."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from sandbox_tools.guest import contexts, languages
from sandbox_tools.guest.scripts import BashScript

from .conftest import Events, Guest, of_type, text

pytestmark = pytest.mark.asyncio(loop_scope="module")

OTHERS = ("bash", "javascript")

READ = {
    "bash": 'echo "${SANDBOX-none} ${CONTEXT-none} ${CALL-none}"',
    "javascript": 'console.log(["SANDBOX", "CONTEXT", "CALL"].map((name) => Deno.env.get(name) ?? "none").join(" "))',
}


async def outcome(guest: Guest, code: str, **more: object) -> Events:
    """The events of code that does not fail."""
    events = await guest.run(code, **more)
    assert of_type(events, "error") == []
    assert events[-1]["type"] == "end_of_execution"
    return events


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("bash", "echo $((6 * 7))"),
        ("sh", "echo 42"),
        ("JavaScript", "console.log(6 * 7)"),
        ("js", "console.log(42)"),
        ("TS", "const answer: number = 42; console.log(answer)"),
        ("typescript", "console.log(42 as number)"),
        ("Python3", "print(42)"),
        ("py", "print(42)"),
    ],
)
async def test_a_language_is_known_by_its_names_in_any_case(guest: Guest, language: str, code: str) -> None:
    """PROTOCOL 3.1; the count comes first, as for Python."""
    events = await outcome(guest, code, language=language)

    assert events[0]["type"] == "number_of_executions"
    assert text(events) == "42\n"


async def test_each_language_has_one_default_context_that_begins_at_home(guest: Guest) -> None:
    await outcome(guest, "kept=5", language="bash")
    await outcome(guest, "let kept = 6", language="js")

    assert text(await outcome(guest, 'echo "$kept in $PWD"', language="bash")) == f"5 in {guest.cwd}\n"
    assert text(await outcome(guest, "console.log(kept, Deno.cwd())", language="javascript")) == f"6 {guest.cwd}\n"
    listed = [each["language"] for each in (await guest.http.get("/contexts")).json()]
    assert sorted(set(listed)) == sorted(listed)


@pytest.mark.parametrize("language", OTHERS)
async def test_a_context_of_a_language_has_its_directory_restarts_empty_and_is_deleted(
    guest: Guest, language: str
) -> None:
    made = (await guest.http.post("/contexts", json={"language": language, "cwd": "/tmp"})).json()
    assert made == {"id": made["id"], "language": language, "cwd": "/tmp"}
    where, keep, look = {
        "bash": ("pwd", "kept=1", "echo ${kept-gone}"),
        "javascript": ("console.log(Deno.cwd())", "let kept = 1", "console.log(typeof kept)"),
    }[language]
    assert text(await outcome(guest, where, context_id=made["id"])) == "/tmp\n"
    await outcome(guest, keep, context_id=made["id"])

    assert (await guest.http.post(f"/contexts/{made['id']}/restart")).status_code == 200
    assert text(await outcome(guest, look, context_id=made["id"])) in ("gone\n", "undefined\n")
    assert (await guest.http.delete(f"/contexts/{made['id']}")).status_code == 200


async def test_a_language_that_is_not_there_is_refused_with_the_names_of_those_that_are(guest: Guest) -> None:
    for answer in (
        await guest.http.post("/execute", json={"code": "1", "language": "r"}),
        await guest.http.post("/contexts", json={"language": "r"}),
    ):
        assert answer.status_code == 400
        assert "'r'" in answer.text
        assert "python, javascript, typescript, bash" in answer.text


async def test_a_kernelspec_in_a_jupyter_directory_makes_its_language_available(guest: Guest) -> None:
    """Here Python under another name, as an R or a Java kernel would be installed. A call's variables it can't take."""
    directory = guest.cwd / ".local/share/jupyter/kernels/own"
    directory.mkdir(parents=True)
    argv = [languages.sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "language": "Own", "display_name": "Own", "env": {"GIVEN": "by the kernelspec"}}
    (directory / "kernel.json").write_text(json.dumps(spec))
    (directory.parent / "broken").mkdir()
    (directory.parent / "broken/kernel.json").write_text("{")

    (result,) = of_type(await outcome(guest, "import os; os.environ['GIVEN']", language="own"), "result")
    assert result["text"] == "by the kernelspec"
    (error,) = of_type(await guest.run("ran = 1", language="own", env_vars={"A": "1"}), "error")
    assert "can't be set in own" in error["value"]
    (result,) = of_type(await outcome(guest, "'ran' in globals()", language="own"), "result")
    assert result["text"] == "False"


@pytest.mark.parametrize("language", OTHERS)
async def test_variables_of_sandbox_context_and_call_cover_each_other_and_those_of_a_call_are_taken_back(
    guest: Guest, language: str
) -> None:
    guest.settings.init(env_vars={"SANDBOX": "s", "CONTEXT": "s", "CALL": "s"})
    context = await guest.context(language=language, env_vars={"CONTEXT": "c", "CALL": "c"})
    code = READ[language]

    strange = "a'b\"c\\n$HOME\n`d`"
    assert text(await outcome(guest, code, context_id=context, env_vars={"CALL": strange})) == f"s c {strange}\n"
    assert text(await outcome(guest, code, context_id=context)) == "s c c\n"
    guest.settings.init(env_vars={"CALL": "new"})
    assert text(await outcome(guest, code, context_id=context, env_vars={"SANDBOX": "lent"})) == "lent c c\n"
    assert text(await outcome(guest, code, context_id=context)) == "none c c\n"
    await guest.http.delete(f"/contexts/{context}")


@pytest.mark.parametrize("language", OTHERS)
async def test_a_variable_that_cannot_be_set_is_an_error_and_the_code_does_not_run(guest: Guest, language: str) -> None:
    code = {"bash": "touch must-not-be", "javascript": 'Deno.writeTextFileSync("must-not-be", "")'}[language]
    for env in ({"A": "nul \0 inside"}, {"A=B": "1"}):
        events = await guest.run(code, language=language, env_vars=env)
        assert len(of_type(events, "error")) == 1

    assert not (guest.cwd / "must-not-be").exists()
    assert text(await outcome(guest, READ[language], language=language)).startswith("none none")


@pytest.mark.parametrize(
    ("language", "code", "name", "value"),
    [
        ("bash", "false", "ExitCode", "1"),
        ("bash", "no-such-command", "ExitCode", "127"),
        ("bash", "if true; then", "ExitCode", "2"),
        ("javascript", 'throw new TypeError("bad")', "TypeError", "bad"),
        ("typescript", "let broken = ;", "Error", "Execution failed"),
    ],
)
async def test_code_that_fails_is_one_error_event(
    guest: Guest, language: str, code: str, name: str, value: str
) -> None:
    events = await guest.run(code, language=language)

    (error,) = of_type(events, "error")
    assert (error["name"], error["value"]) == (name, value)
    assert events[-1]["type"] == "end_of_execution"


@pytest.mark.parametrize(
    ("language", "begin", "work"),
    [
        ("bash", "kept=1", "touch running; sleep 600"),
        ("javascript", "let stays = 1", 'Deno.writeTextFileSync("running", ""); while (true) {}'),
    ],
)
async def test_leaving_an_execution_interrupts_it_and_keeps_the_variables(
    guest: Guest, language: str, begin: str, work: str
) -> None:
    (guest.cwd / "running").unlink(missing_ok=True)
    await outcome(guest, begin, language=language)
    async with guest.stream(work, language=language):
        async with asyncio.timeout(20):
            while not (guest.cwd / "running").exists():
                await asyncio.sleep(0.01)

    look = {"bash": "echo $kept", "javascript": "console.log(stays)"}[language]
    assert text(await outcome(guest, look, language=language)) == "1\n"


async def test_a_line_of_javascript_is_seen_while_it_computes_however_soon_it_comes(guest: Guest) -> None:
    """No timer fires while it does."""
    await outcome(guest, "1", language="javascript")
    async with guest.stream('console.log("seen"); while (true) {}', language="javascript") as events:
        assert (await anext(event async for event in events if event["type"] == "stdout"))["text"] == "seen\n"


async def test_javascript_that_waits_for_ever_is_killed_for_the_caller_after_the_next(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V8 can stop code that runs, not a promise that is never kept."""
    monkeypatch.setattr(contexts, "PATIENCE", 2)
    context = await guest.context(language="js")
    async with guest.stream("console.log(1); await new Promise(() => {})", context_id=context) as events:
        while (await anext(events))["type"] != "stdout":
            pass

    (warned,) = of_type(await guest.run("1", context_id=context), "error")
    assert warned["name"] == "ExecutionAborted"
    (killed,) = of_type(await guest.run("1", context_id=context), "error")
    assert killed["name"] == "ContextRestarting"
    await outcome(guest, "1", context_id=context)
    await guest.http.delete(f"/contexts/{context}")


@pytest.mark.parametrize(
    ("language", "code", "how"),
    [("bash", "echo said; exit 3", "exit code 3"), ("javascript", "Deno.exit(3)", "exit code 3")],
)
async def test_code_that_ends_its_kernel_is_told_what_is_lost(guest: Guest, language: str, code: str, how: str) -> None:
    events = await guest.run(code, language=language)

    (error,) = of_type(events, "error")
    assert error["name"] == "ContextRestarting"
    assert how in error["value"]
    assert "variables of this context are lost" in error["value"]
    if language == "bash":
        assert text(events).startswith("said\n")
    assert text(await outcome(guest, READ[language], language=language)).startswith("none none")


async def test_bash_takes_code_whole_and_never_waits_for_input(guest: Guest) -> None:
    """Typed in line by line, `read` would eat the line after it."""
    code = """
cat <<END
a heredoc
END
read line; echo "[$line]"
for number in 1 2; do
    echo $number
done
printf 'no end of line'
"""
    assert text(await outcome(guest, code, language="bash")) == "a heredoc\n[]\n1\n2\nno end of line"


async def test_bash_shows_both_its_streams_in_order_and_what_jobs_say(guest: Guest) -> None:
    assert text(await outcome(guest, "echo out; echo err >&2; echo 'a!b'", language="bash")) == "out\nerr\na!b\n"
    await outcome(guest, "sleep 600 &", language="bash")
    assert "Terminated" in text(await outcome(guest, "kill %1; wait", language="bash"))


async def test_bash_with_a_changed_prompt_shows_no_prompt(guest: Guest) -> None:
    """As `activate` of a virtual environment changes it."""
    await outcome(guest, 'before=$PS1; PS1="(venv) $PS1"', language="bash")
    assert text(await outcome(guest, "echo shown", language="bash")) == "shown\n"
    await outcome(guest, "PS1=$before", language="bash")


async def test_bash_shows_pictures_that_are_handed_to_display(guest: Guest) -> None:
    """What `bash_kernel` has for it."""
    code = "echo before; printf '\\x89PNG\\r\\n\\x1a\\n' | display; echo after"
    events = await outcome(guest, code, language="bash")

    (shown,) = of_type(events, "result")
    assert shown["png"] == "iVBORw0KGgo="
    assert text(events) == "before\nafter\n"


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("bash", "seq 0 199999"),
        ("javascript", "for (let number = 0; number < 200000; number++) console.log(number)"),
    ],
)
async def test_long_output_arrives_whole_in_small_events(guest: Guest, language: str, code: str) -> None:
    events = await outcome(guest, code, language=language)

    assert text(events) == "".join(f"{number}\n" for number in range(200_000))
    assert max(len(event["text"]) for event in of_type(events, "stdout")) <= 64 * 1024


async def test_a_bash_line_that_has_not_ended_is_shown(guest: Guest) -> None:
    code = "printf 'begun '; until [ -e seen ]; do sleep 0.01; done; echo ended"
    seen: Events = []
    async with guest.stream(code, language="bash") as events:
        async for event in events:
            seen.append(event)
            if event["type"] == "stdout":
                (guest.cwd / "seen").touch()

    assert text(seen) == "begun ended\n"


async def test_everything_that_javascript_shows_comes_before_the_end(guest: Guest) -> None:
    """Deno says that it is idle before all its output has been sent."""
    code = 'console.log("out"); console.error("err"); await Deno.jupyter.display({"image/png": "AA=="}, {raw: true}); 7'
    for _ in range(20):
        events = await outcome(guest, code, language="js")
        assert (text(events), text(events, "stderr")) == ("out\n", "err\n")
        shown, value = of_type(events, "result")
        assert (shown["png"], shown["is_main_result"]) == ("AA==", False)
        assert (value["text"], value["is_main_result"]) == ("7", True)


async def test_a_kernel_leaves_no_file_behind(guest: Guest) -> None:
    run = guest.cwd.parent / "run"
    before = {path.name for path in run.iterdir()}
    for language in ("python", *OTHERS):
        context = await guest.context(language=language)
        await guest.http.delete(f"/contexts/{context}")

    assert {path.name for path in run.iterdir()} == before


async def test_what_bash_is_told_survives_any_value() -> None:
    """See `test_variables_...` for bash's own view of it."""
    assert BashScript().update({"A": "it's"}, ["B"]) == "export A='it'\\''s' &&\nunset -v B"
    with pytest.raises(ValueError, match="digits"):
        BashScript().lend({"0A": ""})


async def test_every_file_that_kernels_read_is_there() -> None:
    directory = Path(languages.__file__).parent
    assert {path.stem for path in directory.glob("in_*.py")} == {"in_bash", "in_kernel", "in_python", "in_results"}
