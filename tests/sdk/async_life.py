"""What a user of a Python SDK does to a sandbox, awaited: its life from pause to kill, and what is refused.

Each step is a promise of the engine; `user.py` takes them in order.
"""

from __future__ import annotations

import asyncio
import uuid

from tests.sdk.steps import AbsentError, Steps, arefused
from tests.sdk.texts import ENDLESS, METADATA, NUMBER, SERVER, WITNESS, AsyncScreen, auntil, until, web

step = Steps()


async def is_paused(my, sandbox) -> bool:
    """What its info says."""
    return (await sandbox.get_info()).state == my.core.SandboxState.PAUSED


async def is_down(sandbox) -> bool:
    """Whether its address answers no more."""
    return not await sandbox.is_running()


@step
async def use_is_measured(my) -> None:
    last = (await auntil(my.sandbox.get_metrics))[-1]
    assert last.mem_total > last.mem_used > 0
    assert last.cpu_count >= 1


@step
async def a_timeout_can_be_set_anew(my) -> None:
    await my.sandbox.set_timeout(900)
    info = await my.sandbox.get_info()
    assert (info.end_at - info.started_at).total_seconds() > 800


@step
async def a_pause_stops_the_sandbox(my) -> None:
    """Everything that the steps after it look for is put in place here."""
    await my.sandbox.run_code("kept = {'answer': 42}; log = open('/tmp/log', 'w'); written = log.write('before, ')")
    my.witness = await my.sandbox.commands.run(WITNESS, background=True, timeout=0)
    await auntil(lambda: my.sandbox.files.exists("/tmp/witness-number"))
    my.number = await my.sandbox.files.read("/tmp/witness-number")
    screen, size = AsyncScreen(), my.core.PtySize(rows=24, cols=80)
    my.terminal = await my.sandbox.pty.create(size, screen.on_data, timeout=0)
    await my.sandbox.pty.send_stdin(my.terminal.pid, f"KEPT={NUMBER}; echo set-$((KEPT))\n".encode())
    await screen.shows(f"set-{NUMBER}".encode())

    assert await my.sandbox.pause() in (True, None)
    assert not await my.sandbox.is_running()
    assert (await my.sandbox.get_info()).state == my.core.SandboxState.PAUSED


@step
async def a_command_s_stream_that_a_pause_cuts_ends_with_an_error(my) -> None:
    await arefused(my.says.error(my.says.cut_command), my.witness.wait())


@step
async def a_paused_sandbox_can_t_be_used_or_paused_again(my) -> None:
    assert await my.sandbox.pause() is my.says.second_pause
    await arefused(my.core.TimeoutException, my.sandbox.run_code("1"))
    await arefused(my.says.error(my.says.gone), my.sandbox.commands.run("true"))
    await arefused(my.says.error(my.says.gone), my.sandbox.files.read("/tmp/log"))
    await arefused(my.core.SandboxNotFoundException, my.sandbox.set_timeout(60))


@step
async def paused_sandboxes_are_listed_by_metadata_and_in_pages(my) -> None:
    second = await my.Sandbox.create(metadata=METADATA | {"second": "yes"})
    await second.pause()
    query = my.core.SandboxQuery(state=[my.core.SandboxState.PAUSED], metadata=METADATA)

    pages = my.Sandbox.list(query=query, limit=1)
    found = []
    while pages.has_next:
        page = await pages.next_items()
        assert len(page) <= 1
        found += [info.sandbox_id for info in page]
    assert found == [second.sandbox_id, my.sandbox.sandbox_id]

    if "order" in my.says.has:
        oldest_first = await my.Sandbox.list(query=query, order="asc").next_items()
        assert [info.sandbox_id for info in oldest_first] == found[::-1]
        later = my.core.SandboxQuery(metadata=METADATA, started_after=oldest_first[0].started_at)
        assert [info.sandbox_id for info in await my.Sandbox.list(query=later).next_items()] == [second.sandbox_id]

    assert await second.kill()
    (left,) = await my.Sandbox.list(query=query).next_items()
    assert left.sandbox_id == my.sandbox.sandbox_id
    running = my.core.SandboxQuery(state=[my.core.SandboxState.RUNNING], metadata=METADATA)
    assert await my.Sandbox.list(query=running).next_items() == []


