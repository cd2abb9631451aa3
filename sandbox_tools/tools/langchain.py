"""The catalogue as LangChain tools, and the callback that notices when a turn has ended."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackHandler, adispatch_custom_event
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, BaseToolkit, StructuredTool, ToolException
from pydantic import ConfigDict, ValidationError

from sandbox_tools.errors import ConfigError
from sandbox_tools.session.session import Session
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.tools import portal
from sandbox_tools.tools.catalog import CATALOG, Tool
from sandbox_tools.tools.render import Rendered, RetryableByModel

Answer = tuple[list[dict[str, Any]], dict[str, Any]]


class SandboxToolkit(BaseToolkit):
    """The four tools over one registry; the conversation is the `thread_id` of the run's config, never a model's word.

    Args:
        sessions: The registry. It is not closed with the toolkit, except by `close`.
        owner: Whose conversations these are; see `Sessions.session`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)

    sessions: Sessions
    owner: str = "default"

    def __init__(self, sessions: Sessions, *, owner: str = "default") -> None:
        super().__init__(sessions=sessions, owner=owner)

    def get_tools(self) -> list[BaseTool]:
        """Tools for `create_agent`, `ToolNode` or any loop that passes its config on; with `invoke` and `ainvoke`."""
        return [self._wrap(tool) for tool in CATALOG]

    def close(self) -> None:
        """Close the registry from synchronous code; asynchronous code has `Sessions.aclose`."""
        portal.run(self.sessions, self.sessions.aclose)

    def _wrap(self, tool: Tool) -> BaseTool:
        async def work(arguments: dict[str, Any], config: RunnableConfig) -> Answer:
            async def emit(piece: dict[str, Any]) -> None:
                await adispatch_custom_event("sandbox.output", piece, config=config)

            try:
                rendered: Rendered = await tool(self._session(config), tool.arguments.model_validate(arguments), emit)
            except RetryableByModel as error:
                raise ToolException(str(error)) from error
            return rendered.blocks, rendered.artifact

        # `config` is the only injected argument: the core overwrites what a model might send under that name.
        def synchronous(*, config: RunnableConfig, **arguments: Any) -> Answer:
            return portal.run(self.sessions, lambda: work(arguments, config))

        async def asynchronous(*, config: RunnableConfig, **arguments: Any) -> Answer:
            return await portal.arun(self.sessions, lambda: work(arguments, config))

        return StructuredTool.from_function(
            func=synchronous,
            coroutine=asynchronous,
            name=tool.name,
            description=tool.description,
            args_schema=tool.arguments,
            response_format="content_and_artifact",
            handle_tool_error=True,
            handle_validation_error=_what_to_change,
        )

    def _session(self, config: RunnableConfig) -> Session:
        thread = _thread(config.get("configurable")) or _thread(config.get("metadata"))
        if thread is None:
            msg = 'The run has no thread id. Pass `config={"configurable": {"thread_id": ...}}` to the agent.'
            raise ConfigError(msg)
        return self.sessions.session(thread, owner=self.owner)


class SandboxCallback(AsyncCallbackHandler):
    """Ends the turn when the outermost run ends: by an answer, an error, a cancel, an interrupt or a broken stream.

    Bake it into the agent, `agent.with_config(callbacks=[SandboxCallback(sessions)])`; runs without a thread id are
    let pass. It only posts: the pause itself happens in the background, on the loop of `sessions`.

    Args:
        sessions: The registry the toolkit has too.
        owner: As the toolkit's.
    """

    def __init__(self, sessions: Sessions, *, owner: str = "default") -> None:
        self._sessions = sessions
        self._owner = owner
        self._inside: set[UUID] = set()
        self._turns: dict[UUID, Session] = {}

    async def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """A run inside one already seen belongs to its turn."""
        outermost = parent_run_id not in self._inside
        self._inside.add(run_id)
        thread = _thread(metadata)
        if outermost and thread is not None:
            session = self._turns[run_id] = self._sessions.session(thread, owner=self._owner)
            # Under `invoke` this runs on a passing loop, which must not become theirs: the first tool call decides.
            session.note_turn(str(run_id))
            portal.post(self._sessions, session.begin_turns)

    async def on_chain_end(self, outputs: Any, *, run_id: UUID, **more: Any) -> None:
        """The turn has ended, if that run was one."""
        self._ended(run_id)

    async def on_chain_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        """So it has by an error, a cancel, or a stream that nobody reads on."""
        self._ended(run_id)

    def _ended(self, run_id: UUID) -> None:
        self._inside.discard(run_id)
        session = self._turns.pop(run_id, None)
        if session is not None and session.drop_turn(str(run_id)):
            portal.post(self._sessions, lambda: session.end_turn(str(run_id)))


def _thread(place: dict[str, Any] | None) -> str | None:
    thread = (place or {}).get("thread_id")
    return None if thread is None or thread == "" else str(thread)


def _what_to_change(error: ValidationError | Any) -> str:
    """What was wrong with the arguments, for the model to correct."""
    if not isinstance(error, ValidationError):
        return f"The arguments are not valid: {error}"
    faults = (f"`{'.'.join(map(str, fault['loc']))}`: {fault['msg']}" for fault in error.errors())
    return f"The arguments are not valid. {'; '.join(faults)}. Correct them and call again."
