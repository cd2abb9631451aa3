"""The command line: parses, calls, shows; what it does lives in the client, the engine and the sessions.

Exit codes: 0 done, 1 failed as said on standard error, 2 a wrong command line, 3 another engine has the state
directory, 4 the code that was to be run failed, 130 interrupted; `shell` ends with its shell's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sandbox_tools.errors import SandboxError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code.

    Args:
        argv: Words after the program's name. None: those of this process.
    """
    try:
        import click

        from sandbox_tools.cli.app import app
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print(
            "sandbox-tools: The command line needs the extra `cli`: pip install 'sandbox-tools[cli]'", file=sys.stderr
        )
        return 1

    try:
        code = app.main(args=None if argv is None else list(argv), prog_name="sandbox-tools", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except SandboxError as error:
        print(f"sandbox-tools: {error.message}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0