@step
async def connect_wakes_it(my) -> None:
    paused = my.sandbox
    my.sandbox = await my.Sandbox.connect(paused.sandbox_id, timeout=600)

    assert my.sandbox.sandbox_id == paused.sandbox_id
    assert await my.sandbox.is_running()
    assert (await my.sandbox.get_info()).metadata == METADATA


@step
async def variables_survive_a_pause(my) -> None:
    assert (await my.sandbox.run_code("kept['answer']")).text == "42"


@step
async def an_open_file_survives_a_pause(my) -> None:
    await my.sandbox.run_code("written += log.write('after'); log.close()")
    assert await my.sandbox.files.read("/tmp/log") == "before, after"


@step
async def a_background_process_survives_a_pause(my) -> None:
    assert my.witness.pid in [process.pid for process in await my.sandbox.commands.list()]
    await my.sandbox.files.write("/tmp/witness-asked", "")
    await auntil(lambda: my.sandbox.files.exists("/tmp/witness-answer"))
    assert await my.sandbox.files.read("/tmp/witness-answer") == my.number
    joined = await my.sandbox.commands.connect(my.witness.pid, timeout=0)
    assert await my.sandbox.commands.kill(my.witness.pid)
    await arefused(my.core.CommandExitException, joined.wait())


@step
async def a_server_survives_a_pause(my) -> None:
    assert my.server.pid in [process.pid for process in await my.sandbox.commands.list()]
    assert web().get(my.url).text == "served from inside\n"


@step
async def a_terminal_s_variables_survive_a_pause(my) -> None:
    screen = AsyncScreen()
    await my.sandbox.pty.connect(my.terminal.pid, screen.on_data, timeout=0)
    await my.sandbox.pty.send_stdin(my.terminal.pid, b"echo again-$((KEPT+1))\n")
    await screen.shows(f"again-{NUMBER + 1}".encode())
    await my.sandbox.pty.kill(my.terminal.pid)


@step
async def a_pause_without_memory_keeps_the_files(my) -> None:
    if my.says.pause_without_memory is None:
        raise AbsentError(f"{my.says.package} can't pause without memory")

    sandbox = await my.Sandbox.create(timeout=300)
    await sandbox.run_code("forgotten = 1")
    await sandbox.files.write("note", "kept")
    assert await sandbox.pause(**my.says.pause_without_memory)

    await sandbox.connect()
    assert await sandbox.files.read("note") == "kept"
    assert (await sandbox.run_code("forgotten")).error.name == "NameError"
    assert await sandbox.kill()


@step
async def a_paused_sandbox_can_be_rebooted(my) -> None:
    if "reboot" not in my.says.has:
        raise AbsentError(f"{my.says.package} can't reboot on connect")

    sandbox = await my.Sandbox.create(timeout=300)
    await sandbox.run_code("forgotten = 1; open('note', 'w').write('kept')")
    await sandbox.pause()

    await sandbox.connect(on_resume="reboot")
    assert (await sandbox.run_code("open('note').read()")).text == "kept"
    assert (await sandbox.run_code("forgotten")).error.name == "NameError"
    assert await sandbox.kill()


@step
async def a_sandbox_can_be_reset(my) -> None:
    if "reset" not in my.says.has:
        raise AbsentError(f"{my.says.package} can't reset")

    sandbox = await my.Sandbox.create(timeout=300)
    await sandbox.run_code("forgotten = 1; open('note', 'w').write('kept')")
    assert await sandbox.reset()
    assert (await sandbox.run_code("open('note').read()")).text == "kept"
    assert (await sandbox.run_code("forgotten")).error.name == "NameError"
    assert await sandbox.kill()


@step
async def a_timeout_pauses_where_that_was_asked_for(my) -> None:
    sandbox = await my.Sandbox.create(timeout=300, **my.says.pause_on_timeout)
    await sandbox.run_code("kept = 'over the timeout'")
    await sandbox.set_timeout(1)
    await auntil(lambda: is_paused(my, sandbox))

    sandbox = await my.Sandbox.connect(sandbox.sandbox_id)
    assert (await sandbox.run_code("kept")).text == "over the timeout"
    assert await sandbox.kill()


