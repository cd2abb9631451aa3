"""Who calls an MCP server, and in which conversation: from what was authenticated, not from what the call says."""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Mapping

from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import AccessToken, principal_components

from sandbox_tools.errors import ConfigError
from sandbox_tools.session.session import Session
from sandbox_tools.session.sessions import Sessions

SESSION_HEADER = "mcp-session-id"
"""Of clients that speak a protocol older than 2026-07-28; newer ones have no sessions."""


class Tokens:
    """Bearer tokens that an operator has handed out; an `mcp` `TokenVerifier`.

    Args:
        tokens: By principal the token, of 16 characters or more.

    Raises:
        ConfigError: A token is too short, or two principals have the same.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        if any(not name or len(token) < 16 for name, token in tokens.items()):
            msg = "A bearer token is shorter than 16 characters, or its principal has no name. Generate longer ones."
            raise ConfigError(msg)
        if len(set(tokens.values())) < len(tokens):
            msg = "Two principals have the same bearer token. Give each its own."
            raise ConfigError(msg)
        self._tokens = dict(tokens)

    async def verify_token(self, token: str) -> AccessToken | None:
        """Whose token it is, in a time that tells nothing of the others. None: nobody's."""
        found = None
        for name, known in self._tokens.items():
            if hmac.compare_digest(known.encode(), token.encode()):
                found = AccessToken(token=token, client_id=name, scopes=[])
        return found


def principal() -> str | None:
    """The authenticated caller. None: the transport authenticates nobody."""
    token = get_access_token()
    if token is None:
        return None
    client, issuer, subject = principal_components(token)
    return client if issuer is None and subject is None else json.dumps([client, issuer, subject])


class Conversations:
    """Finds the session of a call.

    Args:
        owner: Whose the sandboxes are where nobody is authenticated.
    """

    def __init__(self, sessions: Sessions, owner: str) -> None:
        self._sessions = sessions
        self._owner = owner
        self._process = f"mcp process {secrets.token_hex(8)}"

    @property
    def owner(self) -> str:
        """Of what the present call may see."""
        return principal() or self._owner

    async def session(
        self, headers: Mapping[str, str] | None, conversation: str | None = None, sandbox: str | None = None
    ) -> Session:
        """The session: of that sandbox, else that conversation, else of who calls, by whatever tells callers apart.

        Args:
            headers: Of the request. None: the transport has none.
            conversation: A name that the client gives its conversation; nobody else's of the same name is meant.
            sandbox: A handle.

        Raises:
            OwnershipError: The caller has no such sandbox; none was woken.
        """
        if sandbox is not None:
            await self._sessions.transitions.owned(self.owner, sandbox)
            thread = f"mcp sandbox {sandbox}"
            await self._sessions.bindings.point(self.owner, thread, sandbox)
        elif conversation is not None:
            thread = f"mcp conversation {conversation}"
        elif principal() is not None:
            thread = "mcp"
        elif session_id := (headers or {}).get(SESSION_HEADER):
            thread = f"mcp session {session_id}"
        else:
            thread = self._process
        return self._sessions.session(thread, owner=self.owner)
