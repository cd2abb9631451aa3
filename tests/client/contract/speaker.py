"""A vendor's SDK, in its own environment, says each verb once: `python -m tests.client.contract.speaker SDK URL VERB`.

Before each verb it tells the recorder which one comes. Runs in an SDK's own environment: the standard library only.
"""

from __future__ import annotations

import datetime
import importlib
import json
import sys
import traceback
import urllib.request
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

METADATA = {"k 1": "v&=/é"}
START = datetime.datetime(2026, 11, 23, 7, tzinfo=datetime.timezone.utc)  # noqa: UP017 (an SDK may run on an older Python)
END = datetime.datetime(2026, 11, 23, 8, tzinfo=datetime.timezone.utc)  # noqa: UP017

MODULES = {
    "novita": ("novita_sandbox.core", "novita_sandbox.code_interpreter"),
    "e2b": ("e2b", "e2b_code_interpreter"),
    "ppio": ("ppio_sandbox.core", "ppio_sandbox.code_interpreter"),
    "ucloud": ("ucloud_sandbox", "ucloud_sandbox.code_interpreter"),
}


def main(spelling: str, recorder: str, *chosen: str) -> None:
    """Say the verbs that are chosen, each told beforehand, and what came of each as a line of JSON."""
    sdk = spelling.removesuffix("-legacy")
    core, code = map(importlib.import_module, MODULES[sdk])
    Sandbox = code.Sandbox
    ppio = sdk in ("ppio", "novita")
    pausing = {"auto_pause": True} if ppio else {"lifecycle": {"on_timeout": "pause"}}
    waking = {"lifecycle": {"on_timeout": "pause", "auto_resume": True}}
    if spelling != sdk:  # as its maker's documents say for the older dialect
        waking = {"auto_pause": True, "metadata": {"auto_resume": "true"}}
    keyed = {"idempotency_key": "key-1"}
    without_memory = {"mode": "filesystem"} if sdk == "e2b" else {"keep_memory": False}
    query = core.SandboxQuery(metadata=METADATA, state=[core.SandboxState.PAUSED])

    verbs: dict[str, Callable[[], Any]] = {
        "create": lambda: Sandbox.create(timeout=123, metadata=METADATA, envs={"A": "1"}),
        "create with nothing said": lambda: Sandbox.create(),
        "create pausing": lambda: Sandbox.create(timeout=123, **pausing),
        "create waking": lambda: Sandbox.create(timeout=123, **waking),
        "create without internet": lambda: Sandbox.create(timeout=123, allow_internet_access=False),
        "create by key": lambda: Sandbox.create(timeout=123, **keyed),
        "connect": lambda: sandbox.connect(timeout=77),
        "pause": lambda: sandbox.beta_pause(sync=True) if ppio else sandbox.pause(),
        "pause without memory": lambda: sandbox.pause(**without_memory),
        "kill": lambda: Sandbox.kill(sandbox.sandbox_id),
        "info": lambda: sandbox.get_info(),
        "list": lambda: Sandbox.list().next_items(),
        "list paused by metadata": lambda: Sandbox.list(query=query, limit=100).next_items(),
        "list by template": lambda: Sandbox.list(
            query=core.SandboxQuery(template="tpl", started_after=START)
        ).next_items(),
        "set_timeout": lambda: sandbox.set_timeout(60),
        "metrics": lambda: sandbox.get_metrics(),
        "metrics between": lambda: sandbox.get_metrics(start=START, end=END),
        "snapshot": lambda: sandbox.create_snapshot(),
        "snapshot by name": lambda: sandbox.create_snapshot(name="snap"),
        "list_snapshots": lambda: Sandbox.list_snapshots(limit=100).next_items(),
        "list_snapshots of one": lambda: sandbox.list_snapshots(limit=100).next_items(),
        "delete_snapshot": lambda: Sandbox.delete_snapshot("team/snap:default"),
        "fork": lambda: (Sandbox.clone if ppio else Sandbox.fork)(sandbox.sandbox_id, count=2, timeout=300),
        "run_code": lambda: sandbox.run_code("1+1"),
        "run_code in a context": lambda: sandbox.run_code("1+1", context=SimpleNamespace(id="c1"), envs={"B": "2"}),
        "run_code in a language": lambda: sandbox.run_code("1+1", language="bash"),
        "create_context": lambda: sandbox.create_code_context(language="python", cwd="/tmp"),
        "list_contexts": lambda: sandbox.list_code_contexts(),
        "restart_context": lambda: sandbox.restart_code_context("c1"),
        "remove_context": lambda: sandbox.remove_code_context("c1"),
        "commands.run": lambda: sandbox.commands.run("echo hi", cwd="/tmp", envs={"B": "2"}),
        "commands.run as root": lambda: sandbox.commands.run("echo hi", user="root"),
        "commands.run without a limit": lambda: sandbox.commands.run("echo hi", timeout=0),
        "commands.run with stdin": lambda: sandbox.commands.run("cat", stdin=True),
        "commands.connect": lambda: sandbox.commands.connect(7).wait(),
        "commands.list": lambda: sandbox.commands.list(),
        "commands.kill": lambda: sandbox.commands.kill(7),
        "send_stdin": lambda: sandbox.commands.send_stdin(7, "in"),
        "close_stdin": lambda: sandbox.commands.close_stdin(7),
        "files.read": lambda: sandbox.files.read("dir/é a.txt"),
        "files.read as root": lambda: sandbox.files.read("a.txt", user="root"),
        "files.write": lambda: sandbox.files.write(
            "dir/é a.txt", b"hello", **({} if ppio else {"use_octet_stream": True})
        ),
        "files.list": lambda: sandbox.files.list("/tmp"),
        "files.list deep": lambda: sandbox.files.list("/tmp", depth=3, user="root"),
        "files.info": lambda: sandbox.files.get_info("a.txt"),
        "files.exists": lambda: sandbox.files.exists("a.txt"),
        "files.make_dir": lambda: sandbox.files.make_dir("dir"),
        "files.move": lambda: sandbox.files.rename("a.txt", "b.txt"),
        "files.remove": lambda: sandbox.files.remove("a.txt"),
        "health": lambda: sandbox.is_running(),
    }
    sandbox = Sandbox.create()
    for verb in chosen:
        say = verbs[verb]
        urllib.request.urlopen(f"{recorder}/-/{urllib.request.quote(verb)}").close()
        try:
            say()
        except Exception:
            told = traceback.format_exc(limit=-3)
        else:
            told = ""
        sys.stdout.write(json.dumps([verb, told]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
