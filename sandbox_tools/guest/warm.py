"""What an engine asks of a guest that it keeps ready: to touch what the first code needs, before anybody waits for it.

Memory that was restored is brought in page by page as it is touched, which makes the first execution three times as
long as the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

    from sandbox_tools.guest.contexts import Contexts


def routes(contexts: Contexts) -> list[Route]:
    """The engine's own route; nobody else is let through to it."""

    async def warm(_: Request) -> Response:
        await (await contexts.default()).touch()
        return Response(status_code=204)

    return [Route("/warm", warm, methods=["POST"])]
