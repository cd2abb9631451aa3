"""Whose traffic a request is: headers, host name, user name, token or signature -> a port of a sandbox; no I/O."""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from starlette.datastructures import Headers

from sandbox_tools.engine.access import Signature
from sandbox_tools.models import ENVD_PORT, INTERPRETER_PORT

SERVICE_PORTS = frozenset((ENVD_PORT, INTERPRETER_PORT))

_CONTROL = re.compile(r"/(sandboxes|snapshots|templates|volumes|secrets|v2|v3)(/|$)")
_INTERPRETER = re.compile(r"/(execute|contexts)(/|$)")
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_ID = re.compile(r"[a-z0-9]+", re.ASCII)
_LABEL = re.compile(r"([0-9]+)-([^-.:]*)(?:-[^-.:]*)?(\.|(?=:|$))", re.ASCII)


class AddressError(ValueError):
    """Raised when a request names a sandbox in a way that can't be read; what the client is told, with 400 or 401."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Address:
    """A port of a sandbox. An empty id is a token's that no sandbox has."""

    sandbox_id: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, as far as its way is decided by it."""

    method: str
    path: str
    """Decoded."""
    query: str = ""
    headers: Headers = field(default_factory=Headers)

    @property
    def arguments(self) -> dict[str, str]:
        """The first value of each query parameter."""
        pairs = parse_qs(self.query, keep_blank_values=True, max_num_fields=None)
        return {name: values[0] for name, values in pairs.items()}


def address_of(asked: Asked, tokens: Iterable[tuple[str, str]]) -> Address | None:
    """The sandbox's port that a request is for; None: it is for the control plane.

    The order is E2B's edge's, then what PPIO's SDK sends where nothing else names the sandbox: its token, and the
    signature of a file's URL. A host or user name and the port of a user's own server say for certain that a sandbox
    is meant. With the other marks the control plane's paths win: PPIO's SDK sends them on its calls there as well.

    Args:
        asked: The request.
        tokens: Each sandbox's id and access token; looked at only where nothing else decides.

    Raises:
        AddressError: A sandbox is named, but not so that it could be found.
    """
    control = _CONTROL.match(asked.path) is not None
    headers = asked.headers
    port = headers.get("e2b-sandbox-port") or headers.get("ppio-sandbox-port")
    if sandbox_id := headers.get("e2b-sandbox-id") or headers.get("ppio-sandbox-id"):
        if control and (port is None or port in map(str, SERVICE_PORTS)):
            return None
        return Address(sandbox_id=_id(sandbox_id), port=_port(port) if port else _service(asked.path))

    if match := _LABEL.match(headers.get("host", "").lower()):
        if not match[3]:
            raise AddressError(400, "Invalid host")
        return Address(sandbox_id=_id(match[2]), port=_port(match[1]))

    if match := _user(headers.get("authorization", "")):
        return Address(sandbox_id=_id(match[2]), port=_port(match[1]))

    if control:
        return None

    if token := headers.get("x-access-token"):
        return Address(
            sandbox_id=next((each for each, its in tokens if hmac.compare_digest(token.encode(), its.encode())), ""),
            port=_port(port) if port else _service(asked.path),
        )

    if asked.path == "/files" and (signature := Signature.of(asked.method, asked.arguments)):
        found = next((each for each, its in tokens if signature.is_of(its)), None)
        if found is None:
            raise AddressError(401, "invalid signature")
        return Address(sandbox_id=found, port=ENVD_PORT)

    if port:
        raise AddressError(400, "missing header: `E2b-Sandbox-Port` came without `E2b-Sandbox-Id`")
    return None


def names_the_sandbox(authorization: str, sandbox_id: str) -> bool:
    """Whether a Basic user name is this sandbox's address rather than a user inside, who is no business of ours."""
    match = _user(authorization)
    return match is not None and match[2] == sandbox_id


def _user(authorization: str) -> re.Match[str] | None:
    kind, _, encoded = authorization.partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        user = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")[0]
    except (binascii.Error, ValueError):
        return None

    match = _LABEL.match(user)
    return match if match and match[3] else None


def _id(named: str) -> str:
    # Some SDKs append the client's id after a dash.
    sandbox_id, *client = named.split("-")
    if len(client) > 1 or not _ID.fullmatch(sandbox_id):
        raise AddressError(400, "Invalid sandbox ID")
    return sandbox_id


def _port(named: str) -> int:
    if not _PORT.fullmatch(named) or not 0 < int(named) < 1 << 16:
        raise AddressError(400, "Invalid sandbox port")
    return int(named)


def _service(path: str) -> int:
    return INTERPRETER_PORT if _INTERPRETER.match(path) else ENVD_PORT
