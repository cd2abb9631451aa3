"""Code contexts: each is a kernel with one execution at a time, and the honesty to say when its variables are lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Self

from sandbox_tools.guest.events import ENDED, Event, failure, translate
from sandbox_tools.guest.kernels import TICK, Deliver, Kernel, KernelDiedError, Launch
from sandbox_tools.guest.languages import PYTHON, Language, canonical, find

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path

    from sandbox_tools.guest.channels import Message
    from sandbox_tools.guest.settings import Settings

logger = logging.getLogger(__name__)

Outlet = asyncio.Queue[Event]
"""Where the events of one execution go; bounded, so that who writes waits for who reads."""

PATIENCE = int(10 / TICK)
"""Ticks that a caller waits for code which was interrupted and goes on."""

INTERRUPTS = {0: False, int(2 / TICK): True, int(10 / TICK): True}
"""Tick of an interrupt, and whether the whole process group gets it: the first spares what runs in the background."""

STUBBORN = (
    "The code before this one was interrupted, ignores it and is still running. This code was not run. "
    "Wait and try again; if it is still running then, its kernel is killed and the variables of this context are lost."
)

NO_CALL_ENV = (
    "Variables for one call can't be set in {language}. This code was not run. "
    "Give them to the context or to the sandbox when it is made."
)


class Context:
    """One kernel and its variables."""

    def __init__(
        self, language: Language, launch: Launch, settings: Settings, cwd: Path, env: Mapping[str, str]
    ) -> None:
        self.id = uuid.uuid4().hex
        self.cwd = cwd
        self._language = language
        self._launch = launch
        self._settings = settings
        self._env = dict(env)
        self._kernel: Kernel
        self._given: dict[str, str] = {}
        """The variables that the kernel has from us."""
        self._births = 0
        """The `Settings.births` that the kernel knows of."""
        self._jobs: set[asyncio.Task[None]] = set()
        self._vacant = asyncio.Event()
        self._settling = False
        self._warned = False
        self._give_up = False
        self._lent = False
        self._unfenced = False
        """Whether output of the code that ran may still be on its way."""
        self._closed = False
        self._lost: str | None = None
        """What happened to the variables, until a caller has been told."""

    @classmethod
    async def open(
        cls, language: Language, launch: Launch, settings: Settings, *, cwd: Path, env: Mapping[str, str]
    ) -> Self:
        """Starts the kernel.

        Raises:
            KernelDiedError: It did not come up.
            OSError: It could not be started, for instance because `cwd` is not there.
        """
        context = cls(language, launch, settings, cwd, env)
        await context._start_kernel()
        context._leave()
        return context

    async def warm_up(self) -> None:
        """Imports what most Python code imports. Raises as `open` does."""
        async with self._occupied():
            await self._kernel.warm_up()
            await self._kernel.limit_memory(self._launch.memory_limit)

    async def touch(self) -> None:
        """Touches the memory that the next execution needs. Raises as `open` does."""
        async with self._occupied():
            await self._kernel.touch()

    def describe(self) -> dict[str, str]:
        """The context as the wire shows it."""
        return {"id": self.id, "language": self._language.name, "cwd": str(self.cwd)}

    def start(self, code: str, env: Mapping[str, str], out: Outlet) -> asyncio.Task[None]:
        """Begins an execution; its events come through `out`, `end_of_execution` last.

        Cancelling the task interrupts the code. The context stays occupied until the code has really stopped.
        """
        job = asyncio.create_task(self._run(code, env, out))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return job

    async def restart(self) -> None:
        """Replaces the kernel by a fresh one; an execution under way ends with an error event.

        Raises:
            KernelDiedError: The new one did not come up.
            OSError: It could not be started.
        """
        old = self._kernel
        self._lost = "The context was restarted on request"
        old.kill()
        async with self._occupied():
            if self._kernel is old and not self._closed:
                await self._start_kernel()
            self._lost = None

    async def close(self, *, now: bool = False) -> None:
        """Ends the context and every process of its kernel's group.

        Args:
            now: Also break off the streams of executions under way, which else end with an error event.
        """
        self._closed = True
        self._lost = "The context was deleted"
        self._kernel.kill(group=True)
        if now:
            for job in self._jobs:
                job.cancel()
        async with self._occupied():
            await self._kernel.stop(group=True)

    async def _run(self, code: str, env: Mapping[str, str], out: Outlet) -> None:
        try:
            if await self._enter():
                try:
                    await self._run_alone(code, env, out)
                finally:
                    self._leave()
            else:
                await out.put(failure("ExecutionAborted", STUBBORN))
                await out.put(ENDED)
        except Exception:
            logger.exception("An execution failed in the guest itself")
            await out.put(failure("UnexpectedEndOfExecution", "The server inside the sandbox failed at this code."))
            await out.put(ENDED)

    async def _run_alone(self, code: str, env: Mapping[str, str], out: Outlet) -> None:
        fate = " This code was not run."
        if self._lost is None and self._kernel.exit_code is None:
            fate = ""
            try:
                await self._execute(code, env, out)
                return
            except KernelDiedError as death:
                self._note(death)
            except asyncio.CancelledError:
                # Cancelled means that nobody listens any more. The next caller must find a kernel that is idle.
                await self._settle()
                raise

        if self._kernel.exit_code is not None:
            self._note(self._kernel.died)
        if not self._closed:
            fate += await self._revive()
        await out.put(failure("ContextRestarting", f"{self._lost}.{fate}"))
        await out.put(ENDED)
        # Only what has left for the caller counts as said.
        await out.join()
        self._lost = None

    async def _execute(self, code: str, env: Mapping[str, str], out: Outlet) -> None:
        failed = False

        async def deliver(message: Message) -> None:
            nonlocal failed
            for event in translate(message):
                failed = failed or event["type"] == "error"
                await out.put(event)

        reply = await self._prepare(env)
        if reply["status"] == "ok":
            reply = await self._kernel.request(code, deliver=deliver)
            # Where output may come after the reply, the end is only known behind the fence.
            self._unfenced = bool(self._language.script and self._language.script.fence)
            if self._unfenced:
                await self._tidy(deliver)
        if reply["status"] != "ok" and not failed:
            await out.put(failure(reply.get("ename", ""), reply.get("evalue", "")))
        await out.put(ENDED)

        with contextlib.suppress(KernelDiedError):  # the next caller finds out
            await self._tidy()

    async def _prepare(self, env: Mapping[str, str]) -> dict[str, Any]:
        """Brings the kernel up to date with what the engine and the caller gave; returns the kernel's reply."""
        wanted, births, script = self._wanted(), self._settings.births, self._language.script
        if script is None:
            return _refused(NO_CALL_ENV.format(language=self._language.name)) if env else {"status": "ok"}

        steps = []
        try:
            if births != self._births:
                steps.append(script.reseed())
            if wanted != self._given:
                changed = {name: value for name, value in wanted.items() if self._given.get(name) != value}
                steps.append(script.update(changed, sorted(self._given.keys() - wanted.keys())))
            if env:
                self._lent = True
                steps.append(script.lend(env))
        except ValueError as error:
            return _refused(str(error))
        if not any(steps):
            return {"status": "ok"}

        reply = await self._kernel.request("\n".join(steps), silent=True)
        if reply["status"] == "ok":
            self._given, self._births = wanted, births
        return reply

    async def _tidy(self, deliver: Deliver | None = None) -> None:
        """Takes back what the call was lent, and lets through what is still on its way."""
        script = self._language.script
        if script and (self._lent or self._unfenced):
            steps = [script.take_back() if self._lent else "", script.fence]
            await self._kernel.request("\n".join(steps), silent=True, fence=bool(script.fence), deliver=deliver)
            self._lent = self._unfenced = False

    async def _settle(self) -> None:
        """Interrupts the code and waits until it has stopped, or until `_enter` gives up on it."""
        self._settling, self._warned, self._give_up = True, False, False
        try:
            if self._kernel.busy:
                await self._interrupt()
            await self._tidy()
        except KernelDiedError as death:
            self._note(death)
        finally:
            self._settling = False

    async def _interrupt(self) -> None:
        following = asyncio.create_task(self._kernel.follow())
        tick = 0
        try:
            while not following.done():
                if self._give_up:
                    self._lost = "The code before this one ignored its interrupt, and its kernel was killed"
                    self._kernel.kill()
                elif tick in INTERRUPTS:
                    self._kernel.interrupt(group=INTERRUPTS[tick])
                await asyncio.wait({following}, timeout=TICK)
                tick += 1
            following.result()
        finally:
            following.cancel()

    async def _enter(self) -> bool:
        """Waits until the context is free and takes it; False: code that ignores its interrupt is in the way."""
        waited = 0
        while not self._vacant.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK):
                    await self._vacant.wait()
            waited += self._settling
            if self._settling and waited > PATIENCE:
                if not self._warned:
                    self._warned = True
                    return False
                self._give_up = True

        self._vacant.clear()
        self._kernel.discard(False)
        return True

    def _leave(self) -> None:
        if not self._closed:
            self._kernel.discard(True)
        self._vacant.set()

    @contextlib.asynccontextmanager
    async def _occupied(self) -> AsyncIterator[None]:
        while not await self._enter():
            pass
        try:
            yield
        finally:
            self._leave()

    def _note(self, death: KernelDiedError) -> None:
        self._lost = self._lost or f"The kernel died ({death})"

    async def _revive(self) -> str:
        """Starts a new kernel if the old one has ended; says in words how that went."""
        lost = " The variables of this context are lost; files and other processes are kept."
        try:
            if self._kernel.exit_code is not None:
                await self._start_kernel()
        except (KernelDiedError, OSError) as error:
            logger.exception("A context could not be restarted")
            return f"{lost} Its kernel could not be restarted ({error}). Free memory or disk space and try again."

        return f"{lost} It was restarted: import and compute again what you need."

    def _wanted(self) -> dict[str, str]:
        return {**self._settings.environment, **self._env}

    async def _start_kernel(self) -> None:
        if hasattr(self, "_kernel"):
            await self._kernel.stop()
        wanted, births = self._wanted(), self._settings.births
        self._kernel = await Kernel.start(self._language, self._launch, cwd=self.cwd, env=wanted)
        self._given, self._births, self._lent, self._unfenced = wanted, births, False, False


