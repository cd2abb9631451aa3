"""A small real server of the protocol, for what the engine cannot be made to do on demand."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

NOW = "2026-11-23T07:00:00.000000Z"


class Server:
    """Sandboxes as entries of a dict; what `/execute` does is the code's first word."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.bodies: list[tuple[str, Any]] = []
        self.executions: list[str] = []
        self.pausing_fails = False
        self.disconnected = threading.Event()
        self.answered = threading.Event()
        self.asked: list[str] = []
        paths = {
            "/health": self.health,
            "/sandboxes": self.create,
            "/v2/sandboxes": self.list,
            "/sandboxes/{id}": self.one,
            "/sandboxes/{id}/pause": self.pause,
            "/sandboxes/{id}/connect": self.connect,
            "/sandboxes/{id}/timeout": self.timeout,
            "/execute": self.execute,
        }
        self.app = Starlette(routes=[Route(p, f, methods=["GET", "POST", "DELETE"]) for p, f in paths.items()])

    async def health(self, request: Request) -> Response:
        return Response(status_code=200)

    async def create(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(("create", body))
        sandbox_id = f"i{len(self.states)}"
        self.states[sandbox_id] = "running"
        self.metadata[sandbox_id] = body["metadata"]
        return JSONResponse(self.grant(sandbox_id), 201)

    async def list(self, request: Request) -> Response:
        if request.method == "POST":
            return await self.create(request)

        self.asked.append(request.url.query)
        start = int(request.query_params.get("nextToken", 0))
        ids = [i for i in self.states if self.states[i] == request.query_params.get("state", self.states[i])]
        page = ids[start : start + 2]
        more = {"X-Next-Token": str(start + 2)} if ids[start + 2 :] else {}
        return JSONResponse([self.row(i) for i in page], headers=more)

    async def one(self, request: Request) -> Response:
        sandbox_id = request.path_params["id"]
        if sandbox_id not in self.states:
            return self.no(404, f'Sandbox "{sandbox_id}" doesn\'t exist')

        if request.method == "DELETE":
            del self.states[sandbox_id]
            return Response(status_code=204)

        return JSONResponse(self.row(sandbox_id))

    async def pause(self, request: Request) -> Response:
        sandbox_id = request.path_params["id"]
        state = self.states.get(sandbox_id)
        if state == "running" and not self.pausing_fails:
            self.states[sandbox_id] = "paused"
            return Response(status_code=204)

        return self.no(409, "not running") if state else self.no(404, "no such sandbox")

    async def connect(self, request: Request) -> Response:
        sandbox_id = request.path_params["id"]
        if sandbox_id not in self.states:
            return self.no(404, "no such sandbox")

        woken = self.states[sandbox_id] == "paused"
        self.states[sandbox_id] = "running"
        return JSONResponse(self.grant(sandbox_id), 201 if woken else 200)

    async def timeout(self, request: Request) -> Response:
        state = self.states.get(request.path_params["id"])
        return Response(status_code=204) if state == "running" else self.no(404, "not running")

    async def execute(self, request: Request) -> Response:
        assert request.headers["x-access-token"] == "token-of-" + request.headers["e2b-sandbox-id"]
        assert request.headers["e2b-sandbox-port"] == "49999"
        sandbox_id = request.headers["e2b-sandbox-id"]
        body = await request.json()
        code = body["code"]
        self.executions.append(code)
        if self.states.get(sandbox_id) != "running":
            return JSONResponse({"sandboxId": sandbox_id, "message": "The sandbox was not found", "code": 502}, 502)

        if body["context_id"] == "nowhere":
            return PlainTextResponse("Context nowhere not found", 404)

        return StreamingResponse(self.stream(request, sandbox_id, code))

    async def stream(self, request: Request, sandbox_id: str, code: str) -> AsyncIterator[bytes]:
        yield line(type="number_of_executions", execution_count=1)
        verb, _, rest = code.partition(" ")
        match verb:
            case "print":
                yield line(type="stdout", text=rest, timestamp=NOW)
            case "value":
                yield line(type="result", text=rest, is_main_result=True)
            case "raise":
                yield line(type="error", name="ValueError", value=rest, traceback="...")
            case "flood":
                for _ in range(int(rest)):
                    yield line(type="stdout", text="x" * 1_000_000, timestamp=NOW)
            case "hang":
                yield line(type="stdout", text="begun", timestamp=NOW)
                try:
                    while True:
                        await request.receive()
                        if await request.is_disconnected():
                            break
                except ClientDisconnect:
                    pass
                finally:
                    self.disconnected.set()
            case "stop":
                return
            case "break" | "killed" | "paused":
                if verb == "killed":
                    del self.states[sandbox_id]
                elif verb == "paused":
                    self.states[sandbox_id] = "paused"
                raise ConnectionAbortedError
            case "garbage":
                yield b"<html>\n"

        yield line(type="end_of_execution")
        if verb == "linger":
            try:
                await asyncio.sleep(0.2)
            except asyncio.CancelledError:
                self.disconnected.set()
                raise
            finally:
                self.answered.set()

    def grant(self, sandbox_id: str) -> dict[str, Any]:
        return {
            "templateID": "code-interpreter-v1",
            "sandboxID": sandbox_id,
            "clientID": "c",
            "envdVersion": "0.6.13",
            "envdAccessToken": f"token-of-{sandbox_id}",
            "domain": None,
        }

    def row(self, sandbox_id: str) -> dict[str, Any]:
        return {**self.row_of(sandbox_id), "state": self.states[sandbox_id], "metadata": self.metadata[sandbox_id]}

    def row_of(self, sandbox_id: str) -> dict[str, Any]:
        return {
            "templateID": "code-interpreter-v1",
            "sandboxID": sandbox_id,
            "clientID": "c",
            "startedAt": NOW,
            "endAt": NOW,
            "state": "running",
            "metadata": None,
            "cpuCount": 2,
            "memoryMB": 512,
            "diskSizeMB": 1024,
            "envdVersion": "0.6.13",
        }

    def no(self, status: int, message: str) -> Response:
        return JSONResponse({"code": status, "message": message}, status)


def line(**event: object) -> bytes:
    return json.dumps(event).encode() + b"\n"
