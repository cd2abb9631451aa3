"""How this package's client says the verbs of the tables."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from sandbox_tools.client import Client, Sandbox
from tests.client.contract.vendors import METADATA

START = datetime(2026, 11, 23, 7, tzinfo=UTC)
END = datetime(2026, 11, 23, 8, tzinfo=UTC)

Call = Callable[[Client, Sandbox], Awaitable[Any]]


async def all_of(rows: Any) -> list[Any]:
    """What an asynchronous iterator gives."""
    return [row async for row in rows]


CALLS: Mapping[str, Call] = {
    "create": lambda c, s: c.create(timeout=123, metadata=METADATA, env={"A": "1"}, auto_pause=False),
    "create with nothing said": lambda c, s: c.create(),
    "create pausing": lambda c, s: c.create(timeout=123),
    "connect": lambda c, s: c.connect(s.id, timeout=77),
    "pause": lambda c, s: c.pause(s.id),
    "kill": lambda c, s: c.kill(s.id),
    "info": lambda c, s: c.info(s.id),
    "list": lambda c, s: all_of(c.list()),
    "list paused by metadata": lambda c, s: all_of(c.list(state="paused", metadata=METADATA)),
    "set_timeout": lambda c, s: c.set_timeout(s.id, 60),
    "run_code": lambda c, s: s.run_code("1+1"),
    "run_code in a context": lambda c, s: s.run_code("1+1", context="c1", env={"B": "2"}),
    "run_code in a language": lambda c, s: s.run_code("1+1", language="bash"),
    "create_context": lambda c, s: s.create_context(language="python", cwd="/tmp"),
    "list_contexts": lambda c, s: s.list_contexts(),
    "restart_context": lambda c, s: s.restart_context("c1"),
    "remove_context": lambda c, s: s.remove_context("c1"),
    "commands.run": lambda c, s: s.commands.run("echo hi", cwd="/tmp", env={"B": "2"}),
    "commands.run as root": lambda c, s: s.commands.run("echo hi", user="root"),
    "commands.run without a limit": lambda c, s: s.commands.run("echo hi", timeout=None),
    "commands.run with stdin": lambda c, s: s.commands.run("cat", stdin=True),
    "commands.connect": lambda c, s: _connected(s),
    "commands.list": lambda c, s: s.commands.list(),
    "commands.kill": lambda c, s: s.commands.kill(7),
    "send_stdin": lambda c, s: _fed(s),
    "close_stdin": lambda c, s: _closed(s),
    "files.read": lambda c, s: s.files.read("dir/é a.txt"),
    "files.read as root": lambda c, s: s.files.read("a.txt", user="root"),
    "files.write": lambda c, s: s.files.write("dir/é a.txt", b"hello"),
    "files.list": lambda c, s: s.files.list("/tmp"),
    "files.list deep": lambda c, s: s.files.list("/tmp", depth=3, user="root"),
    "files.info": lambda c, s: s.files.info("a.txt"),
    "files.exists": lambda c, s: s.files.exists("a.txt"),
    "files.make_dir": lambda c, s: s.files.make_dir("dir"),
    "files.move": lambda c, s: s.files.move("a.txt", "b.txt"),
    "files.remove": lambda c, s: s.files.remove("a.txt"),
    "create waking": lambda c, s: c.create(timeout=123, auto_resume=True),
    "create without internet": lambda c, s: c.create(timeout=123, auto_pause=False, internet=False),
    "create by key": lambda c, s: c.create(timeout=123, auto_pause=False, idempotency_key="key-1"),
    "pause without memory": lambda c, s: c.pause(s.id, memory=False),
    "list by template": lambda c, s: all_of(c.list(template="tpl", started_after=START)),
    "metrics": lambda c, s: c.metrics(s.id),
    "metrics between": lambda c, s: c.metrics(s.id, start=START, end=END),
    "snapshot": lambda c, s: c.snapshot(s.id),
    "snapshot by name": lambda c, s: c.snapshot(s.id, name="snap"),
    "list_snapshots": lambda c, s: all_of(c.list_snapshots()),
    "list_snapshots of one": lambda c, s: all_of(c.list_snapshots(sandbox_id=s.id)),
    "delete_snapshot": lambda c, s: c.delete_snapshot("team/snap:default"),
    "fork": lambda c, s: c.fork(s.id, count=2),
}

BEFORE: Mapping[str, str] = {
    "create by key": "look for a key",
    "send_stdin": "commands.connect",
    "close_stdin": "commands.connect",
}
"""What is said first."""


async def _connected(sandbox: Any) -> None:
    await (await sandbox.commands.connect(7)).wait()


async def _fed(sandbox: Any) -> None:
    async with await sandbox.commands.connect(7) as command:
        await command.send_stdin("in")
        await command.wait()


async def _closed(sandbox: Any) -> None:
    async with await sandbox.commands.connect(7) as command:
        await command.close_stdin()
        await command.wait()
