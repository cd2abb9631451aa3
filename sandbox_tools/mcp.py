"""`python -m sandbox_tools.mcp`, or `sandbox-tools mcp`: the tools for any MCP client, over stdio or HTTP."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sandbox_tools.errors import ConfigError, SandboxError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

TOKEN = "SANDBOX_TOOLS_MCP_TOKEN"
"""The variable with the bearer token of the only principal, where there is no file of them."""


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m sandbox_tools.mcp") -> int:
    """Serve until stdin ends or the process is told to stop; its exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    add_options(parser)
    try:
        run(parser.parse_args(argv))
    except SandboxError as error:
        print(f"sandbox-tools: {error.message}", file=sys.stderr)
        return 1
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("--http", action="store_true", help="serve streamable HTTP at /mcp (default: stdio)")
    parser.add_argument("--host", default="127.0.0.1", help="where HTTP listens (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8765, help="its port (default: 8765)")
    parser.add_argument(
        "--tokens", type=Path, metavar="FILE", help=f"a JSON object, by principal its bearer token (default: ${TOKEN})"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a host name that clients call it by"
    )
    parser.add_argument("--tools", metavar="NAMES", help="names with commas between, or * (default: four)")
    parser.add_argument("--ask", metavar="NAMES", help="tools before which a person is asked (default: delete, resume)")
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="where files are handed in and out")
    parser.add_argument("--owner", default="default", help="whose the sandboxes are where nobody is authenticated")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="where this machine keeps its sandboxes")
    parser.add_argument("--pause-after", type=float, metavar="SECONDS", help="idle time (default: as it pays)")


def run(options: argparse.Namespace) -> None:
    """Serve as they say.

    Raises:
        ConfigError: They contradict each other, or the extra `mcp` is not installed.
    """
    if options.state_dir is not None:
        os.environ["SANDBOX_TOOLS_STATE_DIR"] = str(options.state_dir.absolute())
    # Standard output is the protocol's.
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        import mcp.server.mcpserver  # noqa: F401
    except ImportError as error:
        msg = "The MCP server needs the extra `mcp`: pip install 'sandbox-tools[mcp]'."
        raise ConfigError(msg) from error
    asyncio.run(_serve(options))


async def _serve(options: argparse.Namespace) -> None:
    from mcp.server.transport_security import TransportSecuritySettings

    from sandbox_tools import Artifacts, Client, PauseAfter, Sessions
    from sandbox_tools.tools.mcp import ASKED, create_server
    from sandbox_tools.tools.principals import Tokens

    tokens = _tokens(options) if options.http else {}
    policy = None if options.pause_after is None else PauseAfter(options.pause_after)
    async with Client() as client, Sessions(client, policy=policy) as sessions:
        server = create_server(
            sessions,
            owner=options.owner,
            tools=options.tools.split(",") if options.tools else None,
            artifacts=Artifacts(options.artifacts) if options.artifacts else None,
            ask=options.ask.split(",") if options.ask else ASKED,
            verifier=Tokens(tokens) if tokens else None,
        )
        if not options.http:
            await server.run_stdio_async()
            return
        names = [*LOOPBACK, *options.allow_host] if options.host in LOOPBACK else [options.host, *options.allow_host]
        names = [f"[{name}]" if ":" in name else name for name in names]
        guard = TransportSecuritySettings(
            allowed_hosts=[each for name in names for each in (name, f"{name}:*")],
            allowed_origins=[
                f"{scheme}://{each}" for name in names for each in (name, f"{name}:*") for scheme in ("http", "https")
            ],
        )
        print(f"Serving MCP at http://{options.host}:{options.port}/mcp", file=sys.stderr, flush=True)
        await server.run_streamable_http_async(host=options.host, port=options.port, transport_security=guard)


def _tokens(options: argparse.Namespace) -> Mapping[str, str]:
    """By principal its token; none where only this machine can call, and nobody has made any."""
    if options.tokens is not None:
        try:
            tokens = json.loads(options.tokens.read_text())
        except (OSError, ValueError) as error:
            msg = f"The tokens in {str(options.tokens)!r} can't be read: {type(error).__name__}."
            raise ConfigError(msg) from error
        if not isinstance(tokens, dict) or not all(isinstance(token, str) for token in tokens.values()) or not tokens:
            msg = f"{str(options.tokens)!r} must hold a JSON object, by principal its token."
            raise ConfigError(msg)
        return tokens
    if token := os.environ.get(TOKEN):
        return {options.owner: token}
    if options.host in LOOPBACK:
        return {}
    if options.host in ("0.0.0.0", "::") and not options.allow_host:
        msg = "At every address, clients call the server by names that only you know: give each with `--allow-host`."
        raise ConfigError(msg)
    token = secrets.token_urlsafe(32)
    print(f"Bearer token: {token}", file=sys.stderr, flush=True)
    return {options.owner: token}


if __name__ == "__main__":
    sys.exit(main())
