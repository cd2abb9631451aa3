"""Who may reach a sandbox's ports: its access token, signed file URLs, its traffic token; checked out here, no I/O."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sandbox_tools.models import ENVD_PORT, INTERPRETER_PORT

# How the engine itself speaks with a guest: from outside there are no such routes. Routers are lenient about the end
# of a path (a regular expression's `$` matches before a line end): so is this.
_INTERNAL = re.compile(r"/(init|reboot|warm)[/\s]*")

# What E2B's SDKs ask of the interpreter without the sandbox's token. All else needs it, however it is spelt.
_OPEN = re.compile(r"/(health|contexts(/.*)?)", re.DOTALL)

_UNAUTHORIZED = "unauthorized access, please provide a valid access token or method signing if supported"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An answer that needs no sandbox: a status and what is wrong."""

    status: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What opens a sandbox."""

    token: str
    secure: bool
    """Whether envd and the interpreter demand the token; one that is wrong is refused in any case."""
    traffic_token: str | None = None
    """What every port but envd's demands. None: they are public."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What makes the URL of a file work without a token, as E2B's SDKs compute it."""

    path: str
    operation: str
    user: str
    expiration: str | None
    """Unix seconds as they are in the URL. None: it never expires."""
    value: str

    @classmethod
    def of(cls, method: str, arguments: Mapping[str, str]) -> Signature | None:
        """The signature in a URL's query; None: it has none."""
        if "signature" not in arguments:
            return None
        return cls(
            path=arguments.get("path", ""),
            operation="write" if method in ("POST", "PUT") else "read",
            user=arguments.get("username", ""),
            expiration=arguments.get("signature_expiration"),
            value=arguments["signature"],
        )

    def is_of(self, token: str) -> bool:
        """Whether it was made with this token, expired or not."""
        signed = f"{self.path}:{self.operation}:{self.user}:{token}"
        if self.expiration is not None:
            signed += f":{self.expiration}"
        digest = hashlib.sha256(signed.encode(errors="surrogateescape")).digest()
        expected = "v1_" + base64.b64encode(digest).decode().rstrip("=")
        return _same(self.value, expected)

    def is_over(self, now: float) -> bool:
        """Whether it has expired at `now`, in Unix seconds."""
        if self.expiration is None:
            return False
        try:
            return int(self.expiration) < now
        except ValueError:
            return True


def refusal(
    keys: Keys, port: int, method: str, path: str, headers: Mapping[str, str], arguments: Mapping[str, str], now: float
) -> Refusal | None:
    """Why a request must not go in; None: it may.

    Args:
        keys: The sandbox's.
        port: Which of its ports.
        method: In upper case; a WebSocket's is GET.
        path: Decoded.
        headers: By lower-case name.
        arguments: The query's.
        now: Unix seconds.
    """
    if port == ENVD_PORT:
        if _INTERNAL.fullmatch(path):
            return Refusal(status=404, message="not found")
        return _envd_refusal(keys, method, path, headers.get("x-access-token"), arguments, now)

    if keys.traffic_token is not None and not _same(headers.get("e2b-traffic-access-token", ""), keys.traffic_token):
        what = "wrong" if "e2b-traffic-access-token" in headers else "missing"
        return Refusal(
            status=403, message=f"The traffic access token is {what}. Send it as `E2B-Traffic-Access-Token`."
        )

    if port == INTERPRETER_PORT:
        return _token_refusal(keys, headers.get("x-access-token"), needed=not _OPEN.fullmatch(path))
    return None


def _envd_refusal(
    keys: Keys, method: str, path: str, given: str | None, arguments: Mapping[str, str], now: float
) -> Refusal | None:
    if path == "/health":
        return None
    if path != "/files" or not keys.secure or given is not None:
        return _token_refusal(keys, given, needed=True)

    signature = Signature.of(method, arguments)
    if signature is None:
        return Refusal(status=401, message="missing signature query parameter")
    if not signature.is_of(keys.token):
        return Refusal(status=401, message="invalid signature")
    if signature.is_over(now):
        return Refusal(status=401, message="signature is already expired")
    return None


def _token_refusal(keys: Keys, given: str | None, *, needed: bool) -> Refusal | None:
    if given is None and not (needed and keys.secure):
        return None
    return None if _same(given or "", keys.token) else Refusal(status=401, message=_UNAUTHORIZED)


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogateescape"), expected.encode())
