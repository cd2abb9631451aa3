"""Between bytes and our models: arguments into bodies, answers and pages into data."""

from __future__ import annotations

import functools
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from sandbox_tools.client.transport import Call, Transport
from sandbox_tools.errors import ConfigError, NotFoundError, ProtocolError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
N = TypeVar("N", bound=float | None)

IDLE_PAGES = 3
"""Pages in a row that may bring nothing new: one may be empty, or come twice."""

_ROWS = list[dict[str, Any]] | None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def body(model: type[M], op: str, **fields: object) -> M:
    """A request's body; a `ConfigError` names the argument that is wrong."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        msg = f"`{op}` was given a wrong `{'.'.join(map(str, first['loc']))}`: {first['msg']}. Correct it."
        raise ConfigError(msg, op=op) from None


def positive(op: str | None, name: str, value: N, sandbox_id: str | None = None) -> N:
    """A number that is more than nothing, or None where that may be."""
    if value is not None and value <= 0:
        msg = f"`{name}` is {value!r}. Pass a positive number."
        raise ConfigError(msg, op=op, sandbox_id=sandbox_id)

    return value


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


async def was_there(work: Awaitable[object]) -> bool:
    """Whether there was what that work is about."""
    try:
        await work
    except NotFoundError:
        return False

    return True


def parsed(kind: type[T], answer: Any, op: str, sandbox_id: str | None = None) -> T:
    """An answer, in bytes or as data, that is of this kind.

    Neither it nor pydantic's error is shown where it is not: they may hold an access token.
    """
    adapter = _adapter(kind)  # type: ignore[arg-type]
    try:
        parse = adapter.validate_json if isinstance(answer, bytes) else adapter.validate_python
        return parse(answer)  # type: ignore[no-any-return]
    except ValidationError:
        size = f"{len(answer)} bytes" if isinstance(answer, bytes) else "data"
        msg = f"`{op}` was answered with {size} not of the protocol. Check the API URL, the domain and the template."
        raise ProtocolError(msg, op=op, sandbox_id=sandbox_id) from None


def done(answer: bytes, op: str, sandbox_id: str | None = None) -> None:
    """An answer that holds nothing; the login page of a network in between is not one."""
    parsed(object, answer or b"null", op, sandbox_id)


def present(kind: type[T], answer: bytes, op: str, sandbox_id: str | None = None) -> T:
    """An answer's one object, in which a null means the same as an absent field."""
    return parsed(kind, _present(parsed(dict[str, Any], answer, op, sandbox_id)), op, sandbox_id)


def rows(kind: type[T], answer: bytes, op: str, sandbox_id: str | None = None) -> list[T]:
    """An answer's array of objects."""
    with suppress(ProtocolError):
        return parsed(list[kind], answer, op)  # type: ignore[valid-type]

    # Slower: with nulls, where the model has none.
    answered: list[dict[str, Any]] = parsed(_ROWS, answer, op, sandbox_id) or []  # type: ignore[arg-type]
    return [parsed(kind, _present(row), op, sandbox_id) for row in answered]


async def pages(
    transport: Transport, op: str, path: str, params: Mapping[str, str], kind: type[T], identify: Callable[[T], str]
) -> AsyncIterator[T]:
    """The rows of all pages, each once, whatever the server repeats.

    Raises:
        ProtocolError: Its pages lead nowhere, so that rows may be missing.
    """
    seen: set[str] = set()
    idle = 0
    params = {"limit": "100", **params}
    while True:
        response = await transport.send(Call(op=op, method="GET", path=path, params=params))
        before = len(seen)
        for row in rows(kind, response.content, op):
            if (key := identify(row)) not in seen:
                seen.add(key)
                yield row

        token = response.headers.get("x-next-token")
        if not token:
            return

        idle = 0 if len(seen) > before else idle + 1
        if idle == IDLE_PAGES:
            msg = f"`{op}` was given page after page that bring nothing new. Check what answers at the API URL."
            raise ProtocolError(msg, op=op)

        params["nextToken"] = token


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
