"""One client in a process of its own: `contestant.py NAME URL`, in an environment that has it.

Each line of the input is an order, `[step, calls]`; each line of the output the seconds that each call took, and what
they took of the CPU on average. For `streams` it is the megabytes that the process had at most, before and after.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

KEY = "e2b_" + "0" * 40
CODE = "print('hello'); 40 + 2"
METADATA = {"thread": "3b1e6a54"}
TEXT, ROWS = "42", 100

Step = Callable[[], Awaitable[object]]


class SandboxTools:
    """This package's client."""

    async def open(self, url: str) -> dict[str, Step]:
        """Its spelling of the steps."""
        from sandbox_tools import Client
        from sandbox_tools.client.dialects import DIALECTS

        self.client = client = Client(provider=DIALECTS["e2b"], api_key=KEY, api_url=url)
        self.sandbox = sandbox = await client.create()

        async def run_code() -> None:
            assert (await sandbox.run_code(CODE)).text == TEXT

        async def list_all() -> None:
            assert len([info async for info in client.list()]) == ROWS

        return {
            "run_code": run_code,
            "list": list_all,
            "pause": lambda: client.pause(sandbox.id),
            "create": lambda: client.create(metadata=METADATA),
            "connect": lambda: client.connect(sandbox.id),
            "info": lambda: client.info(sandbox.id),
            "set_timeout": lambda: client.set_timeout(sandbox.id, 300),
            "kill": lambda: client.kill(sandbox.id),
        }

    async def hold(self, count: int) -> None:
        """One of as many streams."""
        assert (await self.sandbox.run_code(f"hold {count}")).text == TEXT


class BareHttpx:
    """The same requests with nothing around them but `json.loads`."""

    async def open(self, url: str) -> dict[str, Step]:
        """Kept connections where this package's client keeps them, and one for each request where it does not."""
        import httpx

        timeout = httpx.Timeout(None, connect=10.0)
        limits = {"max_connections": None, "keepalive_expiry": 2.0}
        headers = {"User-Agent": "bare", "X-API-KEY": KEY}
        none_kept = httpx.Limits(max_keepalive_connections=0, **limits)
        kept = httpx.AsyncClient(timeout=timeout, headers=headers, limits=httpx.Limits(**limits), trust_env=False)
        self.kept = kept
        fresh = httpx.AsyncClient(timeout=timeout, headers=headers, limits=none_kept, trust_env=False)
        self.url = url
        grant = (await kept.post(f"{url}/v2/sandboxes", json={"templateID": "code-interpreter-v1"})).json()
        one = f"{url}/sandboxes/{grant['sandboxID']}"
        self.headers = {
            "E2b-Sandbox-Id": grant["sandboxID"],
            "E2b-Sandbox-Port": "49999",
            "X-Access-Token": grant["envdAccessToken"],
            "Accept-Encoding": "identity",
        }
        create = {"templateID": "code-interpreter-v1", "timeout": 300, "autoPause": True, "metadata": METADATA}

        async def call(client: httpx.AsyncClient, method: str, url: str, **more: object) -> object:
            response = await client.request(method, url, **more)
            response.raise_for_status()
            return response.json() if response.content else None

        async def list_all() -> None:
            rows = await call(kept, "GET", f"{url}/v2/sandboxes", params={"limit": "100"})
            assert isinstance(rows, list)
            assert len(rows) == ROWS

        return {
            "run_code": lambda: self.run(CODE),
            "list": list_all,
            "pause": lambda: call(kept, "POST", f"{one}/pause", json={}),
            "create": lambda: call(fresh, "POST", f"{url}/v2/sandboxes", json=create),
            "connect": lambda: call(kept, "POST", f"{url}/v2{one[len(url) :]}/connect", json={"timeout": 300}),
            "info": lambda: call(kept, "GET", one),
            "set_timeout": lambda: call(kept, "POST", f"{one}/timeout", json={"timeout": 300}),
            "kill": lambda: call(kept, "DELETE", one),
        }

    async def run(self, code: str) -> None:
        """Code."""
        body = {"code": code, "context_id": None, "language": None, "env_vars": None}
        async with self.kept.stream("POST", f"{self.url}/execute", headers=self.headers, json=body) as response:
            response.raise_for_status()
            events = [json.loads(line) async for line in response.aiter_lines()]
        assert [event["text"] for event in events if event["type"] == "result"] == [TEXT]

    async def hold(self, count: int) -> None:
        """One of as many streams."""
        await self.run(f"hold {count}")


class E2b:
    """The vendor's own async client."""

    async def open(self, url: str) -> dict[str, Step]:
        """Its spelling of the steps."""
        os.environ.update(E2B_API_KEY=KEY, E2B_API_URL=url, E2B_SANDBOX_URL=url, E2B_MAX_CONNECTIONS="10000")
        from e2b_code_interpreter import AsyncSandbox

        self.sandbox = sandbox = await AsyncSandbox.create()

        async def run_code() -> None:
            assert (await sandbox.run_code(CODE)).text == TEXT

        async def list_all() -> None:
            pages = AsyncSandbox.list(limit=100)
            rows: list[object] = []
            while pages.has_next:
                rows += await pages.next_items()
            assert len(rows) == ROWS

        return {
            "run_code": run_code,
            "list": list_all,
            "pause": sandbox.pause,
            "create": lambda: AsyncSandbox.create(metadata=METADATA),
            "connect": lambda: AsyncSandbox.connect(sandbox.sandbox_id),
            "info": sandbox.get_info,
            "set_timeout": lambda: sandbox.set_timeout(300),
            "kill": sandbox.kill,
        }

    async def hold(self, count: int) -> None:
        """One of as many streams."""
        assert (await self.sandbox.run_code(f"hold {count}")).text == TEXT


CONTESTANTS = {"sandbox_tools": SandboxTools, "httpx": BareHttpx, "e2b": E2b}


def peak() -> float:
    """Megabytes that this process had in RAM at most (`ru_maxrss` would count its parent's too)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


async def main(name: str, url: str) -> None:
    """Obey until the input ends."""
    contestant = CONTESTANTS[name]()
    steps = await contestant.open(url)
    for line in sys.stdin:
        step, calls = json.loads(line)
        if step == "streams":
            resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
            before = peak()
            await asyncio.gather(*(contestant.hold(calls) for _ in range(calls)))
            answer = [before, peak()]
        else:
            await steps[step]()  # opens the connection that is kept, if one is
            seconds = []
            spent = time.process_time()
            for _ in range(calls):
                started = time.perf_counter()
                await steps[step]()
                seconds.append(time.perf_counter() - started)
            answer = [seconds, (time.process_time() - spent) / calls]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    # What lies beside this file is nobody's package.
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    asyncio.run(main(*sys.argv[1:]))