def _refused(why: str) -> dict[str, Any]:
    """What a kernel would have replied."""
    return {"status": "error", "ename": "ValueError", "evalue": why}


class Contexts:
    """The contexts of a sandbox, by id; each language's default one is made when it is first asked for."""

    def __init__(self, launch: Launch, settings: Settings) -> None:
        self._launch = launch
        self._settings = settings
        self._contexts: dict[str, Context] = {}
        self._defaults: dict[str, Context] = {}
        self._making_default: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def __iter__(self) -> Iterator[Context]:
        return iter(list(self._contexts.values()))

    async def default(self, language: str = PYTHON) -> Context:
        """The context of code that names none.

        Raises:
            UnknownLanguageError: No kernel for it is here.
            KernelDiedError: Its kernel did not come up.
            OSError: Its kernel could not be started.
        """
        language = canonical(language)
        if language not in self._defaults:
            find(language, self._launch.account.home)  # a name that is refused leaves no lock behind
            async with self._making_default[language]:
                if language not in self._defaults:
                    context = await self.create(language)
                    if language == PYTHON and self._launch.warm_up:
                        await context.warm_up()
                    self._defaults[language] = context
        return self._defaults[language]

    def get(self, context_id: str) -> Context | None:
        """None: there is none of that id."""
        return self._contexts.get(context_id)

    async def create(
        self, language: str = PYTHON, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Context:
        """Makes a context; `cwd` and `env` fall back to the sandbox's own. Raises as `default` does."""
        kind = find(language, self._launch.account.home)
        context = await Context.open(kind, self._launch, self._settings, cwd=cwd or self._launch.cwd, env=env or {})
        self._contexts[context.id] = context
        return context

    async def delete(self, context_id: str) -> bool:
        """False: there is none of that id."""
        context = self._contexts.pop(context_id, None)
        if context is None:
            return False

        self._defaults = {language: each for language, each in self._defaults.items() if each is not context}
        await context.close()
        return True

    async def aclose(self) -> None:
        """Ends all contexts at once."""
        contexts, self._contexts, self._defaults = list(self), {}, {}
        await asyncio.gather(*(context.close(now=True) for context in contexts))
