"""The error tree, and the one table between HTTP status and class; every room raises from here.

::

    SandboxError                        message, op, sandbox_id, retryable
      ConfigError (ValueError)          bad argument or missing key; raised before any I/O
      TransportError                    no usable answer came back
        ConnectError                    the request never left
        RequestTimeoutError (TimeoutError)   no answer in time: it may have happened
        ProtocolError                   an answer that is not of the protocol
      APIError                          the server said no: status_code, error_code, request_id
        AuthenticationError             401
        AccessDeniedError               403
        NotFoundError                   404: of a template, snapshot, file, context or process
          SandboxNotFoundError          404 of the sandbox itself, and so a SandboxExpiredError too
        ConflictError                   409
        RateLimitError                  429, retry_after
        ServerError                     5xx
          CapacityError                 503
      SandboxStateError                 the sandbox is not in the state the call needs
        SandboxExpiredError             it is gone for certain: no other error says so
        SandboxBusyError                leases are held, or a transition is in progress
        StateLostError                  resumed, but memory or files are not what was paused
      OwnershipError                    bound to another thread or owner
      ExecutionTimeoutError (TimeoutError)   the code ran longer than its timeout; partial output kept
      CommandError                      only from `CommandResult.check()`
      EngineError                       server side: a `runsc` call failed

Each leaf answers two questions: whose fault is it, and is it safe to repeat. `retryable` is True, False, or None
where nobody can know (the request may have taken effect).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandbox_tools.models import CommandResult, Execution


class SandboxError(Exception):
    """The root of every error this package raises.

    Args:
        message: What happened, to which thing, and what to do next.
        op: The verb that failed, such as `"pause"`. None where no single verb was under way.
        sandbox_id: The sandbox concerned. None where there was none yet, or where it must not be named.
        retryable: Overrides the class's own answer for this one error.
    """

    retryable: bool | None = False

    def __init__(
        self,
        message: str,
        *,
        op: str | None = None,
        sandbox_id: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.op = op
        self.sandbox_id = sandbox_id
        if retryable is not None:
            self.retryable = retryable


class ConfigError(SandboxError, ValueError):
    """Raised before any I/O when an argument, a setting or the machine itself cannot work."""


class TransportError(SandboxError):
    """Raised when no usable answer came back."""

    retryable: bool | None = None


class ConnectError(TransportError):
    """Raised when the request never left, so it cannot have had an effect."""

    retryable: bool | None = True


class RequestTimeoutError(TransportError, TimeoutError):
    """Raised when no answer came within `request_timeout` seconds: the request may have taken effect."""


class ProtocolError(TransportError):
    """Raised when the answer is not of the protocol."""

    retryable: bool | None = False


class APIError(SandboxError):
    """Raised when the server said no.

    Args:
        status_code: The HTTP status.
        error_code: The server's own slug, such as `"sandbox_capacity_unavailable"`. None if it gave none.
        request_id: What the server calls this request in its logs. None if it gave none.
        retry_after: Seconds after which the server asks to be tried again. None if it gave none.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        error_code: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        op: str | None = None,
        sandbox_id: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, op=op, sandbox_id=sandbox_id, retryable=retryable)
        self.status_code = status_code if status_code is not None else status_of(type(self))
        self.error_code = error_code
        self.request_id = request_id
        self.retry_after = retry_after


class AuthenticationError(APIError):
    """Raised when the key is missing or wrong (401)."""


class AccessDeniedError(APIError):
    """Raised when the key is right but may not do this (403)."""


class NotFoundError(APIError):
    """Raised when the server knows no such thing (404).

    Only as a `SandboxNotFoundError` does it speak of the sandbox. Otherwise that may be there, and nobody may conclude
    from this that a new one is needed.
    """


class ConflictError(APIError):
    """Raised when the thing is in a state that forbids the call (409)."""


