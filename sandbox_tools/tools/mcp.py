"""The catalogue as an MCP server."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Annotated, Any

from mcp.server.auth.provider import TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context, Elicit, ElicitationResult, MCPServer, Resolve
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool as ServedTool
from mcp_types import CallToolResult, ImageContent, TextContent, ToolAnnotations
from pydantic import BaseModel, Field, create_model

from sandbox_tools.errors import OwnershipError, SandboxError
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.tools.artifacts import Artifacts
from sandbox_tools.tools.principals import Conversations
from sandbox_tools.tools.registry import Registry
from sandbox_tools.tools.render import Rendered, RetryableByModel
from sandbox_tools.tools.resources import ServerWithSandboxes
from sandbox_tools.tools.tool import Tool, question

log = logging.getLogger("sandbox_tools.tools")

ASKED = ("delete_sandbox", "resume_sandbox")
"""What a person is asked about where the client can ask one: most hosts ask by themselves before code runs."""

INSTRUCTIONS = (
    "A Linux sandbox of your own for code, commands and files. It is made at its first use, sleeps between uses with "
    "memory, processes and files kept, and wakes by itself. Each result names it in `sandbox`. Pass the same "
    "`conversation` with every call if you serve several conversations, so that each has its own sandbox."
)


class Output(BaseModel):
    """What a program reads of a call."""

    text: str = Field(description="What the tool says.")
    sandbox: str | None = Field(description="The handle of the conversation's sandbox. None: it has none.")
    facts: dict[str, Any] = Field(description="Plain data, such as exit codes, paths and sizes.")


class Approval(BaseModel):
    """What a person answers."""

    approved: bool = Field(default=True, description="Whether it may be done.")


class Where(BaseModel):
    """What each tool takes besides its own arguments."""

    conversation: str | None = Field(
        default=None, min_length=1, max_length=200, description="Names the conversation, if you serve several."
    )
    sandbox: str | None = Field(
        default=None, description="The handle of another sandbox of yours to use. Leave it out for the usual one."
    )


def create_server(
    sessions: Sessions,
    *,
    owner: str = "default",
    tools: Iterable[str] | None = None,
    artifacts: Artifacts | None = None,
    renamed: Mapping[str, str] | None = None,
    described: Mapping[str, str] | None = None,
    ask: Iterable[str] = ASKED,
    verifier: TokenVerifier | None = None,
    auth: AuthSettings | None = None,
) -> MCPServer[Any]:
    """An MCP server over a registry, to be run on any of its transports; closing the registry stays the caller's.

    No protocol says when a conversation ends: each call's end begins an idle period, after which the policy pauses.

    Args:
        owner: Whose the sandboxes are where nobody is authenticated. Authenticated principals own their own.
        tools, artifacts, renamed, described: As for `SandboxToolkit`.
        ask: Tools before which a person is asked, where the client can ask one.
        verifier: Tells principals by their bearer tokens, as `Tokens` does; for HTTP only.
        auth: What OAuth clients are told with it. None: nothing, the tokens are handed out by hand.

    Raises:
        ConfigError: There is no tool of such a name, or two would have the same.
    """
    registry = Registry(sessions, tools=tools, artifacts=artifacts, renamed=renamed, described=described)
    conversations = Conversations(sessions, owner)
    asked = {(renamed or {}).get(name, name) for name in ask}
    if verifier is not None and auth is None:
        auth = AuthSettings(issuer_url="http://localhost", resource_server_url=None)
    return ServerWithSandboxes(
        "sandbox-tools",
        conversations=conversations,
        title="Sandbox",
        version=version("sandbox-tools"),
        instructions=INSTRUCTIONS,
        tools=[_served(tool, registry, conversations, asks=tool.name in asked) for tool in registry.tools.values()],
        token_verifier=verifier,
        auth=auth,
        log_level="WARNING",
    )


def _served(tool: Tool, registry: Registry, conversations: Conversations, *, asks: bool) -> ServedTool:
    async def call(ctx: Context, approval: Any = None, **arguments: Any) -> CallToolResult:
        if asks and not getattr(getattr(approval, "data", None), "approved", False):
            msg = "The user did not allow this, and nothing was done."
            raise ToolError(msg)
        where = {name: arguments.pop(name) for name in Where.model_fields if name in arguments}
        pieces = 0

        async def emit(piece: dict[str, Any]) -> None:
            nonlocal pieces
            pieces += 1
            await ctx.report_progress(pieces, None, piece["text"])

        try:
            session = await conversations.session(ctx.headers, **where)
            rendered = await registry.call(session, tool.name, arguments, emit)
            bound = await registry.sessions.bindings.find(session.owner, session.thread)
        except RetryableByModel as error:
            raise ToolError(str(error)) from error
        except OwnershipError as error:
            msg = "There is no such sandbox for you. Take a handle from `list_paused_sandboxes`."
            raise ToolError(msg) from error
        except SandboxError as error:
            log.exception("the tool %s failed, and the model can't help it", tool.name)
            msg = "The sandbox can't be used now, and only whoever runs this server can help: its log says why."
            raise ToolError(msg) from error
        return _result(rendered, bound.handle if bound else None)

    fields = {**tool.arguments.model_fields, **Where.model_fields}
    if "handle" in fields:  # It says itself which sandbox it is about.
        del fields["sandbox"]
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if info.is_required() else info.default,
            annotation=Annotated[info.annotation, info],
        )
        for name, info in fields.items()
    ]
    wanted: dict[str, Any] = {"ctx": Context, "return": Annotated[CallToolResult, Output]}
    if asks:
        wanted["approval"] = Annotated[ElicitationResult[Approval], Resolve(_asking(tool, parameters))]
    _sign(call, parameters, wanted)
    served = ServedTool.from_function(
        call,
        name=tool.name,
        title=tool.title,
        description=tool.description,
        annotations=ToolAnnotations(
            title=tool.title,
            read_only_hint=tool.hints.read_only,
            destructive_hint=tool.hints.destructive,
            idempotent_hint=tool.hints.idempotent,
            open_world_hint=False,
        ),
    )
    # A name that the model made up is an error it reads, here as everywhere.
    strict = create_model(tool.name, __base__=served.fn_metadata.arg_model, __cls_kwargs__={"extra": "forbid"})
    metadata = served.fn_metadata.model_copy(update={"arg_model": strict})
    return served.model_copy(update={"fn_metadata": metadata, "parameters": strict.model_json_schema()})


def _asking(tool: Tool, parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    """What asks a person before the tool does anything, if the client can ask one."""

    async def ask(ctx: Context, **arguments: Any) -> Any:
        capable = ctx.client_capabilities
        own_only = "handle" in arguments and arguments["handle"] is None
        if capable is None or capable.elicitation is None or own_only:
            return Approval()
        return Elicit(question(tool.name, arguments), Approval)

    own = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    _sign(ask, own, {"ctx": Context, "return": Elicit[Approval] | Approval})
    return ask


def _sign(function: Any, parameters: list[inspect.Parameter], wanted: dict[str, Any]) -> None:
    """Give a function the signature that the server's framework reads."""
    injected = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
        for name, annotation in wanted.items()
        if name != "return"
    ]
    function.__signature__ = inspect.Signature([*injected, *parameters], return_annotation=wanted["return"])
    function.__annotations__ = wanted


def _result(rendered: Rendered, sandbox: str | None) -> CallToolResult:
    content: list[TextContent | ImageContent] = []
    for block in rendered.blocks:
        if block["type"] == "text":
            content.append(TextContent(type="text", text=block["text"]))
        else:
            content.append(ImageContent(type="image", data=block["base64"], mime_type=block["mime_type"]))
    text = "\n".join(block.text for block in content if isinstance(block, TextContent))
    output = Output(text=text, sandbox=sandbox, facts=rendered.artifact)
    return CallToolResult(content=list(content), structured_content=output.model_dump(mode="json"))
