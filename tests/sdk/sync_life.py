"""What a user of a Python SDK does to a sandbox, blocking: its life from pause to kill, and what is refused.

Each step is a promise of the engine; `user.py` takes them in order.
"""

from __future__ import annotations

import uuid

from tests.sdk.steps import AbsentError, Steps, refused
from tests.sdk.texts import ENDLESS, METADATA, NUMBER, SERVER, WITNESS, Screen, until, web

step = Steps()


@step
def use_is_measured(my) -> None:
    last = until(lambda: my.sandbox.get_metrics())[-1]
    assert last.mem_total > last.mem_used > 0
    assert last.cpu_count >= 1


@step
def a_timeout_can_be_set_anew(my) -> None:
    my.sandbox.set_timeout(900)
    info = my.sandbox.get_info()
    assert (info.end_at - info.started_at).total_seconds() > 800


@step
def a_pause_stops_the_sandbox(my) -> None:
    """Everything that the steps after it look for is put in place here."""
    my.sandbox.run_code("kept = {'answer': 42}; log = open('/tmp/log', 'w'); written = log.write('before, ')")
    my.witness = my.sandbox.commands.run(WITNESS, background=True, timeout=0)
    until(lambda: my.sandbox.files.exists("/tmp/witness-number"))
    my.number = my.sandbox.files.read("/tmp/witness-number")
    my.terminal = my.sandbox.pty.create(my.core.PtySize(rows=24, cols=80), timeout=0)
    my.sandbox.pty.send_stdin(my.terminal.pid, f"KEPT={NUMBER}; echo set-$((KEPT))\n".encode())
    Screen(my.terminal).shows(f"set-{NUMBER}".encode())

    assert my.sandbox.pause() in (True, None)
    assert not my.sandbox.is_running()
    assert my.sandbox.get_info().state == my.core.SandboxState.PAUSED


@step
def a_command_s_stream_that_a_pause_cuts_ends_with_an_error(my) -> None:
    refused(my.says.error(my.says.cut_command), my.witness.wait)


@step
def a_paused_sandbox_can_t_be_used_or_paused_again(my) -> None:
    assert my.sandbox.pause() is my.says.second_pause
    refused(my.core.TimeoutException, lambda: my.sandbox.run_code("1"))
    refused(my.says.error(my.says.gone), lambda: my.sandbox.commands.run("true"))
    refused(my.says.error(my.says.gone), lambda: my.sandbox.files.read("/tmp/log"))
    refused(my.core.SandboxNotFoundException, lambda: my.sandbox.set_timeout(60))


@step
def paused_sandboxes_are_listed_by_metadata_and_in_pages(my) -> None:
    second = my.Sandbox.create(metadata=METADATA | {"second": "yes"})
    second.pause()
    query = my.core.SandboxQuery(state=[my.core.SandboxState.PAUSED], metadata=METADATA)

    pages = my.Sandbox.list(query=query, limit=1)
    found = []
    while pages.has_next:
        page = pages.next_items()
        assert len(page) <= 1
        found += [info.sandbox_id for info in page]
    assert found == [second.sandbox_id, my.sandbox.sandbox_id]

    if "order" in my.says.has:
        oldest_first = my.Sandbox.list(query=query, order="asc").next_items()
        assert [info.sandbox_id for info in oldest_first] == found[::-1]
        later = my.core.SandboxQuery(metadata=METADATA, started_after=oldest_first[0].started_at)
        assert [info.sandbox_id for info in my.Sandbox.list(query=later).next_items()] == [second.sandbox_id]

    assert second.kill()
    (left,) = my.Sandbox.list(query=query).next_items()
    assert left.sandbox_id == my.sandbox.sandbox_id
    running = my.core.SandboxQuery(state=[my.core.SandboxState.RUNNING], metadata=METADATA)
    assert my.Sandbox.list(query=running).next_items() == []