class RateLimitError(APIError):
    """Raised when the server asks to wait (429); `retry_after` says how many seconds, if it does."""

    retryable: bool | None = True


class ServerError(APIError):
    """Raised when the server failed (5xx): the request may have taken effect."""

    retryable: bool | None = None


class CapacityError(ServerError):
    """Raised when the server has no room now (503): nothing was started."""

    retryable: bool | None = True


class SandboxStateError(SandboxError):
    """Raised when the sandbox is not in the state that the call needs."""


class SandboxExpiredError(SandboxStateError):
    """Raised when the sandbox is gone for certain: its timeout, a kill, or the end of its retention.

    Only this class, with its subclass, may lead to a new sandbox in the place of the old.
    """


class SandboxNotFoundError(SandboxExpiredError, NotFoundError):
    """Raised when the control plane knows no such sandbox (404): it is gone, or its id is another key's or wrong."""


class SandboxBusyError(SandboxStateError):
    """Raised when leases are held or a transition is in progress."""

    retryable: bool | None = True


class StateLostError(SandboxStateError):
    """Raised when the sandbox answers, but its memory or files are not what was paused.

    Args:
        lost: What is gone: any of `"memory"` and `"files"`.
    """

    def __init__(
        self, message: str, *, lost: frozenset[str], op: str | None = None, sandbox_id: str | None = None
    ) -> None:
        super().__init__(message, op=op, sandbox_id=sandbox_id)
        self.lost = lost


class OwnershipError(SandboxError):
    """Raised when a handle or thread belongs to another owner; it never names the foreign sandbox."""


class ExecutionTimeoutError(SandboxError, TimeoutError):
    """Raised when code ran longer than its `timeout` seconds; the sandbox and its state live on.

    Args:
        partial: What the code had put out until then.
    """

    def __init__(
        self, message: str, *, partial: Execution | None = None, op: str | None = None, sandbox_id: str | None = None
    ) -> None:
        super().__init__(message, op=op, sandbox_id=sandbox_id)
        self.partial = partial


class CommandError(SandboxError):
    """Raised only by `CommandResult.check()`, for callers who want an exception for a non-zero exit code.

    Args:
        result: The outcome that was checked.
    """

    def __init__(self, message: str, *, result: CommandResult | None = None) -> None:
        super().__init__(message)
        self.result = result


class EngineError(SandboxError):
    """Raised on the server's side when a `runsc` call, or another tool the engine needs, failed.

    Args:
        argv: The command that failed. Empty where no command was involved.
        exit_code: Its exit code. None if it never started or never ended.
        stderr: The end of what it wrote to standard error.
    """

    retryable: bool | None = None

    def __init__(
        self,
        message: str,
        *,
        argv: Sequence[str] = (),
        exit_code: int | None = None,
        stderr: str = "",
        op: str | None = None,
        sandbox_id: str | None = None,
    ) -> None:
        super().__init__(message, op=op, sandbox_id=sandbox_id)
        self.argv = tuple(argv)
        self.exit_code = exit_code
        self.stderr = stderr


STATUS_ERRORS: dict[int, type[APIError]] = {
    401: AuthenticationError,
    403: AccessDeniedError,
    404: NotFoundError,
    409: ConflictError,
    429: RateLimitError,
    500: ServerError,
    503: CapacityError,
}
"""The client reads it status to class, the engine class to status."""


def error_for_status(status_code: int) -> type[APIError]:
    """The class for an HTTP status; an unlisted 5xx is a `ServerError`, anything else unlisted an `APIError`."""
    default = ServerError if status_code >= 500 else APIError
    return STATUS_ERRORS.get(status_code, default)


def status_of(error: type[SandboxError]) -> int:
    """The HTTP status of an error class: its own or its nearest parent's, 400 for bad input, else 500."""
    for parent in error.__mro__:
        for status, cls in STATUS_ERRORS.items():
            if cls is parent:
                return status

    return 400 if issubclass(error, (ConfigError, APIError)) else 500
