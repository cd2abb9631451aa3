"""Between bytes and our models: arguments into bodies, answers into data."""

from __future__ import annotations

import functools
import json
import urllib.parse
from collections.abc import Awaitable
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from sandbox_tools.errors import ConfigError, NotFoundError, ProtocolError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
N = TypeVar("N", bound=float | None)


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
        if not isinstance(answer, bytes):
            return adapter.validate_python(answer)  # type: ignore[no-any-return]

        with suppress(ValidationError):
            return adapter.validate_json(answer)  # type: ignore[no-any-return]

        # Slower: with nulls, each of which means the same as an absent field.
        return adapter.validate_python(json.loads(answer, object_hook=_present))  # type: ignore[no-any-return]
    except (ValueError, RecursionError):
        msg = f"`{op}` got an answer not of the protocol. Check the API URL, the domain and the template."
        raise ProtocolError(msg, op=op, sandbox_id=sandbox_id) from None


def rows(kind: type[T], answer: bytes, op: str, sandbox_id: str | None = None) -> list[T]:
    """An answer's array, for which some servers say null when it is empty."""
    return parsed(list[kind] | None, answer, op, sandbox_id) or []  # type: ignore[arg-type, valid-type]


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
