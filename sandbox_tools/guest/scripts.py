"""What the guest says to a kernel in the kernel's own language: limits, variables, random numbers. Pure."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FENCE = "sandbox_fence"
"""Type of the message behind which no output of earlier code can be on its way any more."""


GATHER = """\
(() => {
  const { Console } = Deno[Deno.internal] ?? {}, { broadcast } = Deno.jupyter;
  if (!Console) return;
  let held = [], size = 0, last = 0, timer = null;
  const flush = globalThis[Symbol.for("sandbox.flush")] = (over) => {
    clearTimeout(timer);
    const ready = held;
    held = [], size = 0, last = over ? 0 : Date.now(), timer = null;
    for (const [name, text] of ready) broadcast("stream", { name, text });
  };
  globalThis.console = new Console((text, level) => {
    const name = level > 1 ? "stderr" : "stdout", tail = held.at(-1);
    if (tail?.[0] === name) tail[1] += text; else held.push([name, text]);
    size += text.length;
    if (size > 16384 || Date.now() - last > 50) flush(); else timer ??= setTimeout(flush, 50);
  });
})();
"""
"""Has Deno gather lines for 50 ms: it would send each by itself, which takes 2 ms a line in a sandbox.

The first line of a call, or after a silence, goes out at once: code that computes without a break lets no timer fire.
"""


class Script(Protocol):
    """Each method returns code that is run silently; '' where there is nothing to do.

    Raises:
        ValueError: The language can't hold a variable of that name or value.
    """

    prelude: str
    """What the kernel is told first."""
    fence: str
    """Sends a `FENCE`. Empty where a kernel's `idle` itself comes after all output."""

    def limit_memory(self, fillable: int) -> str:
        """Lets the code fill so many bytes, so that it fails before the sandbox does."""

    def update(self, changed: Mapping[str, str], gone: Sequence[str]) -> str:
        """Sets and removes variables for good."""

    def lend(self, env: Mapping[str, str]) -> str:
        """Sets variables until `take_back`."""

    def take_back(self) -> str:
        """Puts the variables that were lent back to what they were before."""

    def reseed(self) -> str:
        """Fresh entropy, so that sandboxes restored from one image share no random numbers."""


class PythonScript:
    """By the functions of `in_python`, which the kernel keeps as the module `_sandbox`."""

    prelude = ""
    fence = ""

    def limit_memory(self, fillable: int) -> str:
        """See `Script`."""
        return f"__import__('_sandbox').limit_memory({fillable})"

    def update(self, changed: Mapping[str, str], gone: Sequence[str]) -> str:
        """See `Script`."""
        return f"__import__('_sandbox').update_env({dict(changed)!r}, {list(gone)!r})"

    def lend(self, env: Mapping[str, str]) -> str:
        """See `Script`."""
        return f"__import__('_sandbox').lend_env({dict(env)!r})"

    def take_back(self) -> str:
        """See `Script`."""
        return "__import__('_sandbox').return_env()"

    def reseed(self) -> str:
        """See `Script`."""
        return "__import__('_sandbox').reseed()"


class BashScript:
    """By bash's own words; what is lent is kept in `_sandbox_lent`, as the commands that bring it back."""

    prelude = ""
    fence = ""

    def limit_memory(self, fillable: int) -> str:
        """See `Script`. It counts for each command alone."""
        return f"ulimit -S -v {fillable >> 10}"

    def update(self, changed: Mapping[str, str], gone: Sequence[str]) -> str:
        """See `Script`."""
        lines = [f"export {_name(name)}={_quoted(value)}" for name, value in changed.items()]
        return " &&\n".join([*lines, *(f"unset -v {_name(name)}" for name in gone)])

    def lend(self, env: Mapping[str, str]) -> str:
        """See `Script`."""
        before = "_sandbox_lent+=\"unset -v {0}; $(declare -p {0} 2>/dev/null || :)\"$'\\n'"
        keep = [before.format(_name(name)) for name in env]
        return " &&\n".join([*keep, self.update(env, ())])

    def take_back(self) -> str:
        """See `Script`."""
        return 'eval "${_sandbox_lent-}"; unset -v _sandbox_lent'

    def reseed(self) -> str:
        """See `Script`."""
        return "RANDOM=$(od -An -N2 -tu2 /dev/urandom)"


class DenoScript:
    """By Deno's own environment, which `process.env` shows as well."""

    prelude = GATHER
    fence = f'globalThis[Symbol.for("sandbox.flush")]?.(true); await Deno.jupyter.broadcast("{FENCE}", {{}});'

    def limit_memory(self, fillable: int) -> str:
        """See `Script`. What V8 has mapped and not filled, some gigabytes, does not count."""
        return (
            '(() => { const [mapped, filled] = Deno.readTextFileSync("/proc/self/statm").split(" ");'
            f"const limit = {fillable} + (mapped - filled) * 4096;"
            "const args = [`--pid=${Deno.pid}`, `--as=${limit}:`];"
            'const { success } = new Deno.Command("prlimit", { args, stdout: "null", stderr: "null" }).outputSync();'
            'if (!success) throw new Error("prlimit failed"); })();'
        )

    def update(self, changed: Mapping[str, str], gone: Sequence[str]) -> str:
        """See `Script`."""
        return (
            f"for (const [name, value] of Object.entries({json.dumps(dict(changed))})) Deno.env.set(name, value);"
            f"for (const name of {json.dumps(list(gone))}) Deno.env.delete(name);"
        )

    def lend(self, env: Mapping[str, str]) -> str:
        """See `Script`."""
        return (
            f"for (const [name, value] of Object.entries({json.dumps(dict(env))})) {{"
            'const lent = (globalThis[Symbol.for("sandbox.lent")] ??= {});'
            "if (!(name in lent)) lent[name] = Deno.env.get(name) ?? null;"
            "Deno.env.set(name, value); }"
        )

    def take_back(self) -> str:
        """See `Script`."""
        return (
            'for (const [name, value] of Object.entries(globalThis[Symbol.for("sandbox.lent")] ?? {})) {'
            "if (value === null) Deno.env.delete(name); else Deno.env.set(name, value); }"
            'delete globalThis[Symbol.for("sandbox.lent")];'
        )

    def reseed(self) -> str:
        """Nothing: V8 keeps the state of `Math.random` to itself; `crypto` asks the kernel each time."""
        return ""


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        msg = f"bash can't hold a variable named {name!r}. Use letters, digits and underscores."
        raise ValueError(msg)

    return name


def _quoted(value: str) -> str:
    if "\0" in value:
        msg = "embedded null byte"
        raise ValueError(msg)

    return "'" + value.replace("'", "'\\''") + "'"
