"""What the vendors' SDKs send, one table for each dialect: PROTOCOL.md's appendix A, and for the verbs that it leaves
out, the SDKs themselves. `test_sdks.py` holds these tables against the SDKs."""

from __future__ import annotations

import base64
import email
import email.policy
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import TypeAdapter

from tests.client.contract.recorder import Recorded
from tests.client.contract.service import CLIENT_ID, ID, KEY, TOKEN

Where = Literal["api", "code", "envd"]
PORTS: dict[Where, int] = {"code": 49999, "envd": 49983}

COMPARED = (
    "authorization",
    "connect-protocol-version",
    "connect-timeout-ms",
    "content-type",
    "e2b-sandbox-id",
    "e2b-sandbox-port",
    "e2b-traffic-access-token",
    "idempotency-key",
    "keepalive-ping-interval",
    "novita-sandbox-id",
    "novita-sandbox-port",
    "ppio-sandbox-id",
    "ppio-sandbox-port",
    "x-access-token",
    "x-api-key",
)
"""The headers that route, authorize, or say what the body is and how long it may take. Others are each client's own
business: who it is, what it accepts, and encodings that are the identity."""

Flat = dict[tuple[str, ...], Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, as far as it must be the same whoever sends it."""

    to: Where
    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    """With all encodings. The order of parameters means nothing."""
    form: Literal["none", "json", "envelope", "bytes", "multipart"] = "none"
    """Of the body: `none` is no byte at all, `envelope` one message of a Connect stream, `multipart` one part."""
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Those of `COMPARED` that it has."""

    def flat(self) -> Flat:
        """Its fields by name, so that two can be compared one by one."""
        fields: Flat = {("to",): self.to, ("method",): self.method, ("path",): self.path, ("form",): self.form}
        fields |= {("query", name): value for name, value in self.query.items()}
        fields |= {("header", name): value for name, value in self.headers.items()}
        fields |= _leaves(("body",), self.body) if self.form != "none" else {}
        return fields


def _leaves(name: tuple[str, ...], value: Any) -> Flat:
    if isinstance(value, dict):
        # An empty object is a value: it is not the same as no key.
        below: Flat = {name: "object"}
        for key, inner in value.items():
            below |= _leaves((*name, key), inner)
        return below

    return {name: value}


def of(recorded: Recorded) -> Request:
    """What came over the wire, in the form of the tables."""
    headers = {name: recorded.headers[name] for name in COMPARED if name in recorded.headers}
    form: Any = "bytes"
    body: Any = recorded.body
    if headers.get("content-type") == "application/connect+json":
        flags, length = struct.unpack(">BI", recorded.body[:5])
        assert (flags, length) == (0, len(recorded.body) - 5)
        form, body = "envelope", _JSON.validate_json(recorded.body[5:])
    elif headers.get("content-type", "").startswith("multipart/form-data;"):
        form, body = "multipart", _part(headers["content-type"], recorded.body)
        headers["content-type"] = "multipart/form-data"
    elif not recorded.body:
        form, body = "none", None
    elif headers.get("content-type") == "application/json":
        form, body = "json", _JSON.validate_json(recorded.body)

    return Request(
        to=_destination(recorded, headers),
        method=recorded.method,
        path=recorded.path,
        query=recorded.query,
        form=form,
        body=body,
        headers=headers,
    )


def _part(content_type: str, body: bytes) -> dict[str, Any]:
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    (part,) = email.message_from_bytes(head + body, policy=email.policy.HTTP).iter_parts()
    disposition = part.get("content-disposition").params
    return {"name": disposition["name"], "filename": disposition["filename"], "content": part.get_payload(decode=True)}


_JSON = TypeAdapter[Any](Any)


def _destination(recorded: Recorded, headers: dict[str, str]) -> Where:
    """By the host or the header that says the port, or by a user name that a host would begin with."""
    words = [recorded.headers.get("host", "")]
    if headers.get("authorization", "").startswith("Basic "):
        words.append(base64.b64decode(headers["authorization"].removeprefix("Basic ")).decode())
        if words[1].endswith(".sbx:"):
            del headers["authorization"]

    if "x-api-key" in headers:
        return "api"  # one SDK says there to which sandbox it connects, in headers too

    ports = {int(found[1]) for word in words if (found := re.match(rf"(\d+)-{ID}", word))}
    ports |= {int(value) for name, value in headers.items() if name.endswith("-sandbox-port")}
    assert len(ports) < 2, f"One request is to go to two ports: {recorded}"
    return next((where for where, port in PORTS.items() if port in ports), "api")


LEGACY_ID = f"{ID}-{CLIENT_ID}"

# The rows of one dialect are made by one of these, which hold what all its requests have.


@dataclass(frozen=True, kw_only=True)
class _Vendor:
    id: str = ID
    prefix: str = "e2b"
    code: tuple[str, ...] = ("id", "port")
    """What goes with requests to the interpreter, besides the access token of `/execute`."""
    unary_timeout: bool = True

    def api(self, method: str, path: str, body: Any = None, **query: str) -> tuple[Request, ...]:
        form: Any = "none" if body is None else "json"
        headers = {"x-api-key": KEY, **({} if body is None else {"content-type": "application/json"})}
        return (
            Request(
                to="api",
                method=method,
                path=path.format(id=self.id),
                query=query,
                form=form,
                body=body,
                headers=headers,
            ),
        )

    def interpreter(self, method: str, path: str, body: Any = None) -> tuple[Request, ...]:
        headers = {"content-type": "application/json"}  # also without a body
        if self.code:
            headers |= self._routed(PORTS["code"])

        if path == "/execute" or not self.code:
            headers["x-access-token"] = TOKEN

        form: Any = "none" if body is None else "json"
        return (Request(to="code", method=method, path=path, form=form, body=body, headers=headers),)

    def execute(self, **fields: Any) -> tuple[Request, ...]:
        whole = {"code": "1+1", "context_id": None, "language": None, "env_vars": None, **fields}
        return self.interpreter("POST", "/execute", whole)

    def files(self, method: str, body: bytes | None = None, **query: str) -> tuple[Request, ...]:
        form: Any = "none" if body is None else "bytes"
        kind = {} if body is None else {"content-type": "application/octet-stream"}
        headers = {**self._envd(), **kind}
        return (Request(to="envd", method=method, path="/files", query=query, form=form, body=body, headers=headers),)

    def unary(self, name: str, message: Any, *, user: str | None = None) -> tuple[Request, ...]:
        timeout = {"connect-timeout-ms": "60000"} if self.unary_timeout else {}
        headers = {**self._envd(user), "connect-protocol-version": "1", "content-type": "application/json", **timeout}
        return (Request(to="envd", method="POST", path=f"/{name}", form="json", body=message, headers=headers),)

    def stream(self, name: str, message: Any, *, user: str | None = None, limit: int = 60) -> tuple[Request, ...]:
        headers = {
            **self._envd(user),
            "connect-protocol-version": "1",
            "content-type": "application/connect+json",
            "keepalive-ping-interval": "50",
            **({"connect-timeout-ms": f"{limit}000"} if limit else {}),
        }
        return (Request(to="envd", method="POST", path=f"/{name}", form="envelope", body=message, headers=headers),)

    def health(self) -> tuple[Request, ...]:
        return (Request(to="envd", method="GET", path="/health", headers=self._envd()),)

    def _envd(self, user: str | None = None) -> dict[str, str]:
        named = {"authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode()} if user else {}
        return {"x-access-token": TOKEN, **self._routed(PORTS["envd"]), **named}

    def _routed(self, port: int) -> dict[str, str]:
        return {f"{self.prefix}-sandbox-id": self.id, f"{self.prefix}-sandbox-port": str(port)}


def _with(request: Request, headers: Mapping[str, str]) -> Request:
    return replace(request, headers={**request.headers, **headers})


Table = Mapping[str, tuple[Request, ...]]
"""What each verb sends."""

METADATA = {"k 1": "v&=/é"}
ENCODED = "k%2525201%3Dv%252526%25253D%252F%2525C3%2525A9"


def _inside(sdk: _Vendor) -> Table:
    """What all SDKs have that goes to a sandbox."""

    def command(text: str, **more: Any) -> dict[str, Any]:
        return {"cmd": "/bin/bash", "args": ["-l", "-c", text], **more}

    start = "process.Process/Start"
    at = "filesystem.Filesystem/"
    return {
        "run_code": sdk.execute(),
        "run_code in a context": sdk.execute(context_id="c1", env_vars={"B": "2"}),
        "run_code in a language": sdk.execute(language="bash"),
        "create_context": sdk.interpreter("POST", "/contexts", {"language": "python", "cwd": "/tmp"}),
        "list_contexts": sdk.interpreter("GET", "/contexts"),
        "restart_context": sdk.interpreter("POST", "/contexts/c1/restart"),
        "remove_context": sdk.interpreter("DELETE", "/contexts/c1"),
        "commands.run": sdk.stream(start, {"process": command("echo hi", envs={"B": "2"}, cwd="/tmp"), "stdin": False}),
        "commands.run as root": sdk.stream(start, {"process": command("echo hi"), "stdin": False}, user="root"),
        "commands.run without a limit": sdk.stream(start, {"process": command("echo hi"), "stdin": False}, limit=0),
        "commands.run with stdin": sdk.stream(start, {"process": command("cat"), "stdin": True}),
        "commands.connect": sdk.stream("process.Process/Connect", {"process": {"pid": 7}}),
        "commands.list": sdk.unary("process.Process/List", {}),
        "commands.kill": sdk.unary("process.Process/SendSignal", {"process": {"pid": 7}, "signal": "SIGNAL_SIGKILL"}),
        "send_stdin": sdk.unary("process.Process/SendInput", {"process": {"pid": 7}, "input": {"stdin": "aW4="}}),
        "files.read": sdk.files("GET", path="dir%2F%C3%A9+a.txt"),
        "files.read as root": sdk.files("GET", path="a.txt", username="root"),
        "files.write": sdk.files("POST", b"hello", path="dir%2F%C3%A9+a.txt"),
        "files.list": sdk.unary(f"{at}ListDir", {"path": "/tmp", "depth": 1}),
        "files.list deep": sdk.unary(f"{at}ListDir", {"path": "/tmp", "depth": 3}, user="root"),
        "files.info": sdk.unary(f"{at}Stat", {"path": "a.txt"}),
        "files.exists": sdk.unary(f"{at}Stat", {"path": "a.txt"}),
        "files.make_dir": sdk.unary(f"{at}MakeDir", {"path": "dir"}),
        "files.move": sdk.unary(f"{at}Move", {"source": "a.txt", "destination": "b.txt"}),
        "files.remove": sdk.unary(f"{at}Remove", {"path": "a.txt"}),
        "health": sdk.health(),
    }


def _outside(sdk: _Vendor) -> Table:
    """What all SDKs have that goes to the control plane, and is the same in all."""
    return {
        "kill": sdk.api("DELETE", "/sandboxes/{id}"),
        "info": sdk.api("GET", "/sandboxes/{id}"),
        "list": sdk.api("GET", "/v2/sandboxes"),
        "list paused by metadata": sdk.api("GET", "/v2/sandboxes", metadata=ENCODED, state="paused", limit="100"),
        "set_timeout": sdk.api("POST", "/sandboxes/{id}/timeout", {"timeout": 60}),
        "metrics": sdk.api("GET", "/sandboxes/{id}/metrics"),
    }


def _newer(sdk: _Vendor) -> Table:
    """What E2B's and UCloud's share beyond that."""
    return {
        "list by template": sdk.api(
            "GET", "/v2/sandboxes", template="tpl", startedAfter="2026-11-23T07%3A00%3A00%2B00%3A00"
        ),
        "metrics between": sdk.api("GET", "/sandboxes/{id}/metrics", start="1795417200", end="1795420800"),
        "snapshot": sdk.api("POST", "/sandboxes/{id}/snapshots", {}),
        "snapshot by name": sdk.api("POST", "/sandboxes/{id}/snapshots", {"name": "snap"}),
        "list_snapshots": sdk.api("GET", "/snapshots", limit="100"),
        "list_snapshots of one": sdk.api("GET", "/snapshots", limit="100", sandboxID=sdk.id),
        "delete_snapshot": sdk.api("DELETE", "/templates/team%2Fsnap%3Adefault"),
        "fork": sdk.api("POST", "/sandboxes/{id}/fork", {"timeout": 300, "count": 2}),
        "close_stdin": sdk.unary("process.Process/CloseStdin", {"process": {"pid": 7}}),
    }


_e2b = _Vendor()
_E2B_CREATE = {"templateID": "code-interpreter-v1", "timeout": 123, "metadata": {}, "envVars": {}}

E2B: Table = {
    **_outside(_e2b),
    **_newer(_e2b),
    **_inside(_e2b),
    "create": _e2b.api("POST", "/v2/sandboxes", {**_E2B_CREATE, "metadata": METADATA, "envVars": {"A": "1"}}),
    "create with nothing said": _e2b.api(
        "POST", "/v2/sandboxes", {"templateID": "code-interpreter-v1", "metadata": {}, "envVars": {}}
    ),
    "create pausing": _e2b.api("POST", "/v2/sandboxes", {**_E2B_CREATE, "autoPause": True}),
    "create waking": _e2b.api(
        "POST", "/v2/sandboxes", {**_E2B_CREATE, "autoPause": True, "autoResume": {"enabled": True}}
    ),
    "create without internet": _e2b.api("POST", "/v2/sandboxes", {**_E2B_CREATE, "allow_internet_access": False}),
    "create by key": tuple(
        _with(request, {"idempotency-key": "key-1"}) for request in _e2b.api("POST", "/v2/sandboxes", _E2B_CREATE)
    ),
    "connect": _e2b.api("POST", "/v2/sandboxes/{id}/connect", {"timeout": 77}),
    "pause": _e2b.api("POST", "/sandboxes/{id}/pause", {}),
    "pause without memory": _e2b.api("POST", "/sandboxes/{id}/pause", {"memory": False}),
}

_ucloud = _Vendor()
_UCLOUD_CREATE = {**_E2B_CREATE, "secure": True, "allow_internet_access": True}

UCLOUD: Table = {
    **_outside(_ucloud),
    **_newer(_ucloud),
    **_inside(_ucloud),
    "create": _ucloud.api("POST", "/sandboxes", {**_UCLOUD_CREATE, "metadata": METADATA, "envVars": {"A": "1"}}),
    "create with nothing said": _ucloud.api("POST", "/sandboxes", {**_UCLOUD_CREATE, "timeout": 300}),
    "create pausing": _ucloud.api("POST", "/sandboxes", {**_UCLOUD_CREATE, "autoPause": True}),
    "create waking": _ucloud.api(
        "POST", "/sandboxes", {**_UCLOUD_CREATE, "autoPause": True, "autoResume": {"enabled": True}}
    ),
    "create without internet": _ucloud.api("POST", "/sandboxes", {**_UCLOUD_CREATE, "allow_internet_access": False}),
    "connect": _ucloud.api("POST", "/sandboxes/{id}/connect", {"timeout": 77}),
    "pause": _ucloud.api("POST", "/sandboxes/{id}/pause", {"memory": True}),
    "pause without memory": _ucloud.api("POST", "/sandboxes/{id}/pause", {"memory": False}),
}


def _with_siblings(prefix: str, connecting: str) -> tuple[Table, Table]:
    """PPIO's dialect and its older one, which its sibling speaks under names of its own."""
    sdk = _Vendor(prefix=prefix, code=(), unary_timeout=False)
    create = {**_UCLOUD_CREATE, "autoPause": False}
    modern = {
        **_outside(sdk),
        **_inside(sdk),
        "create": sdk.api("POST", "/sandboxes", {**create, "metadata": METADATA, "envVars": {"A": "1"}}),
        "create with nothing said": sdk.api("POST", "/sandboxes", {**create, "timeout": 300}),
        "create pausing": sdk.api(
            "POST", "/sandboxes", {**create, "autoPause": True, "autoResume": {"enabled": False}}
        ),
        "create waking": sdk.api("POST", "/sandboxes", {**create, "autoPause": True, "autoResume": {"enabled": True}}),
        "create without internet": sdk.api("POST", "/sandboxes", {**create, "allow_internet_access": False}),
        "connect": tuple(
            _with(request, {f"{connecting}-sandbox-id": ID, f"{connecting}-sandbox-port": "49983"})
            for request in sdk.api("POST", "/sandboxes/{id}/connect", {"timeout": 77})
        ),
        "pause": sdk.api("POST", "/sandboxes/{id}/pause"),
        "metrics between": sdk.api("GET", "/sandboxes/{id}/metrics", start="1795417200", end="1795420800"),
        "snapshot": sdk.api("POST", "/sandboxes/{id}/snapshots", {}),
        "list_snapshots": sdk.api("GET", "/snapshots", limit="100"),
        "list_snapshots of one": sdk.api("GET", "/snapshots", limit="100", sandboxID=sdk.id),
        "delete_snapshot": sdk.api("DELETE", "/templates/team/snap:default"),
        "fork": sdk.api("POST", "/sandboxes/{id}/clone", {"count": 2, "strict": False, "timeout": 300}),
    }
    sdk = _Vendor(id=LEGACY_ID, prefix=prefix, code=(), unary_timeout=False)
    create = {**_E2B_CREATE, "autoPause": False, "secure": False, "allowInternetAccess": True}
    legacy = {
        **_outside(sdk),
        **_inside(sdk),
        "create": sdk.api("POST", "/sandboxes", {**create, "metadata": METADATA, "envVars": {"A": "1"}}),
        "create with nothing said": sdk.api("POST", "/sandboxes", {**create, "timeout": 300}),
        "create pausing": sdk.api("POST", "/sandboxes", {**create, "autoPause": True}),
        "create waking": sdk.api(
            "POST", "/sandboxes", {**create, "autoPause": True, "metadata": {"auto_resume": "true"}}
        ),
        "create without internet": sdk.api("POST", "/sandboxes", {**create, "allowInternetAccess": False}),
        "connect": sdk.api("POST", "/sandboxes/{id}/connect", {"timeout": 77, "autoPause": False}),
        "pause": sdk.api("POST", "/sandboxes/{id}/pause", {"sync": True}),  # its `beta_pause(sync=True)`
        "metrics between": sdk.api("GET", "/sandboxes/{id}/metrics", start="1795417200000", end="1795420800000"),
        "fork": sdk.api("POST", "/sandboxes/{id}/clone", {"count": 2, "strict": False, "timeout": 300}),
    }
    return modern, legacy


PPIO, PPIO_LEGACY = _with_siblings("ppio", connecting="e2b")
NOVITA, NOVITA_LEGACY = (
    {
        **table,
        "files.write": tuple(
            replace(
                request,
                form="multipart",
                body={"name": "file", "filename": "dir/é a.txt", "content": b"hello"},
                headers={**request.headers, "content-type": "multipart/form-data"},
            )
            for request in table["files.write"]
        ),
    }
    for table in _with_siblings("novita", connecting="novita")
)

CLUSTER: Table = {
    **{verb: rows for verb, rows in E2B.items() if verb != "create by key"},
    "create": _e2b.api(
        "POST", "/sandboxes", {**_E2B_CREATE, "secure": True, "metadata": METADATA, "envVars": {"A": "1"}}
    ),
    "create with nothing said": _e2b.api("POST", "/sandboxes", {**_E2B_CREATE, "secure": True, "timeout": 300}),
    "create pausing": _e2b.api("POST", "/sandboxes", {**_E2B_CREATE, "secure": True, "autoPause": True}),
    "create waking": _e2b.api(
        "POST", "/sandboxes", {**_E2B_CREATE, "secure": True, "autoPause": True, "autoResume": {"enabled": True}}
    ),
    "create without internet": _e2b.api(
        "POST", "/sandboxes", {**_E2B_CREATE, "secure": True, "allow_internet_access": False}
    ),
    "connect": _e2b.api("POST", "/sandboxes/{id}/connect", {"timeout": 77}),
}
"""Of E2B's published server, for which there is no SDK of this version any more: rows of PROTOCOL.md 2.2."""

LOCAL: Table = {**E2B, "connect": CLUSTER["connect"]}
"""This package's engine, which speaks as E2B does and knows both versions of connect."""

TABLES: Mapping[str, Table] = {
    "e2b": E2B,
    "e2b-cluster": CLUSTER,
    "ucloud": UCLOUD,
    "ppio": PPIO,
    "ppio-legacy": PPIO_LEGACY,
    "novita": NOVITA,
    "novita-legacy": NOVITA_LEGACY,
    "local": LOCAL,
}
