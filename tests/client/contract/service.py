"""What a service that is well answers: the successes of PROTOCOL.md 2.1, 2.2, 3 and 4, one route each."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

from tests.client.contract.recorder import Answer, Recorder, refused, said

KEY = "e2b_k3y-of-the-contract"
TOKEN = "t0ken-of-the-sandbox"
TRAFFIC = "tr4ffic-of-the-sandbox"
SECRETS = (KEY, TOKEN, TRAFFIC)

ID = "i0123456789abcdefghij"
CLIENT_ID = "6532622b"
STARTED = "2026-11-23T07:00:00.123456Z"
ENDS = "2026-11-23T07:05:00.123456Z"
SNAPSHOT = "team/snap:default"
CONTEXT = {"id": "c1", "language": "python", "cwd": "/tmp"}

GRANT: dict[str, Any] = {
    "templateID": "code-interpreter-v1",
    "sandboxID": ID,
    "clientID": CLIENT_ID,
    "envdVersion": "0.6.13",
    "envdAccessToken": TOKEN,
    "trafficAccessToken": None,
    "domain": None,
    "unknownToAll": {"ignored": True},
}
ROW: dict[str, Any] = {
    "templateID": "code-interpreter-v1",
    "sandboxID": ID,
    "clientID": CLIENT_ID,
    "alias": "code-interpreter",
    "startedAt": STARTED,
    "endAt": ENDS,
    "cpuCount": 2,
    "memoryMB": 512,
    "diskSizeMB": 1024,
    "state": "running",
    "envdVersion": "0.6.13",
    "metadata": {"k 1": "v&=/é"},
    "volumeMounts": [],
}
DETAIL: dict[str, Any] = {
    **ROW,
    "envdAccessToken": TOKEN,
    "allowInternetAccess": True,
    "domain": None,
    "network": {},
    "lifecycle": {"autoResume": False, "onTimeout": "pause"},
}
METRIC: dict[str, Any] = {
    "timestamp": STARTED,
    "timestampUnix": 1795417200,
    "cpuCount": 2,
    "cpuUsedPct": 12.5,
    "memUsed": 100 << 20,
    "memTotal": 512 << 20,
    "memCache": 10 << 20,
    "diskUsed": 1 << 30,
    "diskTotal": 10 << 30,
}
ENTRY: dict[str, Any] = {
    "name": "a.txt",
    "type": "FILE_TYPE_FILE",
    "path": "/home/user/a.txt",
    "size": "5",
    "mode": 420,
    "permissions": "-rw-r--r--",
    "owner": "user",
    "group": "user",
    "modifiedTime": STARTED,
}
WRITTEN = [{"path": "/home/user/a.txt", "name": "a.txt", "type": "file"}]


def lines(*events: dict[str, Any]) -> bytes:
    """A stream of `/execute`."""
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def executed(*events: dict[str, Any], ending: str = "whole") -> Answer:
    """An execution's answer."""
    return Answer(body=lines(*events), headers={"content-type": "application/x-ndjson"}, ending=ending)


EXECUTION = (
    {"type": "number_of_executions", "execution_count": 3},
    {"type": "stdout", "text": "out\n", "timestamp": STARTED},
    {"type": "stderr", "text": "err\n", "timestamp": 1795417200000000000},
    {"type": "keepalive"},
    {"type": "of_the_future", "anything": 1},
    {"type": "result", "text": "2", "is_main_result": True, "of_the_future": 1},
    {"type": "end_of_execution"},
)


def envelope(message: Any, flags: int = 0) -> bytes:
    """One message of a Connect stream."""
    payload = json.dumps(message).encode()
    return struct.pack(">BI", flags, len(payload)) + payload


def streamed(*messages: Any, end: Any = None, ending: str = "whole") -> Answer:
    """A Connect stream with its last envelope, or broken before it."""
    body = b"".join(map(envelope, messages)) + (envelope(end or {}, 2) if ending == "whole" else b"")
    return Answer(body=body, headers={"content-type": "application/connect+json"}, ending=ending)


