"""One way to look at conversations, whether their sandboxes are those of a provider in memory or of a real engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from sandbox_tools import Client, PauseAfter, Sandbox, Sessions
from sandbox_tools.policy.pause import PausePolicy
from sandbox_tools.session.bindings import SqliteBindings
from tests.machine import EngineProcess
from tests.session.provider import Provider

PATIENCE = 30.0


class House:
    """A registry that pauses at each turn's end, and what can be seen of its sandboxes from outside."""

    hangs = "hang"
    """Code that runs for ever."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    def note(self, word: str) -> str:
        """Code that remembers the word, and prints all that its sandbox remembers."""
        raise NotImplementedError

    async def begun(self) -> None:
        """Return when the code that hangs runs."""
        raise NotImplementedError

    async def states(self) -> list[str]:
        """What each sandbox does, once the registry has done what it was to."""
        async with asyncio.timeout(PATIENCE):
            while self.sessions._tasks:
                await asyncio.wait(self.sessions._tasks)
        return await self._states()

    async def did(self) -> list[str]:
        """Each `create` and `pause`, in order."""
        raise NotImplementedError

    async def noted(self) -> list[list[str]]:
        """The words that each sandbox remembers: its code ran as often as a word is there."""
        raise NotImplementedError

    async def _states(self) -> list[str]:
        raise NotImplementedError


class InMemory(House):
    """Over the provider of the sessions' tests: what is code there is a word that it remembers."""

    def __init__(self, sessions: Sessions, provider: Provider) -> None:
        super().__init__(sessions)
        self._provider = provider
        self._begun = asyncio.Event()
        self._echo = provider.interpreter
        provider.interpreter = self._run

    def note(self, word: str) -> str:
        return word

    async def begun(self) -> None:
        await self._begun.wait()

    async def did(self) -> list[str]:
        return [verb for verb in self._provider.verbs() if verb in ("create", "pause")]

    async def noted(self) -> list[list[str]]:
        return [machine.memory for machine in self._provider.machines.values()]

    async def _states(self) -> list[str]:
        return [machine.state for machine in self._provider.machines.values()]

    async def _run(self, handle, code, on_event):  # type: ignore[no-untyped-def]
        if code == self.hangs:
            self._begun.set()
            await asyncio.Event().wait()
        return await self._echo(handle, code, on_event)


class OnTheEngine(House):
    """Over the local engine: words are kept in a variable and in a file, so that a second run of code shows."""

    hangs = "open('begun', 'w').close()\nimport time\nwhile True: time.sleep(0.05)"

    def __init__(self, sessions: Sessions, client: Client, engine: EngineProcess) -> None:
        super().__init__(sessions)
        self._client = client
        self._engine = engine

    def note(self, word: str) -> str:
        keep = f"words = [*globals().get('words', []), {word!r}]"
        return f"{keep}\nwith open('words', 'a') as file: file.write({word!r} + ' ')\nprint(*words)"

    async def begun(self) -> None:
        async with asyncio.timeout(PATIENCE):
            while not [sandbox async for sandbox in self._awake() if await sandbox.files.exists("begun")]:
                await asyncio.sleep(0.02)

    async def did(self) -> list[str]:
        verbs = {"created": "create", "paused": "pause"}
        with self._engine.http() as http:
            logs = [
                http.get(f"/v2/sandboxes/{info.sandbox_id}/logs").json()["logs"] async for info in self._client.list()
            ]
        words = [line["message"].split()[0] for lines in logs for line in lines]
        return [verbs[word] for word in words if word in verbs]

    async def noted(self) -> list[list[str]]:
        found = []
        async for info in self._client.list():
            sandbox = await self._client.connect(info.sandbox_id)
            in_file = (await sandbox.files.read("words")).decode().split()
            assert in_file == (await sandbox.run_code("print(*words)")).stdout.split()
            found.append(in_file)
            if info.state == "paused":
                await sandbox.pause()
        return found

    async def _states(self) -> list[str]:
        return [info.state async for info in self._client.list()]

    async def _awake(self) -> AsyncIterator[Sandbox]:
        async for info in self._client.list(state="running"):
            yield await self._client.connect(info.sandbox_id)


def in_memory(process: Callable[..., Sessions], provider: Provider) -> InMemory:
    return InMemory(process(PauseAfter(0)), provider)


@contextlib.asynccontextmanager
async def on_the_engine(
    engine: EngineProcess, directory: Path, policy: PausePolicy | None = None
) -> AsyncIterator[OnTheEngine]:
    bindings = SqliteBindings(directory / "sessions.db")
    async with Client(provider="local", state_dir=engine.state) as client:
        try:
            async with Sessions(client, bindings=bindings, policy=policy or PauseAfter(0)) as sessions:
                yield OnTheEngine(sessions, client, engine)
        finally:
            await bindings.aclose()
            async for info in client.list():
                await client.kill(info.sandbox_id)
