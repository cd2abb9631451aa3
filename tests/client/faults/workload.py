"""Random operations on one client, each outcome held against what it may have been."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import random
import traceback
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.client.client import CREATE_KEY
from sandbox_tools.errors import (
    APIError,
    ConflictError,
    ConnectError,
    ExecutionTimeoutError,
    NotFoundError,
    SandboxBusyError,
    SandboxError,
    SandboxExpiredError,
    SandboxStateError,
    TransportError,
)
from sandbox_tools.models import Execution, SandboxInfo
from tests.client.faults.deadlines import ALLOWANCE, CHECK, CODE, LONG, LOOK, PAUSE, READY, REQUEST
from tests.client.faults.further import RUN, STAMP, Further
from tests.client.faults.proxy import STREAMS, Proxy

APPEND = """
globals().setdefault('tokens', []).append({token!r})
with open('/tmp/tokens', 'a') as file: _ = file.write({token!r} + '\\n')
"""
TALK = "import time\nfor n in range(20): print(n, flush=True); time.sleep(0.01)\n"
DAWDLE = "import time; print('begun', flush=True); time.sleep(3)\n"
READ = """
import os
def read(path): return open(path).read().split() if os.path.exists(path) else []
(
    globals().get('tokens', []), read('/tmp/tokens'), read('/tmp/commands'),
    open('/tmp/the-file').read() if os.path.exists('/tmp/the-file') else None,
)
"""

WHILE_RUNNING = {
    "run_code": 34,
    "info": 22,
    "list": 8,
    "set_timeout": 12,
    "pause": 6,
    "connect": 4,
    "kill": 5,
    "two": 6,
    "file": 12,
    "context": 1,
    "snapshot": 1,
    "fork": 1,
}
WHILE_PAUSED = {"connect": 40, "info": 15, "list": 8, "set_timeout": 6, "pause": 4, "run_code": 8, "kill": 6, "two": 4}
WHILE_PAUSED |= {"file": 3, "snapshot": 1, "fork": 1}

PAIRS = (
    ("run_code", "run_code"),
    ("run_code", "pause"),
    ("run_code", "connect"),
    ("run_code", "kill"),
    ("pause", "connect"),
    ("pause", "pause"),
    ("connect", "connect"),
    ("info", "pause"),
    ("info", "kill"),
)

ALIVE = {"running", "paused"}


@dataclass(kw_only=True, eq=False)
class Box:
    """A sandbox as it may be."""

    stamp: str
    sandbox: Sandbox
    states: set[str]
    """In which of `running`, `paused`, `gone` it may be."""
    tokens: dict[str, str] = field(default_factory=dict)
    """What each piece of code appended: `once`, `maybe` (not more than once) or `never`."""
    file: set[str | None] = field(default_factory=lambda: {None})
    """What its one file may hold. None: it is not there."""
    history: list[str] = field(default_factory=list)
    touched: int = 0
    """Odd while something is done to it."""

    @property
    def id(self) -> str:
        return self.sandbox.id


@dataclass(kw_only=True)
class Outcome:
    """What one call came to."""

    value: Any = None
    error: SandboxError | None = None
    cancelled: bool = False
    met: list[str] = field(default_factory=list)
    """The faults of its requests, as far as they are known."""

    @property
    def good(self) -> bool:
        return self.error is None and not self.cancelled

    @property
    def name(self) -> str:
        if self.cancelled:
            return "cancelled"
        if self.error is None:
            return "ok"
        status = f" {self.error.status_code}" if isinstance(self.error, APIError) else ""
        return type(self.error).__name__ + status


class Workload(Further):
    """A number of operations, divided between tasks that share one client.

    Args:
        client: The client under test; its way leads through the proxy.
        clean: A client whose way does not, for looking at what is really there.
        seed: Decides what each task does.
    """

    def __init__(self, client: Client, clean: Client, proxy: Proxy, *, seed: int, secrets: set[str]) -> None:
        self._client = client
        self._clean = clean
        self._proxy = proxy
        self._seed = seed
        self._secrets = secrets
        self._run = f"seed-{seed}"
        self._left = 0
        self._made = 0
        self._boxes: list[Box] = []
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []

    async def run(self, operations: int, *, tasks: int) -> None:
        """Do them all, then look at everything that is there."""
        self._left = operations
        async with asyncio.TaskGroup() as group:
            for number in range(tasks):
                group.create_task(self._work(random.Random(f"{self._seed} {number}")))
        await self._look_at_all()

    def table(self) -> str:
        """Operations and their outcomes."""
        verbs = sorted({verb for verb, _ in self.outcomes})
        lines = []
        for verb in verbs:
            counts = {name: count for (other, name), count in self.outcomes.items() if other == verb}
            told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda each: -each[1]))
            lines.append(f"{verb:12} {sum(counts.values()):5}: {told}")
        return "\n".join(lines)

    def _is_wrong(self, what: str) -> None:
        self.wrong.append(what)

    async def _work(self, dice: random.Random) -> None:
        box: Box | None = None
        while self._left > 0:
            if box is None or box.states == {"gone"}:
                box = await self._create(dice)
                continue

            if "gone" in box.states:
                await self._info(box, dice)  # Whoever does not know looks first.
                continue

            weights = WHILE_PAUSED if box.states == {"paused"} else WHILE_RUNNING
            (verb,) = dice.choices(list(weights), list(weights.values()))
            if verb == "list":
                await self._list(dice)
            elif verb == "two":
                await self._two(box, dice)
            else:
                if verb == "kill":
                    await self._audit(box)
                await getattr(self, f"_{verb}")(box, dice)
                if box.states != {"gone"} and dice.random() < 0.03:
                    await self._audit(box)

    async def _attempt(
        self, verb: str, act: Callable[[], Awaitable[Any]], dice: random.Random, *, deadline: float, about: str
    ) -> Outcome:
        """Do one thing, sometimes only until a random moment, and hold it to its time and its words."""
        self._left -= 1
        loop = asyncio.get_running_loop()
        begun, start = loop.time(), len(self._proxy.ledger)
        patience = dice.random() * 0.3 if dice.random() < 0.06 else None
        task = asyncio.ensure_future(act())
        try:
            await asyncio.wait((task,), timeout=deadline + ALLOWANCE if patience is None else patience)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not task.done():
            if patience is None:
                self._is_wrong(f"{verb} on {about} took longer than {deadline} s")
            task.cancel()
            done, _ = await asyncio.wait((task,), timeout=ALLOWANCE)
            if not done:
                self._is_wrong(f"{verb} on {about} went on for {loop.time() - begun} s after it was cancelled")
        await self._proxy.settled(about)
        outcome = Outcome()
        outcome.met = [other.told for other in self._proxy.ledger[start:] if other.is_about(about)]
        try:
            outcome.value = task.result()
        except asyncio.CancelledError:
            outcome.cancelled = True
            if patience is None:
                self._is_wrong(f"{verb} on {about} was cancelled by nobody")
        except SandboxError as error:
            outcome.error = error
            self._read(verb, error)
        except Exception as error:
            outcome.error = SandboxError(str(error))
            self._is_wrong(f"{verb} on {about} raised what is not of the tree: {_whole(error)}")
        self.outcomes[verb, outcome.name] += 1
        for box in self._boxes:
            if about == box.id or about in box.tokens:
                box.history.append(f"{begun:.2f} {loop.time():.2f} {verb} {about}: {outcome.name} of {outcome.met}")
        return outcome

    def _read(self, verb: str, error: SandboxError) -> None:
        text = _whole(error) + repr(error) + repr(vars(error))
        for secret in self._secrets | self._proxy.secrets:
            if secret in text:
                self._is_wrong(f"{verb} told a secret: {text.replace(secret, '<HERE>')}")
        if (
            not isinstance(error, (TransportError, APIError, SandboxStateError, ExecutionTimeoutError))
            or error.op is None
        ):
            self._is_wrong(f"{verb} raised what fits nothing that was done: {error!r}, op {error.op!r}")
        if isinstance(error, APIError) and error.status_code not in (404, 409, 429, 502, 503, 504):
            self._is_wrong(f"{verb} raised {error!r}, and nobody answers with {error.status_code}")

    async def _create(self, dice: random.Random) -> Box | None:
        """A new sandbox, tried up to three times under one key; or what was left of it, if none of them got it."""
        self._made += 1
        stamp = f"{self._run}-{self._made}."
        key = uuid.UUID(int=dice.getrandbits(128)).hex if dice.random() < 0.5 else None
        sandbox: Sandbox | None = None
        rows: list[SandboxInfo] = []
        for attempt in range(3):
            outcome = await self._attempt(
                "create again" if attempt else "create",
                partial(
                    self._client.create,
                    timeout=3600,
                    metadata={RUN: self._run, STAMP: stamp},
                    idempotency_key=key,
                ),
                dice,
                deadline=LONG,
                about=stamp,
            )
            before, rows = rows, [row async for row in self._clean.list(metadata={STAMP: stamp})]
            most = 0 if not before and outcome.error is not None and outcome.error.retryable is True else 1
            if len(rows) > most or len(rows) < len(before):
                self._is_wrong(f"create came to {outcome!r} (at most {most}), there are {rows}, were {before}")
            if outcome.good:
                sandbox = outcome.value
                if [row.sandbox_id for row in rows] != [sandbox.id]:
                    self._is_wrong(f"create gave {sandbox.id}, and there are {rows}: {outcome}")
                break

            self._must_be_of_the_tree_of("create", outcome)
            if not rows and (key is None or dice.random() < 0.5):
                return None

            key = rows[0].metadata[CREATE_KEY] if rows else key
        if not rows:
            return None

        sandbox = sandbox or await self._clean.connect(rows[0].sandbox_id, timeout=3600)
        box = Box(stamp=stamp, sandbox=Sandbox(self._client, sandbox._grant), states={"running"})
        self._boxes.append(box)
        return box

    async def _run_code(self, box: Box, dice: random.Random, loose: bool = False) -> None:
        self._made += 1
        token = f"t{self._made}."
        before = dice.choices((APPEND, APPEND + TALK, APPEND + DAWDLE), (70, 20, 10))[0]
        dawdles = before.endswith(DAWDLE)
        code = before.format(token=token) + repr(token)
        timeout = 0.4 if dawdles else CODE
        box.touched += 1
        box.tokens[token] = "maybe"
        outcome = await self._attempt(
            "run_code",
            lambda: box.sandbox.run_code(code, timeout=timeout),
            dice,
            deadline=timeout + LOOK,
            about=token,
        )
        box.touched += 1
        if outcome.good:
            execution: Execution = outcome.value
            box.tokens[token] = "once"
            self._expect("run_code", outcome, box, "running", loose)
            if execution.failure is not None and execution.failure.name == "ExecutionAborted":
                # The code before it does not end yet; this one was not run, and says so.
                box.tokens[token] = "never"
            elif execution.failure is not None or execution.text != token or dawdles:
                self._is_wrong(f"run_code gave {execution!r} for {code!r}: {outcome.met}")
        else:
            self._not_run("run_code", outcome, box, token, loose)

    async def _command(self, box: Box, dice: random.Random, loose: bool = False) -> None:
        self._made += 1
        token = f"c{self._made}."
        box.touched += 1
        box.tokens[token] = "maybe"
        outcome = await self._attempt(
            "command",
            lambda: box.sandbox.commands.run(f"echo {token} >>/tmp/commands; echo {token}", timeout=CODE),
            dice,
            # And the time in which one that nobody waits for is killed.
            deadline=CODE + LOOK + 5.0,
            about=token,
        )
        box.touched += 1
        if outcome.good:
            box.tokens[token] = "once"
            self._expect("command", outcome, box, "running", loose)
            if (outcome.value.exit_code, outcome.value.stdout) != (0, token + "\n"):
                self._is_wrong(f"command {token} gave {outcome!r}")
        else:
            self._not_run("command", outcome, box, token, loose)

    def _not_run(self, verb: str, outcome: Outcome, box: Box, token: str, loose: bool) -> None:
        """The code or command came to nothing."""
        if outcome.error is not None and outcome.error.retryable is True:
            box.tokens[token] = "never"
        self._failed_inside(verb, outcome, box, loose)

    def _failed_inside(self, verb: str, outcome: Outcome, box: Box, loose: bool) -> None:
        """A request to the sandbox itself came to nothing."""
        error = outcome.error
        if isinstance(error, SandboxExpiredError):
            self._expect(verb, outcome, box, "gone", loose)
        elif type(error) is SandboxStateError:
            self._expect(verb, outcome, box, "paused", loose)
        elif isinstance(error, (SandboxBusyError, ConflictError)):
            if not loose and len(box.states) == 1:
                self._is_wrong(f"{verb} came to {outcome!r}, and nothing was changing {box.id} ({box.states})")
        elif isinstance(error, NotFoundError):
            self._is_wrong(f"{verb} came to {outcome!r}")
        else:
            self._must_be_of_the_tree_of(verb, outcome)

    async def _info(self, box: Box, dice: random.Random, loose: bool = False) -> None:
        outcome = await self._verb("info", box, lambda: self._client.info(box.id), dice, REQUEST)
        if outcome.good:
            info: SandboxInfo = outcome.value
            if info.sandbox_id != box.id or info.metadata[STAMP] != box.stamp:
                self._is_wrong(f"info of {box.id} gave {info!r}")
            self._expect("info", outcome, box, info.state, loose)
        else:
            self._failed("info", outcome, box, loose)

    async def _connect(self, box: Box, dice: random.Random, loose: bool = False) -> None:
        if dice.random() < 0.5:
            await self._resume(box, dice, loose)
            return

        act = partial(self._client.connect, box.id, timeout=3600)
        outcome = await self._verb("connect", box, act, dice, LONG + READY)
        if outcome.good:
            if outcome.value.id != box.id:
                self._is_wrong(f"connect to {box.id} gave {outcome.value.id}")
            if "gone" in box.states and len(box.states) == 1:
                self._is_wrong(f"connect gave {box.id}, which is gone")
            box.sandbox = outcome.value
            box.states = box.states if loose else {"running"}
        else:
            self._failed("connect", outcome, box, loose, maybe="running")

    async def _resume(self, box: Box, dice: random.Random, loose: bool = False) -> None:
        """As connect, but looks for what the pause has left; a sound sandbox is never said to have lost anything."""
        act = partial(box.sandbox.resume, timeout=3600)
        outcome = await self._verb("resume", box, act, dice, LONG + READY + CHECK + LOOK)
        if outcome.good:
            if box.states == {"gone"}:
                self._is_wrong(f"resume woke {box.id}, which is gone")
            box.states = box.states if loose else {"running"}
        else:
            self._failed("resume", outcome, box, loose, maybe="running")

    async def _pause(self, box: Box, dice: random.Random, loose: bool = False) -> None:
        start = len(self._proxy.ledger)
        act = box.sandbox.pause if dice.random() < 0.5 else partial(self._client.pause, box.id)
        outcome = await self._verb("pause", box, act, dice, CHECK + LOOK + PAUSE)
        if outcome.good:
            lost = self._did("pause", box, start)
            if not loose and outcome.value is True and "running" not in box.states:
                self._is_wrong(f"pause says it paused {box.id}, which was {box.states}: {outcome}")
            if not loose and outcome.value is False and "paused" not in box.states and not lost:
                self._is_wrong(f"pause says that {box.id} was paused, which was {box.states}: {outcome}")
            box.states = box.states if loose else {"paused"}
        else:
            self._failed("pause", outcome, box, loose, maybe="paused")

    async def _kill(self, box: Box, dice: random.Random, loose: bool = False) -> None:
        start = len(self._proxy.ledger)
        outcome = await self._verb("kill", box, lambda: self._client.kill(box.id), dice, REQUEST)
        if outcome.good:
            lost = self._did("kill", box, start)
            if outcome.value is True and box.states == {"gone"}:
                self._is_wrong(f"kill says it killed {box.id}, which was gone")
            if not loose and outcome.value is False and "gone" not in box.states and not lost:
                self._is_wrong(f"kill says there was no {box.id}, which was {box.states}: {outcome}")
            box.states = box.states if loose else {"gone"}
            if [row async for row in self._clean.list(metadata={STAMP: box.stamp})]:
                self._is_wrong(f"kill came to {outcome.value}, and {box.id} is still there: {outcome}")
        else:
            self._failed("kill", outcome, box, loose, maybe="gone")

    async def _set_timeout(self, box: Box, dice: random.Random, loose: bool = False) -> None:
        seconds = dice.randint(1800, 3600)
        outcome = await self._verb("set_timeout", box, lambda: self._client.set_timeout(box.id, seconds), dice, REQUEST)
        if outcome.good:
            self._expect("set_timeout", outcome, box, "running", loose)
            if not loose:
                end = (await self._clean.info(box.id)).end_at
                now = end.now(end.tzinfo)
                if not -60 < (end - now).total_seconds() - seconds < 60:
                    self._is_wrong(
                        f"set_timeout to {seconds} s on {box.id}, which ends at {end} (now {now}): {outcome}"
                    )
        elif type(outcome.error) is SandboxStateError:
            self._expect("set_timeout", outcome, box, "paused", loose)
        else:
            self._failed("set_timeout", outcome, box, loose)

    async def _list(self, dice: random.Random) -> None:
        state = dice.choice((None, None, "running", "paused"))
        before = {box: (box.touched, frozenset(box.states)) for box in self._boxes if box.touched % 2 == 0}

        async def collect() -> list[SandboxInfo]:
            return [row async for row in self._client.list(state=state, metadata={RUN: self._run})]  # type: ignore[arg-type]

        pages = 2 + len(self._boxes)
        outcome = await self._attempt("list", collect, dice, deadline=REQUEST * pages, about="(list)")
        if not outcome.good:
            self._must_be_of_the_tree_of("list", outcome)
            return

        found = Counter(row.sandbox_id for row in outcome.value)
        for row in outcome.value:
            if row.metadata.get(RUN) != self._run or state not in (None, row.state) or found[row.sandbox_id] > 1:
                self._is_wrong(f"list(state={state!r}) gave {row!r}, {found[row.sandbox_id]} times")
        for box, (touched, states) in before.items():
            if box.touched == touched and len(states) == 1:
                wanted = states <= ALIVE and (state is None or state in states)
                if wanted != (box.id in found):
                    self._is_wrong(f"list(state={state!r}) gave {sorted(found)}, and {box.id} is {set(states)}")

    async def _two(self, box: Box, dice: random.Random) -> None:
        """Two things at the same time."""
        pair = dice.choice(PAIRS)
        if "kill" in pair:
            await self._audit(box)
        box.states = ALIVE | ({"gone"} if "kill" in pair else set())
        several = [random.Random(dice.random()) for _ in pair]
        await asyncio.gather(
            *(getattr(self, f"_{verb}")(box, own, loose=True) for verb, own in zip(pair, several, strict=True))
        )

    async def _verb(
        self, verb: str, box: Box, act: Callable[[], Awaitable[Any]], dice: random.Random, deadline: float
    ) -> Outcome:
        box.touched += 1
        try:
            return await self._attempt(verb, act, dice, deadline=deadline, about=box.id)
        finally:
            box.touched += 1

    def _expect(self, verb: str, outcome: Outcome, box: Box, state: str, loose: bool) -> None:
        """This outcome means that the sandbox was in that state."""
        if state not in box.states:
            self._is_wrong(f"{verb} of {box.id} came to {outcome!r}, and it was {box.states}")
        if not loose:
            box.states = {state}

    def _failed(self, verb: str, outcome: Outcome, box: Box, loose: bool, maybe: str | None = None) -> None:
        """The call came to nothing; `maybe` is how the sandbox is if it was done nevertheless."""
        error = outcome.error
        if isinstance(error, (NotFoundError, SandboxExpiredError)):
            self._expect(verb, outcome, box, "gone", loose)
            return

        if isinstance(error, ConflictError) and not loose and len(box.states) == 1:
            self._is_wrong(f"{verb} of {box.id} came to {outcome!r}, and it was {box.states}")
        self._must_be_of_the_tree_of(verb, outcome)
        # "The request never left" is to be true of all that the call sent.
        if maybe is not None and box.states & ALIVE and not isinstance(error, ConnectError):
            box.states = box.states | {maybe}

    def _did(self, verb: str, box: Box, start: int) -> bool:
        """Whether the server has done it to the sandbox since that entry of the ledger."""
        done = (other for other in self._proxy.ledger[start:] if other.status == 204)
        return any(other.verb == verb and other.sandbox_id == box.id for other in done)

    def _must_be_of_the_tree_of(self, verb: str, outcome: Outcome) -> None:
        error = outcome.error
        if error is not None and not isinstance(error, (TransportError, APIError, ExecutionTimeoutError)):
            self._is_wrong(f"{verb} came to {error!r}")

    async def _audit(self, box: Box) -> None:
        """Look inside, past the proxy."""
        box.touched += 1
        state = "gone"
        with contextlib.suppress(NotFoundError):
            state = (await self._clean.info(box.id)).state
        if state not in box.states:
            self._is_wrong(f"{box.id} ({box.stamp}) is {state}, and was {box.states}")
        if state == "gone":
            box.states = {"gone"}
        else:
            sandbox = await self._clean.connect(box.id, timeout=3600)
            box.states = {"running"}
            await self._look_inside(box, sandbox)
        box.touched += 1

    async def _look_inside(self, box: Box, sandbox: Sandbox) -> None:
        """Hold what is in a sandbox, or in a copy of it, against what was done to it."""
        execution = await sandbox.run_code(READ)
        while execution.failure is not None and execution.failure.name == "ExecutionAborted":
            self.outcomes["(audit)", "waits for code that does not end"] += 1
            execution = await sandbox.run_code(READ)
        if execution.text is None:
            self._is_wrong(f"{sandbox.id} gave {execution!r} to an audit. It was: {'; '.join(box.history)}")
            box.tokens = dict.fromkeys(box.tokens, "maybe")
            execution = await sandbox.run_code(READ)
        assert execution.text is not None
        *found, file = ast.literal_eval(execution.text)
        kinds = (("memory", "t"), ("file", "t"), ("commands' file", "c"))
        for (where, kind), tokens in zip(kinds, found, strict=True):
            self._count(box, where, kind, Counter(tokens))
        if file not in [None if text is None else text * 1000 for text in box.file]:
            self._is_wrong(f"The file of {sandbox.id} holds {file and file[:20]!r}, and it was {box.file}")

    def _count(self, box: Box, where: str, kind: str, found: Counter[str]) -> None:
        for token, known in box.tokens.items():
            if not token.startswith(kind):
                continue
            right = {"once": (1,), "maybe": (0, 1), "never": (0,)}[known]
            if found.pop(token, 0) not in right:
                self._is_wrong(f"{token} should be {known} in the {where} of {box.id}, and is not")
        if found:
            self._is_wrong(f"In the {where} of {box.id} is {found}, which belongs elsewhere")

    async def _look_at_all(self) -> None:
        """What is there at the end, and what the proxy has seen on the way."""
        there = Counter([row.metadata.get(STAMP, "nobody's") async for row in self._clean.list()])
        for box in self._boxes:
            count = there.pop(box.stamp, 0)
            right = {int(state != "gone") for state in box.states}
            if count not in right:
                self._is_wrong(f"{box.id} ({box.stamp}) should be {box.states}, and is there {count} times")
        if there:
            self._is_wrong(f"There are sandboxes that nothing explains: {there}")
        for box in self._boxes:
            if box.states != {"gone"}:
                await self._audit(box)

        made: dict[str, set[str]] = {}
        sent: Counter[str] = Counter()
        for exchange in self._proxy.ledger:
            if exchange.verb == "create" and exchange.answer:
                stamp = json.loads(exchange.body)["metadata"][STAMP]
                made.setdefault(stamp, set()).add(exchange.answer["sandboxID"])
            elif exchange.verb in STREAMS and exchange.forwarded:
                sent[exchange.body.decode("latin-1")] += 1
        self.wrong += [f"Create {stamp} made {ids}" for stamp, ids in made.items() if len(ids) > 1]
        self.wrong += [f"Sent {count} times: {code}" for code, count in sent.items() if count > 1]


def _whole(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