def encoded(text: str) -> str:
    """As bytes are in JSON."""
    return base64.b64encode(text.encode()).decode()


PROCESS = (
    {"event": {"start": {"pid": 7}}},
    {"event": {"data": {"stdout": encoded("hi\n")}}},
    {"event": {"keepalive": {}}},
    {"event": {"data": {"stderr": encoded("warned\n")}}},
    {"event": {"end": {"exited": True, "status": "exit status 0"}}},
)
NO_CONTENT = Answer(status=204)


def well(recorder: Recorder, **grant: Any) -> None:
    """Answers everything as a service does that is well; `grant` goes into what create and connect give."""
    given = {**GRANT, **grant}
    one = f"{ID}(-{CLIENT_ID})?"
    api = {
        ("GET", "/-/.*"): NO_CONTENT,  # between two verbs of an SDK
        ("POST", "(/v2)?/sandboxes"): said(201, given),
        ("POST", f"(/v2)?/sandboxes/{one}/connect"): said(200, given),
        ("GET", "/v2/sandboxes"): said(200, [ROW]),
        ("GET", f"/sandboxes/{one}"): said(200, DETAIL),
        ("DELETE", f"/sandboxes/{one}"): NO_CONTENT,
        ("POST", f"/sandboxes/{one}/(pause|timeout)"): NO_CONTENT,
        ("GET", f"/sandboxes/{one}/metrics"): said(200, [METRIC]),
        ("POST", f"/sandboxes/{one}/snapshots"): said(201, {"snapshotID": SNAPSHOT, "names": ["snap"]}),
        ("GET", "/snapshots"): said(200, [{"snapshotID": SNAPSHOT, "names": ["snap"]}]),
        ("DELETE", "/templates/.*"): NO_CONTENT,
        ("POST", f"/sandboxes/{one}/fork"): said(201, [{"sandbox": given}, {"error": {"code": 429, "message": "x"}}]),
        ("POST", f"/sandboxes/{one}/clone"): said(201, {"sandboxes": [given, given], "snapshotTemplateId": "tpl"}),
    }
    code = {
        ("POST", "/execute"): executed(*EXECUTION),
        ("POST", "/contexts"): said(200, CONTEXT),
        ("GET", "/contexts"): said(200, [CONTEXT]),
        ("POST", "/contexts/.*/restart"): said(200, None),
        ("DELETE", "/contexts/.*"): said(200, None),
    }
    entry = said(200, {"entry": ENTRY})
    envd = {
        ("GET", "/health"): NO_CONTENT,
        ("GET", "/files"): Answer(body=b"hello", headers={"content-type": "text/plain"}),
        ("POST", "/files"): said(200, WRITTEN),
        ("POST", "/process.Process/(Start|Connect)"): streamed(*PROCESS),
        ("POST", "/process.Process/(SendInput|CloseStdin|SendSignal|Update)"): said(200, {}),
        ("POST", "/process.Process/List"): said(
            200,
            {"processes": [{"config": {"cmd": "/bin/bash", "args": ["-l", "-c", "echo hi"], "envs": {}}, "pid": 7}]},
        ),
        ("POST", "/filesystem.Filesystem/(Stat|MakeDir|Move)"): entry,
        ("POST", "/filesystem.Filesystem/ListDir"): said(200, {"entries": [ENTRY]}),
        ("POST", "/filesystem.Filesystem/Remove"): said(200, {}),
    }
    for (method, path), answer in {**api, **code, **envd}.items():
        recorder.on(method, path, answer)


def paused() -> Answer:
    """Info of a paused sandbox."""
    return said(200, {**DETAIL, "state": "paused", "domain": None})


def unknown() -> Answer:
    """The service's words for a sandbox that is not, or no more."""
    return refused(404, f"Sandbox \"{ID}\" doesn't exist or you don't have access to it")