@step
def connect_wakes_it(my) -> None:
    paused = my.sandbox
    my.sandbox = my.Sandbox.connect(paused.sandbox_id, timeout=600)

    assert my.sandbox.sandbox_id == paused.sandbox_id
    assert my.sandbox.is_running()
    assert my.sandbox.get_info().metadata == METADATA


@step
def variables_survive_a_pause(my) -> None:
    assert my.sandbox.run_code("kept['answer']").text == "42"


@step
def an_open_file_survives_a_pause(my) -> None:
    my.sandbox.run_code("written += log.write('after'); log.close()")
    assert my.sandbox.files.read("/tmp/log") == "before, after"


@step
def a_background_process_survives_a_pause(my) -> None:
    assert my.witness.pid in [process.pid for process in my.sandbox.commands.list()]
    my.sandbox.files.write("/tmp/witness-asked", "")
    until(lambda: my.sandbox.files.exists("/tmp/witness-answer"))
    assert my.sandbox.files.read("/tmp/witness-answer") == my.number
    joined = my.sandbox.commands.connect(my.witness.pid, timeout=0)
    assert my.sandbox.commands.kill(my.witness.pid)
    refused(my.core.CommandExitException, joined.wait)


@step
def a_server_survives_a_pause(my) -> None:
    assert my.server.pid in [process.pid for process in my.sandbox.commands.list()]
    assert web().get(my.url).text == "served from inside\n"


@step
def a_terminal_s_variables_survive_a_pause(my) -> None:
    screen = Screen(my.sandbox.pty.connect(my.terminal.pid, timeout=0))
    my.sandbox.pty.send_stdin(my.terminal.pid, b"echo again-$((KEPT+1))\n")
    screen.shows(f"again-{NUMBER + 1}".encode())
    my.sandbox.pty.kill(my.terminal.pid)


@step
def a_pause_without_memory_keeps_the_files(my) -> None:
    if my.says.pause_without_memory is None:
        raise AbsentError(f"{my.says.package} can't pause without memory")

    sandbox = my.Sandbox.create(timeout=300)
    sandbox.run_code("forgotten = 1")
    sandbox.files.write("note", "kept")
    assert sandbox.pause(**my.says.pause_without_memory)

    sandbox.connect()
    assert sandbox.files.read("note") == "kept"
    assert sandbox.run_code("forgotten").error.name == "NameError"
    assert sandbox.kill()


@step
def a_paused_sandbox_can_be_rebooted(my) -> None:
    if "reboot" not in my.says.has:
        raise AbsentError(f"{my.says.package} can't reboot on connect")

    sandbox = my.Sandbox.create(timeout=300)
    sandbox.run_code("forgotten = 1; open('note', 'w').write('kept')")
    sandbox.pause()

    sandbox.connect(on_resume="reboot")
    assert sandbox.run_code("open('note').read()").text == "kept"
    assert sandbox.run_code("forgotten").error.name == "NameError"
    assert sandbox.kill()


@step
def a_sandbox_can_be_reset(my) -> None:
    if "reset" not in my.says.has:
        raise AbsentError(f"{my.says.package} can't reset")

    sandbox = my.Sandbox.create(timeout=300)
    sandbox.run_code("forgotten = 1; open('note', 'w').write('kept')")
    assert sandbox.reset()
    assert sandbox.run_code("open('note').read()").text == "kept"
    assert sandbox.run_code("forgotten").error.name == "NameError"
    assert sandbox.kill()


@step
def a_timeout_pauses_where_that_was_asked_for(my) -> None:
    sandbox = my.Sandbox.create(timeout=300, **my.says.pause_on_timeout)
    sandbox.run_code("kept = 'over the timeout'")
    sandbox.set_timeout(1)
    until(lambda: sandbox.get_info().state == my.core.SandboxState.PAUSED)

    sandbox = my.Sandbox.connect(sandbox.sandbox_id)
    assert sandbox.run_code("kept").text == "over the timeout"
    assert sandbox.kill()


