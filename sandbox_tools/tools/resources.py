"""A caller's paused sandboxes, and the files of its sandboxes, as MCP resources."""

from __future__ import annotations

import json
import mimetypes
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from mcp.server.lowlevel.helper_types import ReadResourceContents
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from mcp_types import Resource, ResourceTemplate

from sandbox_tools.errors import OwnershipError, SandboxError
from sandbox_tools.session.retention import PausedSandbox
from sandbox_tools.tools.files import READ_LIMIT, about, beginning
from sandbox_tools.tools.principals import Conversations
from sandbox_tools.tools.render import RetryableByModel

JSON = "application/json"

_URI = re.compile(r"sandbox://(?P<handle>sbx-[a-z0-9]{1,32})(?P<path>/.+)?")


class ServerWithSandboxes(MCPServer[Any]):
    """`sandbox://HANDLE` is a paused sandbox, which looking at does not wake; `sandbox://HANDLE/PATH` a file in one.

    Args:
        conversations: Whose sandboxes a caller may see.
    """

    def __init__(self, *arguments: Any, conversations: Conversations, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._conversations = conversations

    async def list_resources(self) -> list[Resource]:
        """The caller's paused sandboxes."""
        return [
            Resource(
                uri=f"sandbox://{row.handle}",
                name=row.handle,
                title=f"Sandbox paused on {row.paused_at:%Y-%m-%d %H:%M} UTC",
                description="`resume_sandbox` takes its handle.",
                mime_type=JSON,
            )
            for row in await self._paused()
        ]

    async def list_resource_templates(self) -> list[ResourceTemplate]:
        """How files are read."""
        return [
            ResourceTemplate(
                uri_template="sandbox://{handle}/{+path}",
                name="file",
                title="File of a sandbox",
                description="A file by its absolute path, in a sandbox of yours by its handle. Reading it wakes it.",
            )
        ]

    async def read_resource(self, uri: Any, context: Context[Any, Any] | None = None) -> Iterable[ReadResourceContents]:
        """One of them.

        Raises:
            ResourceNotFoundError: The caller has no such sandbox, or there is no such file in it.
            ResourceError: The file is too long, or the sandbox can't be reached.
        """
        named = _URI.fullmatch(str(uri))
        if named is None:
            msg = "There is no such resource. They are `sandbox://HANDLE` and `sandbox://HANDLE/PATH`."
            raise ResourceNotFoundError(msg)
        try:
            if named["path"] is None:
                row = next((row for row in await self._paused() if row.handle == named["handle"]), None)
                if row is None:
                    msg = "You have no paused sandbox of that handle."
                    raise ResourceNotFoundError(msg)
                return [ReadResourceContents(content=json.dumps(_facts(row)), mime_type=JSON)]
            headers = context.headers if context is not None else None
            return [await self._file(headers, named["handle"], urllib.parse.unquote(named["path"]))]
        except OwnershipError as error:
            msg = "There is no such sandbox for you."
            raise ResourceNotFoundError(msg) from error
        except RetryableByModel as error:
            raise ResourceNotFoundError(str(error)) from error
        except SandboxError as error:
            msg = "The sandbox can't be used now, and only whoever runs this server can help."
            raise ResourceError(msg) from error

    async def _paused(self) -> list[PausedSandbox]:
        return await (await self._conversations.session(None)).list_paused()

    async def _file(self, headers: Mapping[str, str] | None, handle: str, path: str) -> ReadResourceContents:
        session = await self._conversations.session(headers, sandbox=handle)
        async with session.lease() as sandbox:
            with about(path):
                data, whole = await beginning(sandbox, path, READ_LIMIT)
        if not whole:
            msg = f"The file has more than {READ_LIMIT} bytes. Read parts of it with a tool."
            raise ResourceError(msg)
        kind = mimetypes.guess_type(path)[0]
        try:
            return ReadResourceContents(content=data.decode(), mime_type=kind or "text/plain")
        except UnicodeDecodeError:
            return ReadResourceContents(content=data, mime_type=kind or "application/octet-stream")


def _facts(row: PausedSandbox) -> dict[str, Any]:
    return {
        "handle": row.handle,
        "paused_at": row.paused_at.isoformat(),
        "snapshot_bytes": row.snapshot_bytes,
        "expires_at": row.expires_at.isoformat() if row.expires_at else None,
    }
