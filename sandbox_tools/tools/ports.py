"""Opening a port of the sandbox to the people around it."""

from __future__ import annotations

from pydantic import Field

from sandbox_tools.errors import ConfigError
from sandbox_tools.session.session import Session
from sandbox_tools.tools.render import Rendered, RetryableByModel
from sandbox_tools.tools.tool import Arguments, Emit, Hints, Tool


class ExposePort(Arguments):
    """Arguments of `expose_port`."""

    port: int = Field(ge=1, le=65535, description="The port that your server listens on.")
    minutes: float = Field(default=60, gt=0, le=720, description="For how long the sandbox stays awake for it.")


async def _expose(session: Session, arguments: ExposePort, emit: Emit) -> Rendered:
    async with session.lease() as sandbox:
        found = await sandbox.commands.run(f"exec 3<>/dev/tcp/127.0.0.1/{arguments.port}", timeout=10)
        if found.exit_code:
            msg = f"Nothing listens on port {arguments.port}. Start a server there with `start_job` first."
            raise RetryableByModel(msg)
        try:
            # It names the sandbox, so it is for the application and the user, not for the model.
            url = sandbox.url(arguments.port)
        except ConfigError:
            url = None
        await session.expose(arguments.port, 60 * arguments.minutes)
    text = f"Port {arguments.port} is open to the user for {arguments.minutes:g} minutes, who is shown its address."
    return Rendered.of(text, port=arguments.port, url=url, seconds=60 * arguments.minutes)


EXPOSE_PORT = Tool(
    name="expose_port",
    title="Expose port",
    description=(
        "Show the user a server that runs in your sandbox: a web page, an API, a notebook. Start it with `start_job` "
        "first. The sandbox stays awake, and costs, for as long as you say."
    ),
    arguments=ExposePort,
    call=_expose,
    hints=Hints(idempotent=True),
)
