"""The catalogue as LangChain tools."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from langchain_core.callbacks import adispatch_custom_event
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, BaseToolkit, StructuredTool, ToolException
from pydantic import ConfigDict, ValidationError

from sandbox_tools import telemetry
from sandbox_tools.session.session import Session
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.tools import portal
from sandbox_tools.tools.artifacts import Artifacts
from sandbox_tools.tools.callback import join
from sandbox_tools.tools.catalog import choose
from sandbox_tools.tools.owners import Owner, owner_of, thread_of
from sandbox_tools.tools.render import Rendered, RetryableByModel
from sandbox_tools.tools.tool import Tool, what_to_change

Answer = tuple[list[dict[str, Any]], dict[str, Any]]

OUTPUT = "sandbox.output"
"""The name of the custom event that carries live output."""


class SandboxToolkit(BaseToolkit):
    """The tools over one registry; the conversation is the `thread_id` of the run's config, never a model's word.

    Args:
        sessions: The registry. It is not closed with the toolkit, except by `close`.
        owner: Whose conversations these are; see `Sessions.session`. A callable finds it in each run's config.
        tools: Names of the tools that the model gets. None: `run_code`, `pause_sandbox`, `resume_sandbox` and
            `list_paused_sandboxes`. `["*"]`: all there are.
        artifacts: A directory of the host through which files are handed in and out; adds `upload_file` and
            `download_file`. None: there are no such tools.
        renamed: By a tool's name the one that the model sees.
        described: By a tool's name what the model is told of it in place of our text.

    Raises:
        ConfigError: There is no tool of such a name, or two would have the same.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)

    sessions: Sessions
    owner: Owner = "default"
    chosen: tuple[Tool, ...] = ()

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
        chosen = choose(tools, artifacts=artifacts, renamed=renamed, described=described)
        super().__init__(sessions=sessions, owner=owner, chosen=tuple(chosen))

    def get_tools(self) -> list[BaseTool]:
        """Tools for `create_agent`, `ToolNode` or any loop that passes its config on; with `invoke` and `ainvoke`."""
        return [self._wrap(tool) for tool in self.chosen]

    def session(self, config: RunnableConfig) -> Session:
        """The conversation that a run belongs to.

        Raises:
            ConfigError: The run has no thread id, or no owner.
        """
        return self.sessions.session(thread_of(config), owner=owner_of(self.owner, config))

    def close(self) -> None:
        """Close the registry from synchronous code; asynchronous code has `Sessions.aclose`."""
        portal.run(self.sessions, self.sessions.aclose)

    def wrap_tool_call(self, request: Any, execute: Callable[[Any], Any]) -> Any:
        """For `ToolNode(..., wrap_tool_call=...)`: as `awrap_tool_call`, for `invoke`."""
        session, run = self.session(request.runtime.config), f"call/{request.tool_call['id']}"
        portal.run(self.sessions, lambda: session.turn_started(run))
        try:
            return execute(request)
        finally:
            portal.run(self.sessions, lambda: session.turn_ended(run))

    async def awrap_tool_call(self, request: Any, execute: Callable[[Any], Awaitable[Any]]) -> Any:
        """For `ToolNode(..., awrap_tool_call=...)` in a graph of your own: while any of its tools works, no policy
        pauses the sandbox, and it wakes while the first one starts. Between them the policy's idle time counts."""
        session, run = self.session(request.runtime.config), f"call/{request.tool_call['id']}"
        await portal.arun(self.sessions, lambda: session.turn_started(run))
        try:
            return await execute(request)
        finally:
            await portal.arun(self.sessions, lambda: session.turn_ended(run))

    def _wrap(self, tool: Tool) -> BaseTool:
        async def work(arguments: dict[str, Any], config: RunnableConfig, write: Callable[[Any], None]) -> Answer:
            session = self.session(config)
            join(config, self.sessions, session)

            async def emit(piece: dict[str, Any]) -> None:
                write({OUTPUT: {"tool": tool.name, **piece}})
                await adispatch_custom_event(OUTPUT, piece, config=config)

            try:
                with telemetry.span("gen_ai.execute_tool", {"thread_id": session.thread}, tool=tool.name):
                    rendered: Rendered = await tool(session, tool.arguments.model_validate(arguments), emit)
            except RetryableByModel as error:
                raise ToolException(str(error)) from error
            return rendered.blocks, rendered.artifact

        # `config` is the only injected argument: the core overwrites what a model might send under that name.
        def synchronous(*, config: RunnableConfig, **arguments: Any) -> Answer:
            write = _writer()
            return portal.run(self.sessions, lambda: work(arguments, config, write))

        async def asynchronous(*, config: RunnableConfig, **arguments: Any) -> Answer:
            write = _writer()
            return await portal.arun(self.sessions, lambda: work(arguments, config, write))

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


def _writer() -> Callable[[Any], None]:
    """What writes into LangGraph's `stream_mode="custom"`, and tells its runtime that the node lives."""
    try:
        from langgraph.config import get_stream_writer
        from langgraph.runtime import get_runtime

        write, runtime = get_stream_writer(), get_runtime()
    except (ImportError, RuntimeError, KeyError):  # There is no graph around this call.
        return lambda piece: None

    def written(piece: Any) -> None:
        write(piece)
        runtime.heartbeat()

    return written


def _what_to_change(error: ValidationError | Any) -> str:
    """What was wrong with the arguments, for the model to correct; LangChain may have an older Pydantic's error."""
    return what_to_change(error) if isinstance(error, ValidationError) else f"The arguments are not valid: {error}"
