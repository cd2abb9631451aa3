"""What a user of a Python SDK does with a sandbox, blocking.

Each step is a promise of the engine; `user.py` takes them in order.
"""

from __future__ import annotations

import io

from tests.sdk.steps import AbsentError, Steps, refused
from tests.sdk.texts import KINDS, METADATA, PLOT, READY_THEN_GO, SERVER, Screen, until, web

step = Steps()


def gone(my, pid: int) -> bool:
    """Whether a command is no longer listed."""
    return pid not in [process.pid for process in my.sandbox.commands.list()]


@step
def a_sandbox_is_created_with_metadata_variables_and_a_timeout(my) -> None:
    my.sandbox = my.Sandbox.create(timeout=300, metadata=METADATA, envs={"GREETING": "hello"})

    info = my.sandbox.get_info()
    assert info.sandbox_id in my.sandbox.sandbox_id
    assert info.metadata == METADATA
    assert info.state == my.core.SandboxState.RUNNING
    assert 295 < (info.end_at - info.started_at).total_seconds() < 305
    assert my.sandbox.is_running()


@step
def code_gives_its_value(my) -> None:
    execution = my.sandbox.run_code("import os; os.environ['GREETING'] + ' world'")

    assert execution.text == "hello world"
    assert execution.error is None
    assert execution.execution_count == 1


@step
def a_call_s_own_variables_are_seen_by_that_call_only(my) -> None:
    seen = "import os; os.environ.get('OWN')"
    assert my.sandbox.run_code(seen, envs={"OWN": "for once"}).text == "for once"
    assert my.sandbox.run_code(seen).text is None


@step
def a_plot_comes_as_an_image_and_as_a_chart(my) -> None:
    (result,) = my.sandbox.run_code(PLOT).results

    assert result.png.startswith("iVBOR")
    assert result.chart.type.value == "bar"
    assert result.chart.title == "Sales"
    assert [(bar.label, float(bar.value)) for bar in result.chart.elements] == [("Q1", 3.0), ("Q2", 5.0)]


@step
def results_come_in_every_kind(my) -> None:
    execution = my.sandbox.run_code(KINDS)
    given = {kind for result in execution.results for kind in result.formats()}
    assert {"html", "markdown", "svg", "latex", "json", "javascript", "data"} <= given, given


@step
def output_streams_while_the_code_runs(my) -> None:
    """The code goes on only when its first line has been answered."""
    heard: list[str] = []

    def on_stdout(message) -> None:
        heard.append(message.line)
        if "ready" in message.line:
            my.sandbox.files.write("/tmp/go-code", "")

    results: list[str] = []
    execution = my.sandbox.run_code(
        READY_THEN_GO.format(path="/tmp/go-code"),
        on_stdout=on_stdout,
        on_stderr=lambda message: heard.append(message.line),
        on_result=lambda result: results.append(result.text),
    )

    assert "ready\n" in heard
    assert "warned\n" in heard
    assert results == ["'done'"] or results == ["done"]
    assert "".join(execution.logs.stdout) == "ready\n"


@step
def code_that_raises_is_a_result(my) -> None:
    errors: list[str] = []
    execution = my.sandbox.run_code("1 / 0", on_error=lambda error: errors.append(error.name))

    assert errors == ["ZeroDivisionError"]
    assert execution.error.value == "division by zero"
    assert "1 / 0" in execution.error.traceback


@step
def code_that_runs_too_long_is_stopped_and_its_context_goes_on(my) -> None:
    my.sandbox.run_code("before = 'kept'")
    refused(
        my.core.TimeoutException, lambda: my.sandbox.run_code("import time\nwhile True: time.sleep(0.1)", timeout=1)
    )
    assert my.sandbox.run_code("before").text == "kept"


@step
def contexts_have_their_own_names_and_directories(my) -> None:
    context = my.sandbox.create_code_context(cwd="/tmp", language="python")
    assert my.sandbox.run_code("import os; mine = 1; os.getcwd()", context=context).text == "/tmp"
    assert my.sandbox.run_code("mine").error.name == "NameError"
    assert context.id in [known.id for known in my.sandbox.list_code_contexts()]

    my.sandbox.restart_code_context(context)
    assert my.sandbox.run_code("mine", context=context).error.name == "NameError"

    my.sandbox.remove_code_context(context)
    refused(my.core.NotFoundException, lambda: my.sandbox.run_code("1", context=context))


@step
def other_languages_have_kernels_of_their_own(my) -> None:
    my.sandbox.run_code("WORD=shell", language="bash")
    assert "".join(my.sandbox.run_code("echo $WORD", language="bash").logs.stdout) == "shell\n"
    assert my.sandbox.run_code("[1, 2].map(n => n * 2).join()", language="js").text == "2,4"


@step
def a_language_without_a_kernel_is_refused_in_words(my) -> None:
    error = refused(my.core.SandboxException, lambda: my.sandbox.run_code("1", language="cobol"))
    assert "cobol" in str(error)