@step
async def a_timeout_kills_where_nothing_was_asked_for(my) -> None:
    sandbox = await my.Sandbox.create(timeout=300)
    await sandbox.set_timeout(1)
    await auntil(lambda: is_down(sandbox))
    await arefused(my.core.SandboxNotFoundException, sandbox.get_info())


@step
async def traffic_wakes_a_sandbox_that_was_made_so(my) -> None:
    if my.says.wake_on_traffic is None:
        raise AbsentError(f"{my.says.package} can't ask for that on a legacy domain")

    sandbox = await my.Sandbox.create(timeout=300, **my.says.wake_on_traffic)
    await sandbox.run_code("kept = 'asleep'")
    await sandbox.pause()
    assert (await sandbox.run_code("kept")).text == "asleep"
    await sandbox.pause()
    assert (await sandbox.commands.run("echo awake")).stdout == "awake\n"
    assert await sandbox.kill()


@step
async def private_traffic_needs_the_sandbox_s_token(my) -> None:
    if "private traffic" not in my.says.has:
        raise AbsentError(f"{my.says.package} can't ask for that on a legacy domain")

    sandbox = await my.Sandbox.create(timeout=300, network={"allow_public_traffic": False})
    await sandbox.commands.run(SERVER, background=True, timeout=0)
    url = f"https://{sandbox.get_host(8000)}/page.html"
    headers = {"E2B-Traffic-Access-Token": sandbox.traffic_access_token}
    until(lambda: web().get(url, headers=headers).status_code == 200)
    assert web().get(url).status_code == 403
    assert (await sandbox.run_code("1 + 1")).text == "2"
    assert await sandbox.kill()


@step
async def a_snapshot_makes_sandboxes_with_its_memory(my) -> None:
    if "snapshots" not in my.says.has:
        raise AbsentError(f"{my.says.package} has no snapshots on a legacy domain")

    await my.sandbox.run_code("kept['answer'] = 43")
    snapshot = await my.sandbox.create_snapshot()
    assert (await my.sandbox.run_code("kept['answer'] += 1; kept['answer']")).text == "44"
    assert snapshot.snapshot_id in [known.snapshot_id for known in await my.sandbox.list_snapshots().next_items()]

    sandbox = await my.Sandbox.create(template=snapshot.snapshot_id)
    assert (await sandbox.run_code("kept['answer']")).text == "43"
    assert await sandbox.kill()
    assert await my.Sandbox.delete_snapshot(snapshot.snapshot_id)
    assert not await my.Sandbox.delete_snapshot(snapshot.snapshot_id)


@step
async def copies_have_the_memory_and_go_their_own_ways(my) -> None:
    await my.sandbox.files.write("/tmp/copied", "from the first")
    await my.sandbox.run_code("kept['answer'] = 50")
    if "fork" in my.says.has:
        copies = await my.sandbox.fork(count=2, timeout=300)
    else:
        copies = (await my.Sandbox.clone(my.sandbox.sandbox_id, count=2, timeout=300)).sandboxes
    assert len({copy.sandbox_id for copy in (my.sandbox, *copies)}) == 3

    for own, copy in enumerate(copies):
        assert await copy.files.read("/tmp/copied") == "from the first"
        assert my.server.pid in [process.pid for process in await copy.commands.list()]
        await copy.files.write("/tmp/copied", "copy")
        if "code in copies" in my.says.has:
            assert (await copy.run_code(f"kept['answer'] += {own}; kept['answer']")).text == str(50 + own)
    assert await my.sandbox.files.read("/tmp/copied") == "from the first"
    assert (await my.sandbox.run_code("kept['answer']")).text == "50"
    assert all([await copy.kill() for copy in copies])


