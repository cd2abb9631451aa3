"""How listings are filtered and cut into pages that stay right while what they list comes and goes."""

from __future__ import annotations

import base64
import binascii
import heapq
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Generic, Literal, NamedTuple, TypeVar
from urllib.parse import unquote_plus

from sandbox_tools.errors import ConfigError

Order = Literal["asc", "desc"]

T = TypeVar("T")

_TOKEN = re.compile(r"(\d{1,20})\.([a-z0-9]{1,64})\.(asc|desc)\.(\d{1,20})")


class Row(NamedTuple, Generic[T]):
    """One thing to list; any such tuple will do, as there may be thousands for a page of a hundred.

    Attributes:
        id: Its name, unlike all others; lower-case letters and digits.
        starts: When it was started, made or resumed, in microseconds since the epoch, newest first. A page is cut by
            the last start before the listing began, so that what is resumed between two pages keeps its place.
        item: What the caller gets.
    """

    id: str
    starts: tuple[int, ...]
    item: T


def page(
    rows: Iterable[tuple[str, tuple[int, ...], T]],
    *,
    limit: int | None,
    order: Order | None,
    token: str | None,
    now: datetime,
) -> tuple[list[T], str | None]:
    """One page, by start and then by id, and the token of the next; None on the last.

    The token names the last row given and the moment of the first page: what came later is not in the listing, what
    went is missing from it, and everything else is in it once.

    Args:
        rows: As `Row` has them.
        limit: Rows at most. None: all.
        order: Of the starts; ids are in ascending order in both. None: the token's, else newest first.
        token: Of an earlier page. None: the first page.

    Raises:
        ConfigError: The token is not one of ours, or one of a listing in the other order.
    """
    cursor = _parse(token, order) if token else None
    order = cursor.order if cursor else order or "desc"
    moment = cursor.moment if cursor else micros(now)
    sign = 1 if order == "asc" else -1
    after = (sign * cursor.start, cursor.id) if cursor else (-math.inf, "")
    listed = []
    for row_id, starts, item in rows:
        start = starts[0]
        if start > moment:
            earlier = [each for each in starts if each <= moment]
            if not earlier:
                continue
            start = earlier[0]
        if (sign * start, row_id) > after:
            listed.append((sign * start, row_id, item))

    # As no two have one id, what is listed is never compared.
    given = sorted(listed) if limit is None else heapq.nsmallest(limit, listed)
    items = [item for _, _, item in given]
    if len(given) == len(listed):
        return items, None

    start, row_id, _ = given[-1]
    return items, _render(_Cursor(start=sign * start, id=row_id, order=order, moment=moment))


def parse_metadata(query: str) -> dict[str, str]:
    """A metadata filter as E2B's SDKs send it: encoded once as a whole, and once more each key and value.

    Raises:
        ConfigError: It is not made of pairs.
    """
    pairs = [pair.split("=") for pair in unquote_plus(query).split("&") if pair]
    if any(len(pair) != 2 for pair in pairs):
        msg = "Error parsing metadata: send URL-encoded `key=value` pairs joined by `&`."
        raise ConfigError(msg, op="list")

    return {unquote_plus(key): unquote_plus(value) for key, value in pairs}


def has(metadata: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether all wanted pairs are there."""
    return all(metadata.get(key) == value for key, value in wanted.items())


def micros(moment: datetime) -> int:
    """Microseconds since the epoch, exactly."""
    return (moment - datetime.fromtimestamp(0, moment.tzinfo)) // timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True)
class _Cursor:
    start: int
    id: str
    order: Order
    moment: int


def _render(cursor: _Cursor) -> str:
    text = f"{cursor.start}.{cursor.id}.{cursor.order}.{cursor.moment}"
    return base64.urlsafe_b64encode(text.encode()).decode()


def _parse(token: str, order: Order | None) -> _Cursor:
    try:
        match = _TOKEN.fullmatch(base64.b64decode(token.encode(), b"-_", validate=True).decode())
    except (binascii.Error, ValueError):
        match = None
    if match is None or order not in (None, match[3]):
        msg = "Invalid next token"
        raise ConfigError(msg, op="list")

    return _Cursor(start=int(match[1]), id=match[2], order="asc" if match[3] == "asc" else "desc", moment=int(match[4]))
