"""Code that tries to get out of a sandbox, and what it is told."""

from __future__ import annotations

import json
import shlex
from typing import Any

from tests.engine.test_commands import Commands
from tests.machine import Box
from tests.rpc import basic

_FRAME = """
import ctypes, errno, json, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def libc_call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def told(code):
    try:
        return repr(eval(code))
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)
    except Exception as error:
        return type(error).__name__
print(json.dumps([told(code) for code in json.loads(sys.argv[1])]))
"""


class Attempts:
    """Tries expressions in one sandbox, in a process of their own."""

    def __init__(self, box: Box) -> None:
        self.commands = Commands(box)

    def run(self, script: str, user: str = "user") -> str:
        """What a shell script prints, errors included."""
        done = self.commands.run(f"{{ {script}\n}} 2>&1", headers=basic(user))
        return done.stdout.decode(errors="replace").strip()

    def told(self, *codes: str, user: str = "user") -> dict[str, Any]:
        """For each expression what it evaluates to, or the name of the error that it raises (`EPERM`)."""
        argument = shlex.quote(json.dumps(codes))
        script = f"exec 3<<'PYTHON'\n{_FRAME}\nPYTHON\npython3 -c \"$(cat <&3)\" {argument}"
        answer = self.run(script, user)
        try:
            return dict(zip(codes, json.loads(answer.splitlines()[-1]), strict=True))
        except ValueError:
            raise AssertionError(answer) from None