@step
async def what_only_a_cloud_has_is_refused_in_words(my) -> None:
    """By an error of the SDK's own, not by a crash of it."""
    core, sandbox = my.core, my.sandbox
    calls = [
        my.Sandbox.create(volume_mounts={"/mnt/data": "a-volume"}),
        my.Sandbox.create(mcp={"exa": {"apiKey": "a-key"}}),
        core.AsyncVolume.create("a-volume"),
        core.AsyncSecret.create(name="a-secret", value="its value", **my.says.secret),
        core.AsyncTemplate.build(core.AsyncTemplate().from_python_image("3"), "a-template"),
    ]
    if "accounts" in my.says.has:
        calls += [
            my.Sandbox.create(secret_envs={"TOKEN": "a-secret"}),
            my.Sandbox.get_quota(),
            my.Sandbox.get_events(),
            sandbox.set_network(deny_out=["0.0.0.0/0"]),
            sandbox.mount_volume("a-volume", "/mnt/data"),
            sandbox.hotplug_memory(512),
            sandbox.commit(),
        ]
    else:
        calls.append(sandbox.update_network({"deny_out": ["0.0.0.0/0"]}))
    for call in calls:
        error = await arefused(Exception, call)
        assert type(error).__module__.startswith(my.says.package), repr(error)
        assert "local engine" in str(error) or "legacy domains" in str(error), repr(error)


@step
async def code_whose_sandbox_is_paused_ends_with_an_error(my) -> None:
    sandbox = await my.Sandbox.create(timeout=300)
    await sandbox.run_code("kept = 'whole'")
    pausing: list[asyncio.Task] = []

    def on_stdout(_message) -> None:
        pausing.append(asyncio.create_task(sandbox.pause()))

    await arefused(my.says.error(my.says.cut_code), sandbox.run_code(ENDLESS, on_stdout=on_stdout))
    await pausing[0]

    sandbox = await my.Sandbox.connect(sandbox.sandbox_id)
    assert (await sandbox.run_code("kept")).text == "whole"
    assert await sandbox.kill()


@step
async def code_whose_sandbox_is_killed_ends_with_an_error(my) -> None:
    sandbox = await my.Sandbox.create(timeout=300)
    killing: list[asyncio.Task] = []

    def on_stdout(_message) -> None:
        killing.append(asyncio.create_task(sandbox.kill()))

    await arefused(my.says.error(my.says.cut_code), sandbox.run_code(ENDLESS, on_stdout=on_stdout))
    await killing[0]


@step
async def kill_ends_it_once(my) -> None:
    assert await my.sandbox.kill() is True
    assert await my.sandbox.kill() is False
    assert not await my.sandbox.is_running()


@step
async def a_killed_sandbox_is_known_as_gone(my) -> None:
    core, sandbox = my.core, my.sandbox
    await arefused(core.SandboxNotFoundException, sandbox.get_info())
    await arefused(core.SandboxNotFoundException, sandbox.pause())
    await arefused(core.SandboxNotFoundException, sandbox.set_timeout(60))
    await arefused(core.SandboxNotFoundException, my.Sandbox.connect(sandbox.sandbox_id))
    await arefused(core.TimeoutException, sandbox.run_code("1"))
    await arefused(my.says.error(my.says.gone), sandbox.commands.run("true"))
    await arefused(my.says.error(my.says.gone), sandbox.files.read("/tmp/log"))
    assert web().get(my.url).status_code == 502


@step
async def what_was_never_there_is_refused(my) -> None:
    core = my.core
    await arefused(core.SandboxNotFoundException, my.Sandbox.connect("inosuchsandbox0000000"))
    error = await arefused(core.SandboxException, my.Sandbox.create(template="no-such-template"))
    assert "404" in str(error)
    assert "no-such-template" in str(error)
    assert await my.Sandbox.kill("inosuchsandbox0000000") is False


@step
async def one_key_makes_one_sandbox(my) -> None:
    if "create by key" not in my.says.has:
        raise AbsentError(f"{my.says.package} sends no key with a create")

    key = uuid.uuid4().hex
    first, again = [await my.Sandbox.create(idempotency_key=key) for _ in range(2)]
    assert first.sandbox_id == again.sandbox_id
    assert await first.kill()
    assert not await again.kill()


@step
async def a_wrong_key_is_refused(my) -> None:
    await arefused(my.core.AuthenticationException, my.Sandbox.create(api_key="e2b_wrong"))
    await arefused(my.core.AuthenticationException, my.Sandbox.list(api_key="e2b_wrong").next_items())
