"""All tools, each once, and which of them a model gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from sandbox_tools.errors import ConfigError
from sandbox_tools.tools.artifacts import Artifacts
from sandbox_tools.tools.code import RUN_CODE
from sandbox_tools.tools.commands import READ_JOB, RUN_COMMAND, START_JOB, STOP_JOB
from sandbox_tools.tools.files import LIST_FILES, READ_FILE, WRITE_FILE
from sandbox_tools.tools.lifecycle import DELETE, LIST_PAUSED, PAUSE, RESUME
from sandbox_tools.tools.ports import EXPOSE_PORT
from sandbox_tools.tools.tool import Tool

DEFAULT: tuple[Tool, ...] = (RUN_CODE, PAUSE, RESUME, LIST_PAUSED)
"""What a model gets where nobody says otherwise."""

CATALOG: tuple[Tool, ...] = (
    *DEFAULT,
    RUN_COMMAND,
    START_JOB,
    READ_JOB,
    STOP_JOB,
    READ_FILE,
    WRITE_FILE,
    LIST_FILES,
    EXPOSE_PORT,
    DELETE,
)
"""All that need nothing but a session."""


def choose(
    names: Iterable[str] | None = None,
    *,
    artifacts: Artifacts | None = None,
    renamed: Mapping[str, str] | None = None,
    described: Mapping[str, str] | None = None,
) -> list[Tool]:
    """The tools of those names, in that order.

    Args:
        names: None: the default four, and those of `artifacts`. `["*"]`: all.
        artifacts: Where files are handed in and out; `upload_file` and `download_file` need it.
        renamed: By a tool's name the one that the model sees.
        described: By a tool's name what the model is told of it in place of our text.

    Raises:
        ConfigError: There is no tool of such a name, or two would have the same.
    """
    more = artifacts.tools() if artifacts else ()
    known = {tool.name: tool for tool in (*CATALOG, *more)}
    if names is None:
        chosen = [tool.name for tool in (*DEFAULT, *more)]
    else:
        chosen = list(names)
        chosen = list(known) if chosen == ["*"] else chosen
    renamed, described = renamed or {}, described or {}
    for name in (*chosen, *renamed, *described):
        if name not in known:
            needs = " It needs `artifacts`." if name in ("upload_file", "download_file") else ""
            msg = f"There is no tool {name!r}.{needs} There are: {', '.join(known)}."
            raise ConfigError(msg)

    tools = [
        replace(tool, name=renamed.get(tool.name, tool.name), description=described.get(tool.name, tool.description))
        for tool in (known[name] for name in chosen)
    ]
    if len({tool.name for tool in tools}) < len(tools):
        msg = f"Two tools would have the same name: {', '.join(tool.name for tool in tools)}."
        raise ConfigError(msg)
    return tools
