"""The rarer operations: files, contexts, snapshots and forks, each outcome held against what it may have been."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.errors import ConflictError, NotFoundError, SandboxError, SandboxStateError
from tests.client.faults.deadlines import ASK, LONG, LOOK, PAUSE, REQUEST, SILENCE
from tests.client.faults.proxy import GARBAGE

if TYPE_CHECKING:
    from tests.client.faults.workload import Box, Outcome

PATH = "/tmp/the-file"

RUN, STAMP = "run", "stamp"
"""The metadata of a sandbox: which run made it, and which create."""


class Further(ABC):
    """What `Workload` does besides; all of it on one sandbox that nobody else is busy with."""

    _client: Client
    _clean: Client
    _made: int

    @abstractmethod
    def _is_wrong(self, what: str) -> None: ...

    @abstractmethod
    async def _attempt(self, verb: str, act: Any, dice: random.Random, *, deadline: float, about: str) -> Outcome: ...

    @abstractmethod
    async def _verb(self, verb: str, box: Box, act: Any, dice: random.Random, deadline: float) -> Outcome: ...

    @abstractmethod
    def _expect(self, verb: str, outcome: Outcome, box: Box, state: str, loose: bool) -> None: ...

    @abstractmethod
    def _failed(self, verb: str, outcome: Outcome, box: Box, loose: bool) -> None: ...

    @abstractmethod
    def _failed_inside(self, verb: str, outcome: Outcome, box: Box, loose: bool) -> None: ...

    @abstractmethod
    async def _look_inside(self, box: Box, sandbox: Sandbox) -> None: ...

    async def _file(self, box: Box, dice: random.Random) -> None:
        self._made += 1
        text = f"f{self._made}."
        files = box.sandbox.files
        verb = dice.choice(("write", "write", "read", "exists", "remove"))
        act, deadline, left = {
            "write": (partial(files.write, PATH, text * 1000), SILENCE, {text}),
            "read": (partial(files.read, PATH), SILENCE, box.file),
            "exists": (partial(files.exists, PATH), ASK, box.file),
            "remove": (partial(files.remove, PATH), ASK, {None}),
        }[verb]
        outcome = await self._verb(f"files.{verb}", box, act, dice, deadline + LOOK)
        seen = outcome.value
        if isinstance(outcome.error, NotFoundError):
            outcome.error, seen = None, None  # right where there is none
            if verb != "read":
                self._is_wrong(f"files.{verb} came to {outcome!r}")
        if not outcome.good:
            self._failed_inside(f"files.{verb}", outcome, box, loose=False)
            if outcome.error is None or outcome.error.retryable is not True:
                box.file = box.file | left
            return

        self._expect(f"files.{verb}", outcome, box, "running", loose=False)
        if seen == GARBAGE and any("garbage" in met for met in outcome.met):
            return  # a page that a network puts in the place of a file cannot be told from a file

        match verb:
            case "read":
                left = {seen[: seen.index(b".") + 1].decode() if seen else None}
                if seen and seen != next(iter(left)).encode() * 1000:
                    self._is_wrong(f"files.read gave {len(seen)} bytes of {seen[:20]!r}: {outcome}")
            case "exists":
                left = {each for each in box.file if (each is not None) == seen}
        if verb in ("read", "exists") and not (left and left <= box.file):
            self._is_wrong(f"files.{verb} gave {left}, and it was {box.file}: {outcome}")
        box.file = left

    async def _context(self, box: Box, dice: random.Random) -> None:
        """A context is made, used and removed; whatever becomes of that, it is not there twice, nor left behind."""
        self._made += 1
        token = f"x{self._made}."
        before = await self._contexts(box)
        outcome = await self._verb("create_context", box, box.sandbox.create_context, dice, ASK + LOOK)
        made = await self._contexts(box) - before
        if len(made) > 1 or (outcome.good and made != {outcome.value.id}):
            self._is_wrong(f"create_context came to {outcome!r}, and made {made}")
        if not outcome.good:
            self._failed_inside("create_context", outcome, box, loose=False)
            if made and outcome.error is not None and outcome.error.retryable is True:
                self._is_wrong(f"create_context came to {outcome!r}, and made {made}")
        for context in made:
            act: Any = partial(box.sandbox.run_code, f"{token!r}", context=context, timeout=10.0)
            box.tokens[token] = "never"  # it leaves nothing that an audit could find
            used = await self._attempt("code in a context", act, dice, deadline=10.0 + LOOK, about=token)
            if used.good and used.value.text != token:
                self._is_wrong(f"code in a context gave {used!r}")
            if not used.good:
                self._failed_inside("code in a context", used, box, loose=False)
            act = partial(box.sandbox.remove_context, context)
            removed = await self._verb("remove_context", box, act, dice, ASK + LOOK)
            there = context in await self._contexts(box)
            if removed.good and (there or removed.value is not True):
                self._is_wrong(f"remove_context gave {removed!r}, and it is there: {there}")
            if not removed.good:
                self._failed_inside("remove_context", removed, box, loose=False)
            if there:
                await (await self._clean.connect(box.id, timeout=3600)).remove_context(context)

    async def _contexts(self, box: Box) -> set[str]:
        box.states = {"running"}
        return {each.id for each in await (await self._clean.connect(box.id, timeout=3600)).list_contexts()}

    async def _snapshot(self, box: Box, dice: random.Random) -> None:
        before = await self._snapshots(box)
        outcome = await self._verb("snapshot", box, partial(self._client.snapshot, box.id), dice, PAUSE)
        made = await self._snapshots(box) - before
        self._hold_copies("snapshot", outcome, box, made, {outcome.value.snapshot_id} if outcome.good else None, 1)
        for each in made:
            act = partial(self._client.delete_snapshot, each)
            deleted = await self._attempt("delete_snapshot", act, dice, deadline=REQUEST, about=each)
            there = each in await self._snapshots(box)
            again = sum("delete_snapshot" in met for met in deleted.met) > 1
            if deleted.good and (there or not (deleted.value or again)):
                self._is_wrong(f"delete_snapshot gave {deleted!r}, and it is there: {there}")
            if there:
                await self._clean.delete_snapshot(each)

    async def _snapshots(self, box: Box) -> set[str]:
        return {each.snapshot_id async for each in self._clean.list_snapshots(sandbox_id=box.id)}

    async def _fork(self, box: Box, dice: random.Random) -> None:
        """Each copy has the memory and files of its original."""
        count = dice.choice((1, 2))
        act = partial(self._client.fork, box.id, count=count, timeout=3600)
        outcome = await self._verb("fork", box, act, dice, LONG)
        made = {row.sandbox_id async for row in self._clean.list(metadata={STAMP: box.stamp})} - {box.id}
        given = {copy.id for copy in outcome.value if isinstance(copy, Sandbox)} if outcome.good else None
        self._hold_copies("fork", outcome, box, made, given, count)
        if outcome.good and len(outcome.value) != count:
            self._is_wrong(f"fork of {count} gave {outcome!r}")
        for each in made:
            await self._look_inside(box, await self._clean.connect(each, timeout=3600))
            await self._clean.kill(each)

    def _hold_copies(
        self, verb: str, outcome: Outcome, box: Box, made: set[str], given: set[str] | None, most: int
    ) -> None:
        """What is there is what was given, or no more than was asked for."""
        error: SandboxError | None = outcome.error
        if error is not None and error.retryable is True:
            given = set()  # certainly not done
        if (made != given) if given is not None else (len(made) > most):
            self._is_wrong(f"{verb} came to {outcome!r}, and made {made}")
        if outcome.good:
            self._expect(verb, outcome, box, "running", loose=False)
        elif isinstance(error, ConflictError) or type(error) is SandboxStateError:
            self._expect(verb, outcome, box, "paused", loose=False)
        else:
            self._failed(verb, outcome, box, loose=False)
