"""Whose conversation a run is: from what the application or the server says of it, never from the model's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from langchain_core.runnables import RunnableConfig

from sandbox_tools.errors import ConfigError

Owner = str | Callable[[RunnableConfig], str]
"""One name for all runs, or what finds it in a run's config: `server_user`, `configured(...)`, or your own."""


def server_user(config: RunnableConfig) -> str:
    """The user that LangGraph Server has authenticated.

    Only the server can put an object there: what a client sends as JSON under the same name is no user.

    Raises:
        ConfigError: The server authenticates nobody, or this is no server.
    """
    user = (config.get("configurable") or {}).get("langgraph_auth_user")
    identity = getattr(user, "identity", None)
    if not isinstance(identity, str) or not identity:
        msg = "The run has no authenticated user. Configure authentication on the server, or pass another `owner`."
        raise ConfigError(msg)
    return identity


def configured(key: str) -> Callable[[RunnableConfig], str]:
    """An owner that your application puts into each run's config, as `configurable[key]` or `metadata[key]`.

    Only for where your own code makes the config: who lets clients send it lets them choose who they are.
    """

    def owner(config: RunnableConfig) -> str:
        named = (config.get("configurable") or {}).get(key) or (config.get("metadata") or {}).get(key)
        if not isinstance(named, str):
            msg = f"The run does not say whose it is. Put the user's id into its config as `configurable[{key!r}]`."
            raise ConfigError(msg)
        return named

    return owner


def owner_of(owner: Owner, config: RunnableConfig) -> str:
    """The owner of a run.

    Raises:
        ConfigError: It has none.
    """
    found = owner if isinstance(owner, str) else owner(config)
    if not isinstance(found, str) or not found:
        msg = f"`owner` gave {found!r} for this run. It must be a name that is not empty."
        raise ConfigError(msg)
    return found


def thread_in(place: Mapping[str, Any] | None) -> str | None:
    """The thread id in a run's `configurable` or `metadata`. None: there is none."""
    thread = (place or {}).get("thread_id")
    return None if thread is None or thread == "" else str(thread)


def thread_of(config: RunnableConfig) -> str:
    """The conversation that a run belongs to.

    Raises:
        ConfigError: The run has no thread id.
    """
    thread = thread_in(config.get("configurable")) or thread_in(config.get("metadata"))
    if thread is None:
        msg = 'The run has no thread id. Pass `config={"configurable": {"thread_id": ...}}` to the agent.'
        raise ConfigError(msg)
    return thread