@step
def a_command_gives_its_output_and_exit_code(my) -> None:
    result = my.sandbox.commands.run("echo $GREETING $OWN; pwd; echo problem >&2", envs={"OWN": "you"}, cwd="/tmp")

    assert result.stdout == "hello you\n/tmp\n"
    assert result.stderr == "problem\n"
    assert result.exit_code == 0
    assert my.sandbox.commands.run("whoami; pwd").stdout == "user\n/home/user\n"
    assert my.sandbox.commands.run("whoami", user="root").stdout == "root\n"


@step
def a_command_that_fails_raises_with_all_it_said(my) -> None:
    error = refused(my.core.CommandExitException, lambda: my.sandbox.commands.run("echo so far; echo no >&2; exit 3"))
    assert (error.exit_code, error.stdout, error.stderr) == (3, "so far\n", "no\n")


@step
def a_command_s_output_streams_while_it_runs(my) -> None:
    def on_stdout(text: str) -> None:
        if "ready" in text:
            my.sandbox.files.write("/tmp/go-command", "")

    waits = "echo ready; until [ -e /tmp/go-command ]; do sleep 0.05; done; echo done"
    assert my.sandbox.commands.run(waits, on_stdout=on_stdout).stdout == "ready\ndone\n"


@step
def a_background_command_is_listed_joined_and_killed(my) -> None:
    started = my.sandbox.commands.run("echo up; exec sleep 1000", background=True)
    assert started.pid in [process.pid for process in my.sandbox.commands.list()]

    joined = my.sandbox.commands.connect(started.pid)
    assert joined.pid == started.pid
    assert my.sandbox.commands.kill(started.pid)
    refused(my.core.CommandExitException, joined.wait)
    until(lambda: gone(my, started.pid))


@step
def a_command_reads_what_is_sent_to_it(my) -> None:
    reader = my.sandbox.commands.run("head -n 2 | tr a-z A-Z", background=True, stdin=True)
    my.sandbox.commands.send_stdin(reader.pid, "one\n")
    my.sandbox.commands.send_stdin(reader.pid, "two\n")
    assert reader.wait().stdout == "ONE\nTWO\n"


@step
def the_end_of_a_command_s_input_can_be_sent(my) -> None:
    if "close stdin" not in my.says.has:
        raise AbsentError(f"{my.says.package} can't close a command's input")

    reader = my.sandbox.commands.run("cat", background=True, stdin=True)
    my.sandbox.commands.send_stdin(reader.pid, "all\n")
    my.sandbox.commands.close_stdin(reader.pid)
    assert reader.wait().stdout == "all\n"


@step
def a_command_s_input_can_be_streamed(my) -> None:
    if "streamed input" not in my.says.has:
        raise AbsentError(f"{my.says.package} can't stream a command's input")

    reader = my.sandbox.commands.run("head -n 2 | tr a-z A-Z", background=True, stdin=True)
    my.sandbox.commands.stream_input(reader.pid, ["one\n", "two\n"])
    assert reader.wait().stdout == "ONE\nTWO\n"


@step
def a_command_past_its_timeout_is_ended(my) -> None:
    refused(my.core.TimeoutException, lambda: my.sandbox.commands.run("exec sleep 1234", timeout=1))
    until(lambda: my.sandbox.commands.run("pgrep -f '[s]leep 1234' || echo none").stdout == "none\n")


@step
def files_are_written_and_read(my) -> None:
    files = my.sandbox.files
    written = files.write("notes/größe.txt", "größer\n")
    assert written.path == "/home/user/notes/größe.txt"
    assert files.read("notes/größe.txt") == "größer\n"

    every_byte = bytes(range(256)) * 5000
    files.write("/tmp/every-byte", every_byte)
    assert bytes(files.read("/tmp/every-byte", format="bytes")) == every_byte
    assert b"".join(files.read("/tmp/every-byte", format="stream")) == every_byte

    files.write("/tmp/zipped", "again " * 1000, gzip=True)
    assert files.read("/tmp/zipped", gzip=True) == "again " * 1000
    files.write("/tmp/from-a-file", io.BytesIO(every_byte))
    assert files.get_info("/tmp/from-a-file").size == len(every_byte)

    many = [{"path": f"/tmp/many/{number}", "data": str(number)} for number in range(3)]
    assert [info.path for info in files.write_files(many)] == [file["path"] for file in many]
    assert files.read("/tmp/many/2") == "2"


@step
def files_are_found_moved_and_removed(my) -> None:
    files = my.sandbox.files
    assert files.make_dir("/tmp/made/deep") is True
    assert files.make_dir("/tmp/made/deep") is False
    files.write("/tmp/made/deep/file", "12345")
    assert [entry.path for entry in files.list("/tmp/made", depth=2)] == ["/tmp/made/deep", "/tmp/made/deep/file"]

    assert files.rename("/tmp/made/deep/file", "/tmp/made/moved").path == "/tmp/made/moved"
    assert not files.exists("/tmp/made/deep/file")
    moved = files.get_info("/tmp/made/moved")
    assert (moved.name, moved.size, moved.owner, moved.permissions) == ("moved", 5, "user", "-rw-r--r--")
    assert moved.type == my.core.FileType.FILE

    files.remove("/tmp/made")
    assert not files.exists("/tmp/made")


