"""The sandbox as one middleware of `create_agent`: its tools, the turn, and what to ask a human about."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware import AgentMiddleware, AgentState, InterruptOnConfig
from langchain.agents.middleware.human_in_the_loop import DecisionType
from langchain.agents.middleware.types import PrivateStateAttr
from langchain_core.runnables import Runnable
from langgraph.channels.untracked_value import UntrackedValue
from langgraph.config import get_config

from sandbox_tools.session.session import Session
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.tools import portal
from sandbox_tools.tools.artifacts import Artifacts
from sandbox_tools.tools.callback import SandboxCallback, join
from sandbox_tools.tools.langchain import SandboxToolkit
from sandbox_tools.tools.owners import Owner
from sandbox_tools.tools.tool import question

ASKED: tuple[str, ...] = ("run_code", "run_command", "start_job", "delete_sandbox", "resume_sandbox")
"""What `approvals` asks about."""


class SandboxState(AgentState[Any]):
    """What the middleware keeps for the length of one run; never in a checkpoint."""

    sandbox_turn: Annotated[NotRequired[str | None], UntrackedValue, PrivateStateAttr]


class SandboxMiddleware(AgentMiddleware[Any, Any, Any]):
    """Gives an agent the tools, wakes its sandbox while the model thinks, and ends the turn where a hook sees the end.

    No hook sees a recursion limit, a stream that nobody reads on, or an interrupt of another middleware: then the
    sandbox stays awake until the turn's own limit. `watch` makes it right in every case.

    Args:
        sessions: The registry.
        owner, tools, artifacts, renamed, described: As `SandboxToolkit`'s.
    """

    state_schema = SandboxState

    def __init__(
        self,
        sessions: Sessions,
        *,
        owner: Owner = "default",
        tools: Iterable[str] | None = None,
        artifacts: Artifacts | None = None,
        renamed: Mapping[str, str] | None = None,
        described: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.toolkit = SandboxToolkit(
            sessions, owner=owner, tools=tools, artifacts=artifacts, renamed=renamed, described=described
        )
        self.tools = self.toolkit.get_tools()
        self.callback = SandboxCallback(sessions, owner=owner)

    def watch(self, agent: Runnable[Any, Any]) -> Any:
        """The agent with the callback that ends its turns however they end."""
        return agent.with_config(callbacks=[self.callback])

    def before_agent(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """The turn begins, and a paused sandbox wakes."""
        config = get_config()
        session = self.toolkit.session(config)
        if join(config, self.toolkit.sessions, session):
            return None
        turn = f"agent/{secrets.token_hex(8)}"
        session.note_turn(turn)
        portal.post(self.toolkit.sessions, session.begin_turns)
        return {"sandbox_turn": turn}

    async def abefore_agent(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """As `before_agent`."""
        return self.before_agent(state, runtime)

    def after_agent(self, state: Any, runtime: Any) -> None:
        """The turn has ended."""
        self._end(state)

    async def aafter_agent(self, state: Any, runtime: Any) -> None:
        """As `after_agent`."""
        self._end(state)

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        """A model that fails ends the run, and no other hook hears of it."""
        try:
            return handler(request)
        except BaseException:
            self._end(request.state)
            raise

    async def awrap_model_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        """As `wrap_model_call`."""
        try:
            return await handler(request)
        except BaseException:
            self._end(request.state)
            raise

    def wrap_tool_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        """So does a tool that fails, is cancelled or asks a human."""
        try:
            return handler(request)
        except BaseException:
            self._end(request.state)
            raise

    async def awrap_tool_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        """As `wrap_tool_call`."""
        try:
            return await handler(request)
        except BaseException:
            self._end(request.state)
            raise

    def _end(self, state: Mapping[str, Any]) -> None:
        turn = state.get("sandbox_turn")
        if turn is None:
            return
        session: Session = self.toolkit.session(get_config())
        if session.drop_turn(turn):
            portal.post(self.toolkit.sessions, lambda: session.end_turn(turn))


def approvals(
    *names: str,
    renamed: Mapping[str, str] | None = None,
    allowed: Iterable[DecisionType] = ("approve", "edit", "reject"),
) -> dict[str, bool | InterruptOnConfig]:
    """For `HumanInTheLoopMiddleware(interrupt_on=approvals())`: which tools ask a human before they do anything.

    While the human thinks, the sandbox sleeps; the tool's code runs once, after the answer.

    Args:
        names: Of tools. None given: those that run code, delete a sandbox, or wake one.
        renamed: As `SandboxToolkit`'s.
        allowed: What the human may decide.
    """
    asks: InterruptOnConfig = {"allowed_decisions": list(allowed), "description": _question}
    return {(renamed or {}).get(name, name): asks for name in names or ASKED}


def _question(tool_call: Any, state: Any, runtime: Any) -> str:
    return question(tool_call["name"], tool_call["args"])
