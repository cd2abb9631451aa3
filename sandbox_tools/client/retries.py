"""When a request is sent again: what failed, what that leaves open, and how long to wait."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from sandbox_tools.errors import (
    APIError,
    CapacityError,
    ConnectError,
    RateLimitError,
    SandboxError,
    ServerError,
    TransportError,
)

T = TypeVar("T")

ATTEMPTS = 4


async def repeat(once: Callable[[], Awaitable[T]], again: Callable[[BaseException], bool]) -> T:
    """What `once` gives, tried up to `ATTEMPTS` times while `again` says so of its error, with waits in between."""
    try:
        return await once()
    except SandboxError as error:
        if not again(error):
            raise

        failures = [error]

    # Imported where something has failed: what tenacity does around a call that succeeds costs a fifth of the call.
    import tenacity

    async def next_time() -> T:
        if failures:
            raise failures.pop()

        return await once()

    jitter = tenacity.wait_random_exponential(multiplier=0.2, max=10)
    retrying = tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=lambda state: wait(state.outcome.exception() if state.outcome else None) + jitter(state),
        retry=tenacity.retry_if_exception(again),
        reraise=True,
    )
    return await retrying(next_time)


def wait(error: BaseException | None) -> float:
    """Seconds that a server asks for before the next attempt."""
    return (error.retry_after or 0.0) if isinstance(error, APIError) else 0.0


def safe_to_repeat(error: BaseException) -> bool:
    """Whether another attempt may succeed, at what may be done twice."""
    if isinstance(error, APIError):
        # The last word on it is the server's `Should-Retry`, where it has one.
        return bool(error.retryable) or (error.retryable is None and error.status_code in (502, 504))

    # A broken connection leaves open whether it happened, which does not matter to what may be done twice.
    return isinstance(error, ConnectError) or type(error) is TransportError


def may_have_happened(error: BaseException) -> bool:
    """Whether the call may have had an effect although it failed."""
    unsure = isinstance(error, (TransportError, ServerError)) and not isinstance(error, ConnectError)
    return unsure and getattr(error, "error_code", None) != "sandbox_capacity_unavailable"


def certainly_not_done(error: BaseException) -> bool:
    """Whether another attempt may succeed, at what must not be done twice."""
    refused = isinstance(error, (ConnectError, RateLimitError, CapacityError)) and bool(error.retryable)
    return refused and not may_have_happened(error)


def retry_after(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for, as a number or as a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None

    with suppress(ValueError):
        return max(0.0, float(value))

    with suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())

    return None
