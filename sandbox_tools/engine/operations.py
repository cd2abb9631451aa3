"""What an operation of the control plane is: the one description that routes, validation and OpenAPI are made from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from starlette.datastructures import Headers

from sandbox_tools.engine.figures import Figures
from sandbox_tools.engine.supervisor import Supervisor
from sandbox_tools.errors import APIError, CapacityError, SandboxError, status_of
from sandbox_tools.models import ErrorBody

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]

SANDBOX_ID = r"[a-z0-9]+(-[a-z0-9]+)?"
"""An id in a path; some SDKs append the client's id after a dash."""

IDEMPOTENCY_KEY = r"[a-z0-9-]{1,255}"


class Engine:
    """What the operations work on; until it is prepared, they say what is being prepared.

    Attributes:
        preparing: What it is doing until then.
        figures: What Prometheus scrapes.
        domain: Where the sandboxes' own addresses live, as create and connect answer it. None: nowhere.
    """

    def __init__(self) -> None:
        self.preparing = "starting"
        self.domain: str | None = None
        self.figures = Figures(lambda: self._supervisor)
        self._supervisor: Supervisor | None = None

    @property
    def supervisor(self) -> Supervisor:
        """The sandboxes.

        Raises:
            CapacityError: The engine isn't ready yet; the message says what it is doing.
        """
        if self._supervisor is None:
            msg = f"The engine is not ready yet: {self.preparing}. Try again in a moment."
            raise CapacityError(msg)
        return self._supervisor

    @supervisor.setter
    def supervisor(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request, parsed as its operation says.

    Attributes:
        path: The parameters in the path.
        body: Of the operation's own type. None: the operation takes none.
        query: Of the operation's own type. None: the operation takes none.
    """

    engine: Engine
    path: Mapping[str, str]
    headers: Headers
    body: Any = None
    query: Any = None

    @property
    def supervisor(self) -> Supervisor:
        """The sandboxes. Raises as `Engine.supervisor` does."""
        return self.engine.supervisor

    @property
    def sandbox_id(self) -> str:
        """The sandbox in the path."""
        return self.path["sandboxID"].partition("-")[0]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is sent back: plain data, text, or nothing."""

    status: int = 200
    content: BaseModel | list[Any] | dict[str, Any] | str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path.

    Attributes:
        name: Its id in the OpenAPI document.
        path: With its parameters in braces.
        answers: The type of each success's content; None where there is none.
        errors: The statuses with an error body that it may have besides those that every operation has.
        body: What the body is parsed as; an absent one as `{}`, unless `body_required`.
        query: What the query is parsed as.
        headers: Of its answers.
        yields: What other operations take as a parameter: the status, the parameter, and a JSON pointer to it.
        keyed: Whether it takes an `Idempotency-Key`.
        open: Whether it needs no API key.
        extension: Whether the services whose protocol this is don't have it.
    """

    name: str
    method: Method
    path: str
    summary: str
    handler: Callable[[Call], Awaitable[Answer]]
    answers: Mapping[int, Any]
    errors: tuple[int, ...] = ()
    body: type[BaseModel] | None = None
    body_required: bool = False
    query: type[BaseModel] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    yields: tuple[tuple[int, str, str], ...] = ()
    keyed: bool = False
    open: bool = False
    extension: bool = False


def error_body(error: SandboxError) -> ErrorBody:
    """An error as the wire shows it."""
    status, slug = status_of(type(error)), None
    if isinstance(error, APIError):
        status, slug = error.status_code, error.error_code
    if isinstance(error, CapacityError):
        # Clients repeat a create only where this slug says that nothing was started.
        slug = "sandbox_capacity_unavailable"
    return ErrorBody(code=status, message=error.message, error_code=slug)
