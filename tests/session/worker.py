"""A worker process of an app that is killed at random: turns on random threads, each counting in its sandbox."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path

from sandbox_tools import Client, PauseAfter, Sessions
from sandbox_tools.errors import SandboxError

COUNT = """
try:
    n += 1
except NameError:
    n = 1
before = int(open('n').read()) if __import__('os').path.exists('n') else 0
open('n', 'w').write(str(n))
(before, n)
"""


def bindings_at(place: str):
    if place.startswith("postgres"):
        from sandbox_tools.session.bindings import PostgresBindings

        return PostgresBindings(place)
    from sandbox_tools.session.bindings import SqliteBindings

    return SqliteBindings(place)


async def turns(sessions: Sessions, threads: int, log: int) -> None:
    while True:
        thread = f"t{random.randrange(threads)}"
        session = sessions.session(thread)
        entry = {"thread": thread, "pid": os.getpid()}
        try:
            async with session.turn():
                await asyncio.sleep(random.random() / 4)
                for _ in range(random.randint(1, 2)):
                    async with session.lease() as sandbox:
                        entry["began"] = time.time()
                        done = await sandbox.run_code(COUNT)
                        entry["ended"] = time.time()
                        entry["said"] = done.text
                        if done.failure:
                            entry["error"] = done.failure.traceback
                    if lost := await session.take_lost():
                        entry["lost"] = sorted(lost)
                    os.write(log, json.dumps(entry).encode() + b"\n")
        except SandboxError as error:
            os.write(log, json.dumps(entry | {"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        await asyncio.sleep(random.random() / 2)


async def main(place: str, state: str, threads: int, at_once: int, path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    bindings = bindings_at(place)
    client = Client(provider="local", state_dir=Path(state))
    async with Sessions(client, bindings=bindings, policy=PauseAfter(1), expiry=8.0) as sessions:
        await asyncio.gather(*(turns(sessions, threads, log) for _ in range(at_once)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
