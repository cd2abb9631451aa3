"""Between the control plane's bytes and our models: arguments into bodies, answers and pages into data."""

from __future__ import annotations

import functools
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from datetime import datetime
from operator import attrgetter
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from sandbox_tools.client.transport import Call, Transport
from sandbox_tools.errors import ConfigError, ProtocolError
from sandbox_tools.models import SandboxInfo, SnapshotInfo

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R", SandboxInfo, SnapshotInfo)

IDLE_PAGES = 3
"""Pages in a row that may bring nothing new: one may be empty, or come twice."""

_ANYTHING = TypeAdapter(Any)
_OBJECT = TypeAdapter(dict[str, Any])
_ROWS = TypeAdapter(list[dict[str, Any]] | None)


@functools.cache
def _rows_of(model: type[M]) -> TypeAdapter[list[M]]:
    return TypeAdapter(list[model])  # type: ignore[valid-type]


def body(model: type[M], op: str, **fields: object) -> M:
    """A request's body; a `ConfigError` names the argument that is wrong."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        msg = f"`{op}` was given a wrong `{'.'.join(map(str, first['loc']))}`: {first['msg']}. Correct it."
        raise ConfigError(msg, op=op) from None


def seconds(op: str, timeout: int) -> int:
    """A timeout that some time is left of."""
    if timeout <= 0:
        msg = f"`timeout` of `{op}` is {timeout!r}. Pass a positive number of seconds."
        raise ConfigError(msg, op=op)

    return timeout


def moment(op: str, name: str, value: datetime) -> datetime:
    """A moment that is the same everywhere."""
    if value.tzinfo is None:
        msg = f"`{name}` of `{op}` has no time zone. Pass an aware datetime, such as `datetime.now(UTC)`."
        raise ConfigError(msg, op=op)

    return value


def path_part(op: str, identifier: str) -> str:
    """An id as one part of a path."""
    if not identifier or identifier in (".", ".."):
        msg = f"`{op}` needs an id, not {identifier!r}. Pass the `id` of a sandbox, a snapshot or a context."
        raise ConfigError(msg, op=op)

    return urllib.parse.quote(identifier, safe="")


def done(response: httpx.Response, op: str, sandbox_id: str | None = None) -> None:
    """An answer that holds nothing; the login page of a network in between is not one."""
    try:
        _ANYTHING.validate_json(response.content or b"null")
    except ValidationError:
        raise _shapeless(response, op, sandbox_id) from None


def parsed(model: type[M], response: httpx.Response, op: str, sandbox_id: str | None = None) -> M:
    """The answer's one object."""
    try:
        return model.model_validate(_present(_OBJECT.validate_json(response.content)))
    except ValidationError:
        raise _shapeless(response, op, sandbox_id) from None


def parsed_rows(model: type[M], response: httpx.Response, op: str, sandbox_id: str | None = None) -> list[M]:
    """The answer's array of objects."""
    with suppress(ValidationError):
        return _rows_of(model).validate_json(response.content)

    # Slower: with nulls, where the model has none.
    try:
        return [model.model_validate(_present(row)) for row in _ROWS.validate_json(response.content) or ()]
    except ValidationError:
        raise _shapeless(response, op, sandbox_id) from None


async def pages(
    transport: Transport, op: str, path: str, params: Mapping[str, str], model: type[R]
) -> AsyncIterator[list[R]]:
    """Page by page the rows that are new, whatever the server repeats.

    Raises:
        ProtocolError: Its pages lead nowhere, so that rows may be missing.
    """
    identifier = attrgetter("snapshot_id" if model is SnapshotInfo else "sandbox_id")
    seen: set[str] = set()
    idle = 0
    params = {"limit": "100", **params}
    while True:
        response = await transport.send(Call(op=op, method="GET", path=path, params=params))
        rows = {identifier(row): row for row in parsed_rows(model, response, op)}
        fresh = [row for key, row in rows.items() if key not in seen]
        seen.update(rows)
        yield fresh

        token = response.headers.get("x-next-token")
        if not token:
            return

        idle = 0 if fresh else idle + 1
        if idle == IDLE_PAGES:
            msg = f"`{op}` was given page after page that bring nothing new. Check what answers at the API URL."
            raise ProtocolError(msg, op=op)

        params["nextToken"] = token


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    # On this wire a null means the same as an absent field.
    return {name: value for name, value in fields.items() if value is not None}


def _shapeless(response: httpx.Response, op: str, sandbox_id: str | None) -> ProtocolError:
    # Neither the body nor pydantic's error is shown: they may hold an access token.
    kind = response.headers.get("content-type", "no content type")
    msg = (
        f"`{op}` was answered with status {response.status_code} and {len(response.content)} bytes of {kind!r} that "
        "are not of the protocol. Check the API URL."
    )
    return ProtocolError(msg, op=op, sandbox_id=sandbox_id)
