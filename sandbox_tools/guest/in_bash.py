"""Runs inside each bash kernel: `bash_kernel`, with the reins that the guest holds there.

The kernel is a Python process that types into a bash behind a terminal.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import pexpect
from _sandbox_kernel import run_kernel
from bash_kernel import kernel

PIECE = 64 * 1024
"""Characters that are read at once at most."""

PROMPT = 20
"""Characters of a prompt, rounded up."""

SAVED = "bash_kernel: saved "
"""Begins a line by which `display` and its like, which `bash_kernel` defines, hand over what is to be shown."""

PAUSE = 0.1
"""Seconds after which a line that has not ended is shown."""


class Terminal(pexpect.spawn):  # type: ignore[misc]  # pexpect is not typed
    """One that types at once: what pexpect waits for, 50 ms before each line, is an echo that is switched off here."""

    def __init__(self, *command: Any, **more: Any) -> None:
        super().__init__(*command, **more)
        self.delaybeforesend = None


class Conversation(kernel.IREPLWrapper):  # type: ignore[misc]  # bash_kernel is not typed
    """Reads output in large pieces: the base looks for each line's end by itself, and takes minutes for megabytes."""

    def run_command(self, command: str, timeout: float | None = -1, **more: Any) -> str:
        """Types a command. One of the kernel's own, which have a `timeout`, returns its last line of output."""
        text: str = super().run_command(command, timeout, **more)
        told, _, answer = text.rstrip().rpartition("\n")
        if told:  # by bash itself, about jobs that have ended
            self.line_output_callback(f"{told}\n")
        return answer

    def _expect_prompt(self, timeout: float | None = -1) -> int:
        if timeout is not None:
            number: int = super()._expect_prompt(timeout)
            return number

        child, held = self.child, self.child.buffer
        try:
            # Virtual environments put their names before it.
            while not (found := re.search(rf"(?:\([^()\s]+\) )*{self.unique_prompt}([>+])", held)):
                lines, end, rest = held.rpartition("\n")
                if end or len(rest) > PIECE:
                    lines, rest = (lines + end, rest) if end else (rest[:-PROMPT], rest[-PROMPT:])
                    held = rest
                    self.line_output_callback(lines)
                try:
                    held += child.read_nonblocking(PIECE, PAUSE if held else None)
                except pexpect.TIMEOUT:
                    # A line that goes on later, unless it is where the prompt begins.
                    if not any(held.endswith(self.unique_prompt[:length]) for length in range(1, PROMPT)):
                        self.line_output_callback(held)
                        held = ""
            if found.start():
                self.line_output_callback(held[: found.start()])
            held = held[found.end() :]
            return ">+".index(found[1])
        finally:
            child.before = held
            for buffer in ("_buffer", "_before"):
                setattr(child, buffer, child.buffer_type())
                getattr(child, buffer).write(held)


class Bash(kernel.BashKernel):  # type: ignore[misc]  # bash_kernel is not typed
    """A bash that takes each piece of code whole, never waits for input, and says so when it lost its variables."""

    _calls = 0

    def _start_bash(self) -> None:
        if hasattr(self, "bashwrapper"):
            # Here the base found the old one at its end; a new one would stand there without the variables.
            self._end_with(self.bashwrapper.child)
        super()._start_bash()
        # An interrupt waits for the code to stop for as long as that takes; the guest decides when it is too long.
        self.bashwrapper.child.timeout = None
        self.bashwrapper.run_command("stty -onlcr; unset HISTFILE; set +o history")

    def do_execute(
        self,
        code: str,
        silent: bool,
        store_history: bool = True,
        user_expressions: Any = None,
        allow_stdin: bool = False,
    ) -> dict[str, Any]:
        """Runs the code as `eval` does: typed in line by line, as the base does it, a line may be eaten as input."""
        reply: dict[str, Any] = {"status": "abort", "execution_count": self.execution_count}
        try:
            with open(self._cell, "w", encoding="utf-8", errors="replace") as file:
                file.write(code)
            command = f"eval \"$(< '{self._cell}')\" </dev/null" if code.strip() else ""
            reply = super().do_execute(command, silent, store_history, user_expressions, allow_stdin)
        except KeyboardInterrupt:
            self.bashwrapper.child.sendintr()
        except Exception as error:  # no space for the code, for instance
            content = {"ename": type(error).__name__, "evalue": str(error), "traceback": []}
            self.send_response(self.iopub_socket, "error", content)
            return {**reply, **content, "status": "error"}
        if reply["status"] == "abort":
            self._find_prompt()
        return reply

    def process_output(self, output: str) -> None:
        """Sends output as it is; the base would end every piece of it with a new line."""
        if SAVED in output:
            super().process_output(output)
        elif not self.silent:
            sys.stdout.write(output)

    def send_response(self, stream: Any, msg_or_type: Any, content: Any = None, **more: Any) -> Any:
        """Sends output through standard output, which gathers it and waits for its reader."""
        if msg_or_type == "stream":
            sys.stdout.write(content["text"])
        else:
            sys.stdout.flush()
            if msg_or_type == "error":
                content["ename"] = content["ename"] or "ExitCode"
            super().send_response(stream, msg_or_type, content, **more)

    @property
    def _cell(self) -> str:
        return f"{os.path.splitext(self.parent.connection_file)[0]}.sh"

    def _end_with(self, child: Any) -> None:
        """Ends this process as its bash has ended: the guest then tells the caller what is lost."""
        code = 1
        try:
            self.process_output(child.before)
            sys.stdout.flush()
            child.close()
            code = 128 + child.signalstatus if child.signalstatus else child.exitstatus
            self.parent.close()  # returns once all is sent
        finally:
            os._exit(code)

    def _find_prompt(self) -> None:
        """Waits until bash listens again: after an interrupt there may be a prompt too many, or none yet."""
        child = self.bashwrapper.child
        while True:
            self._calls += 1
            try:
                # The quotes keep an echo of the command from being taken for its output.
                child.sendline(f"echo sandbox-''{self._calls}-ready")
                child.expect_exact(f"sandbox-{self._calls}-ready", timeout=1)
                self.bashwrapper._expect_prompt()
                return
            except pexpect.TIMEOUT:
                pass  # an interrupt throws away what is typed at the same time
            except KeyboardInterrupt:
                child.sendintr()


def run() -> None:
    """Runs the kernel until it is told to end."""
    pexpect.spawn, kernel.IREPLWrapper = Terminal, Conversation
    run_kernel(Bash)