@step
def a_timeout_kills_where_nothing_was_asked_for(my) -> None:
    sandbox = my.Sandbox.create(timeout=300)
    sandbox.set_timeout(1)
    until(lambda: not sandbox.is_running())
    refused(my.core.SandboxNotFoundException, sandbox.get_info)


@step
def traffic_wakes_a_sandbox_that_was_made_so(my) -> None:
    if my.says.wake_on_traffic is None:
        raise AbsentError(f"{my.says.package} can't ask for that on a legacy domain")

    sandbox = my.Sandbox.create(timeout=300, **my.says.wake_on_traffic)
    sandbox.run_code("kept = 'asleep'")
    sandbox.pause()
    assert sandbox.run_code("kept").text == "asleep"
    sandbox.pause()
    assert sandbox.commands.run("echo awake").stdout == "awake\n"
    assert sandbox.kill()


@step
def private_traffic_needs_the_sandbox_s_token(my) -> None:
    if "private traffic" not in my.says.has:
        raise AbsentError(f"{my.says.package} can't ask for that on a legacy domain")

    sandbox = my.Sandbox.create(timeout=300, network={"allow_public_traffic": False})
    sandbox.commands.run(SERVER, background=True, timeout=0)
    url = f"https://{sandbox.get_host(8000)}/page.html"
    headers = {"E2B-Traffic-Access-Token": sandbox.traffic_access_token}
    until(lambda: web().get(url, headers=headers).status_code == 200)
    assert web().get(url).status_code == 403
    assert (sandbox.run_code("1 + 1")).text == "2"
    assert sandbox.kill()


@step
def a_snapshot_makes_sandboxes_with_its_memory(my) -> None:
    if "snapshots" not in my.says.has:
        raise AbsentError(f"{my.says.package} has no snapshots on a legacy domain")

    my.sandbox.run_code("kept['answer'] = 43")
    snapshot = my.sandbox.create_snapshot()
    assert my.sandbox.run_code("kept['answer'] += 1; kept['answer']").text == "44"
    assert snapshot.snapshot_id in [known.snapshot_id for known in my.sandbox.list_snapshots().next_items()]

    sandbox = my.Sandbox.create(template=snapshot.snapshot_id)
    assert sandbox.run_code("kept['answer']").text == "43"
    assert sandbox.kill()
    assert my.Sandbox.delete_snapshot(snapshot.snapshot_id)
    assert not my.Sandbox.delete_snapshot(snapshot.snapshot_id)


@step
def copies_have_the_memory_and_go_their_own_ways(my) -> None:
    my.sandbox.files.write("/tmp/copied", "from the first")
    my.sandbox.run_code("kept['answer'] = 50")
    if "fork" in my.says.has:
        copies = my.sandbox.fork(count=2, timeout=300)
    else:
        copies = my.Sandbox.clone(my.sandbox.sandbox_id, count=2, timeout=300).sandboxes
    assert len({copy.sandbox_id for copy in (my.sandbox, *copies)}) == 3

    for own, copy in enumerate(copies):
        assert copy.files.read("/tmp/copied") == "from the first"
        assert my.server.pid in [process.pid for process in copy.commands.list()]
        copy.files.write("/tmp/copied", "copy")
        if "code in copies" in my.says.has:
            assert copy.run_code(f"kept['answer'] += {own}; kept['answer']").text == str(50 + own)
    assert my.sandbox.files.read("/tmp/copied") == "from the first"
    assert my.sandbox.run_code("kept['answer']").text == "50"
    assert all(copy.kill() for copy in copies)


