"""Commands that speak to a sandbox and end; they start in half the time.

A `runsc` registers for membarrier(2) as it starts, and as it has threads by then, it waits until every CPU has done
something else once: 13 ms of the 21 that a `runsc pause` takes. Only what runs in a sandbox can ever call it. So these
commands are started by threads to whose children the kernel says that it has no such call (seccomp(2)).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial

# What the kernel calls each architecture (audit.h), and the number that membarrier(2) has there.
_MEMBARRIER = {"x86_64": (0xC000003E, 324), "aarch64": (0xC00000B7, 283)}

_SET_SECCOMP, _FILTER = 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000

# Classic BPF (filter.h); a filter is given the call's number, then the architecture.
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCHITECTURE = 0, 4

# Each waits for one in a thread.
_AT_A_TIME = 32


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("true", ctypes.c_ubyte), ("false", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("first", ctypes.POINTER(_Instruction)))


class Brisk:
    """Starts them, and waits for them in threads of its own."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_AT_A_TIME, "brisk", initializer=_do_without_membarrier)

    async def start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        """A command that is running. It is ended again where nobody waits for it any more."""
        starting = asyncio.get_running_loop().run_in_executor(self._threads, _start, argv)
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            await self.kill(await starting)
            raise

    async def end(self, process: subprocess.Popen[bytes], seconds: float) -> tuple[int, bytes, bytes]:
        """Its exit code, and what it wrote to its output and as errors; it goes on where nobody waits any more.

        Raises:
            TimeoutError: It took longer, and was killed.
        """
        wait = partial(process.communicate, timeout=seconds)
        try:
            out, err = await asyncio.get_running_loop().run_in_executor(self._threads, wait)
        except subprocess.TimeoutExpired:
            await self.kill(process)
            raise TimeoutError from None
        return process.returncode, out, err

    async def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End it at once."""
        process.kill()
        await asyncio.get_running_loop().run_in_executor(self._threads, process.communicate)


def _start(argv: list[str]) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    # A Ctrl-C for the engine's terminal is not for its sandboxes.
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True)


def _do_without_membarrier() -> None:
    """For this thread and its children; without effect for an ordinary user, who would have to give up more for it."""
    if platform.machine() not in _MEMBARRIER:
        return
    architecture, number = _MEMBARRIER[platform.machine()]
    instructions = (
        _Instruction(_LOAD, 0, 0, _ARCHITECTURE),
        _Instruction(_EQUAL, 0, 3, architecture),
        _Instruction(_LOAD, 0, 0, _NUMBER),
        _Instruction(_EQUAL, 0, 1, number),
        _Instruction(_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        _Instruction(_RETURN, 0, 0, _ALLOW),
    )
    program = _Program(len(instructions), (_Instruction * len(instructions))(*instructions))
    ctypes.CDLL(None).prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)
