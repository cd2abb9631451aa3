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

from .stores import bindings_at

THRESHOLD = 1.0
EXPIRY = 8.0

COUNT = """
import os
try:
    n += 1
except NameError:
    n = 1
in_file = int(open('n').read()) if os.path.exists('n') else 0
open('n.new', 'w').write(str(n))
os.replace('n.new', 'n')
print(in_file, n)
"""


async def turns(sessions: Sessions, threads: int, log: int) -> None:
    def tell(**facts: object) -> None:
        os.write(log, json.dumps({"pid": os.getpid(), "at": time.time(), **facts}).encode() + b"\n")

    while True:
        thread = f"t{random.randrange(threads)}"
        session = sessions.session(thread)
        try:
            async with session.turn():
                await asyncio.sleep(random.random() / 4)
                for _ in range(random.randint(1, 2)):
                    async with session.lease() as sandbox:
                        began = time.time()
                        done = await sandbox.run_code(COUNT)
                        lost = sorted(await session.take_lost())
                        said = done.stdout if done.failure is None else done.failure.traceback
                        tell(thread=thread, began=began, said=said, lost=lost)
        except SandboxError as error:
            tell(thread=thread, error=f"{type(error).__name__}: {error}")
        await asyncio.sleep(random.random() / 4)


async def main(place: str, state: str, threads: str, at_once: str, path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    client = Client(provider="local", state_dir=Path(state))
    policy = PauseAfter(THRESHOLD)
    async with Sessions(client, bindings=bindings_at(place), policy=policy, expiry=EXPIRY) as sessions:
        await asyncio.gather(*(turns(sessions, int(threads), log) for _ in range(int(at_once))))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
