"""Running code."""

from __future__ import annotations

from pydantic import Field

from sandbox_tools.errors import ExecutionTimeoutError
from sandbox_tools.models import ExecutionEvent, Stderr, Stdout
from sandbox_tools.session.session import Session
from sandbox_tools.tools.live import live
from sandbox_tools.tools.render import Rendered, render, render_timeout
from sandbox_tools.tools.tool import Arguments, Emit, Hints, Tool


class RunCode(Arguments):
    """Arguments of `run_code`."""

    code: str = Field(description="Python code. The value of its last expression is shown, and so are plots.")
    timeout: float = Field(default=120, gt=0, le=3600, description="Seconds after which the code is interrupted.")


async def _run_code(session: Session, arguments: RunCode, emit: Emit) -> Rendered:
    async with session.lease() as sandbox, live(emit) as say:

        def on_event(event: ExecutionEvent) -> None:
            if isinstance(event, (Stdout, Stderr)):
                say(event.type, event.text)

        try:
            execution = await sandbox.run_code(arguments.code, timeout=arguments.timeout, on_event=on_event)
        except ExecutionTimeoutError as error:
            return render_timeout(error, arguments.timeout)
    return render(execution)


RUN_CODE = Tool(
    name="run_code",
    title="Run code",
    description=(
        "Run Python code in your own sandbox, a Linux machine that lasts as long as the conversation. Variables, "
        "imports, files and background processes are kept from call to call, also while the sandbox is paused "
        "between turns. Returns what the code prints, the value of its last expression, plots as images, or the "
        "traceback. pandas, numpy and matplotlib are there."
    ),
    arguments=RunCode,
    call=_run_code,
    hints=Hints(destructive=True),
)