@step
def what_only_a_cloud_has_is_refused_in_words(my) -> None:
    """By an error of the SDK's own, not by a crash of it."""
    core, sandbox = my.core, my.sandbox
    calls = [
        lambda: my.Sandbox.create(volume_mounts={"/mnt/data": "a-volume"}),
        lambda: my.Sandbox.create(mcp={"exa": {"apiKey": "a-key"}}),
        lambda: core.Volume.create("a-volume"),
        lambda: core.Secret.create(name="a-secret", value="its value", **my.says.secret),
        lambda: core.Template.build(core.Template().from_python_image("3"), "a-template"),
    ]
    if "accounts" in my.says.has:
        calls += [
            lambda: my.Sandbox.create(secret_envs={"TOKEN": "a-secret"}),
            lambda: my.Sandbox.get_quota(),
            lambda: my.Sandbox.get_events(),
            lambda: sandbox.set_network(deny_out=["0.0.0.0/0"]),
            lambda: sandbox.mount_volume("a-volume", "/mnt/data"),
            lambda: sandbox.hotplug_memory(512),
            lambda: sandbox.commit(),
        ]
    else:
        calls.append(lambda: sandbox.update_network({"deny_out": ["0.0.0.0/0"]}))
    for call in calls:
        error = refused(Exception, call)
        assert type(error).__module__.startswith(my.says.package), repr(error)
        assert "local engine" in str(error) or "legacy domains" in str(error), repr(error)


@step
def code_whose_sandbox_is_paused_ends_with_an_error(my) -> None:
    sandbox = my.Sandbox.create(timeout=300)
    sandbox.run_code("kept = 'whole'")
    refused(
        my.says.error(my.says.cut_code), lambda: sandbox.run_code(ENDLESS, on_stdout=lambda _message: sandbox.pause())
    )

    sandbox = my.Sandbox.connect(sandbox.sandbox_id)
    assert sandbox.run_code("kept").text == "whole"
    assert sandbox.kill()


@step
def code_whose_sandbox_is_killed_ends_with_an_error(my) -> None:
    sandbox = my.Sandbox.create(timeout=300)
    refused(
        my.says.error(my.says.cut_code), lambda: sandbox.run_code(ENDLESS, on_stdout=lambda _message: sandbox.kill())
    )


@step
def kill_ends_it_once(my) -> None:
    assert my.sandbox.kill() is True
    assert my.sandbox.kill() is False
    assert not my.sandbox.is_running()


@step
def a_killed_sandbox_is_known_as_gone(my) -> None:
    core, sandbox = my.core, my.sandbox
    refused(core.SandboxNotFoundException, sandbox.get_info)
    refused(core.SandboxNotFoundException, sandbox.pause)
    refused(core.SandboxNotFoundException, lambda: sandbox.set_timeout(60))
    refused(core.SandboxNotFoundException, lambda: my.Sandbox.connect(sandbox.sandbox_id))
    refused(core.TimeoutException, lambda: sandbox.run_code("1"))
    refused(my.says.error(my.says.gone), lambda: sandbox.commands.run("true"))
    refused(my.says.error(my.says.gone), lambda: sandbox.files.read("/tmp/log"))
    assert web().get(my.url).status_code == 502


@step
def what_was_never_there_is_refused(my) -> None:
    core = my.core
    refused(core.SandboxNotFoundException, lambda: my.Sandbox.connect("inosuchsandbox0000000"))
    error = refused(core.SandboxException, lambda: my.Sandbox.create(template="no-such-template"))
    assert "404" in str(error)
    assert "no-such-template" in str(error)
    assert my.Sandbox.kill("inosuchsandbox0000000") is False


@step
def one_key_makes_one_sandbox(my) -> None:
    if "create by key" not in my.says.has:
        raise AbsentError(f"{my.says.package} sends no key with a create")

    key = uuid.uuid4().hex
    first, again = [my.Sandbox.create(idempotency_key=key) for _ in range(2)]
    assert first.sandbox_id == again.sandbox_id
    assert first.kill()
    assert not again.kill()


@step
def a_wrong_key_is_refused(my) -> None:
    refused(my.core.AuthenticationException, lambda: my.Sandbox.create(api_key="e2b_wrong"))
    refused(my.core.AuthenticationException, lambda: my.Sandbox.list(api_key="e2b_wrong").next_items())