@step
def files_belong_to_the_user_who_writes_them(my) -> None:
    files = my.sandbox.files
    files.write("/root/secret", "for root", user="root")
    assert files.read("/root/secret", user="root") == "for root"
    assert files.get_info("/root/secret", user="root").owner == "root"


@step
def files_carry_metadata(my) -> None:
    if "file metadata" not in my.says.has:
        raise AbsentError(f"{my.says.package} has no metadata of files")

    my.sandbox.files.write("/tmp/tagged", "", metadata={"source": "a test"})
    assert my.sandbox.files.get_info("/tmp/tagged").metadata == {"source": "a test"}


@step
def signed_urls_move_files_without_the_sdk(my) -> None:
    answer = web().post(my.sandbox.upload_url("/tmp/signed", user="user"), files={"file": b"by url"})
    assert answer.status_code == 200, answer.text
    url = my.sandbox.download_url("/tmp/signed", user="user")
    assert web().get(url).text == "by url"
    if "secure" in my.says.has:
        assert web().get(url.replace("signature=v1_", "signature=v1_x")).status_code == 401
        old = my.sandbox.download_url("/tmp/signed", user="user", use_signature_expiration=-10)
        assert web().get(old).status_code == 401


@step
def what_goes_wrong_with_files_has_its_own_error(my) -> None:
    files, core = my.sandbox.files, my.core
    refused(core.FileNotFoundException, lambda: files.read("/nowhere"))
    refused(core.FileNotFoundException, lambda: files.list("/nowhere"))
    refused(core.FileNotFoundException, lambda: files.rename("/nowhere", "/tmp/there"))
    refused(core.InvalidArgumentException, lambda: files.read("/tmp"))
    refused(core.AuthenticationException, lambda: files.read("/etc/hostname", user="nobody-here"))
    refused(core.AuthenticationException, lambda: my.sandbox.commands.run("true", user="nobody-here"))
    refused(core.InvalidArgumentException, lambda: my.sandbox.commands.run("true", cwd="/nowhere"))


@step
def a_repository_is_kept_with_git(my) -> None:
    git = my.sandbox.git
    git.init("repository", initial_branch="main")
    my.sandbox.files.write("repository/file", "1")
    git.add("repository")
    git.commit("repository", "A first commit", author_name="A user", author_email="user@example.org")
    status = git.status("repository")
    assert (status.current_branch, status.is_clean) == ("main", True)


@step
def a_terminal_takes_input_is_resized_and_killed(my) -> None:
    terminal = my.sandbox.pty.create(my.core.PtySize(rows=24, cols=80), timeout=0, envs={"OWN": "seven"})
    screen = Screen(terminal)
    my.sandbox.pty.send_stdin(terminal.pid, b"echo $OWN-$((6*7)) $(stty size)\n")
    screen.shows(b"seven-42 24 80")

    my.sandbox.pty.resize(terminal.pid, my.core.PtySize(rows=40, cols=100))
    my.sandbox.pty.send_stdin(terminal.pid, b"echo now $(stty size)\n")
    screen.shows(b"now 40 100")

    assert my.sandbox.pty.kill(terminal.pid)
    until(lambda: gone(my, terminal.pid))


@step
def a_watched_directory_tells_what_happens_in_it(my) -> None:
    files, kind = my.sandbox.files, my.core.FilesystemEventType
    files.make_dir("/tmp/watched")
    watch = files.watch_dir("/tmp/watched", recursive=True)
    files.write("/tmp/watched/new", "1")
    files.make_dir("/tmp/watched/sub")
    files.rename("/tmp/watched/new", "/tmp/watched/renamed")
    files.remove("/tmp/watched/renamed")

    seen: set = set()
    expected = {
        *(("new", one) for one in (kind.CREATE, kind.WRITE, kind.RENAME)),
        ("sub", kind.CREATE),
        ("renamed", kind.REMOVE),
    }
    until(lambda: seen.update((event.name, event.type) for event in watch.get_new_events()) or expected <= seen)
    watch.stop()
    refused(my.core.SandboxException, watch.get_new_events)


@step
def a_port_that_the_sandbox_opens_is_reached_from_outside(my) -> None:
    my.server = my.sandbox.commands.run(SERVER, background=True, timeout=0)
    my.url = f"https://{my.sandbox.get_host(8000)}/page.html"
    until(lambda: web().get(my.url).status_code == 200)
    assert web().get(my.url).text == "served from inside\n"
    closed = web().get(f"https://{my.sandbox.get_host(8001)}/")
    assert (closed.status_code, "port is not open" in closed.text) == (502, True)
