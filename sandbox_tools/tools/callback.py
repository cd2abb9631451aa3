"""The callback that notices when a turn has ended, however it ends."""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.runnables import RunnableConfig

from sandbox_tools.session.session import Session
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.tools import portal
from sandbox_tools.tools.owners import Owner, thread_in


class SandboxCallback(AsyncCallbackHandler):
    """Ends the turn when the outermost run ends: by an answer, an error, a cancel, an interrupt or a broken stream.

    Bake it into the agent, `agent.with_config(callbacks=[SandboxCallback(sessions)])`; runs without a thread id are
    let pass. It only posts: the pause itself happens in the background, on the loop of `sessions`.

    With one name for all owners the turn begins with the run, so that a paused sandbox wakes while the model thinks.
    Where the owner is found in a run's config, which callbacks are not shown, it begins with `SandboxMiddleware`'s
    first hook or the first call of a tool.

    Args:
        sessions: The registry the toolkit has too.
        owner: As the toolkit's.
    """

    def __init__(self, sessions: Sessions, *, owner: Owner = "default") -> None:
        self.sessions = sessions
        self._owner = owner
        self._outermost: dict[UUID, UUID] = {}
        """Of each run that lives, the one around all."""
        self._turns: dict[UUID, dict[tuple[str, str], Session]] = {}
        """Of each outermost run, the conversations it has used."""
        self._calling: set[UUID] = set()
        """Calls of a model whose tool call has begun to come."""

    def join(self, run_id: UUID | None, session: Session) -> bool:
        """Have the turn of the run around `run_id` be one of this conversation's too. False: no such run is known."""
        root = self._outermost.get(run_id) if run_id else None
        if root is None:
            return False
        joined = self._turns.setdefault(root, {})
        if (session.owner, session.thread) not in joined:
            joined[session.owner, session.thread] = session
            # Under `invoke` this runs on a passing loop, which must not become theirs: the first tool call decides.
            session.note_turn(str(root))
            portal.post(self.sessions, session.begin_turns)
        return True

    async def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """A run inside one already seen belongs to its turn."""
        outermost = parent_run_id is None or parent_run_id not in self._outermost
        self._outermost[run_id] = run_id if outermost or parent_run_id is None else self._outermost[parent_run_id]
        thread = thread_in(metadata)
        if outermost and thread is not None and isinstance(self._owner, str):
            self.join(run_id, self.sessions.session(thread, owner=self._owner))

    async def on_llm_new_token(
        self, token: Any, *, chunk: Any = None, run_id: UUID, parent_run_id: UUID | None = None, **more: Any
    ) -> None:
        """The model begins to call a tool: what was not worth waking for the message alone wakes now."""
        if getattr(getattr(chunk, "message", None), "tool_call_chunks", None) and parent_run_id in self._outermost:
            for session in self._turns.get(self._outermost[parent_run_id], {}).values():
                if run_id not in self._calling:
                    portal.post(self.sessions, session.wake)
            self._calling.add(run_id)

    async def on_llm_end(self, response: Any, *, run_id: UUID, **more: Any) -> None:
        """It has called all it will."""
        self._calling.discard(run_id)

    async def on_llm_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        """Likewise."""
        self._calling.discard(run_id)

    async def on_tool_start(
        self,
        serialized: dict[str, Any],
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **more: Any,
    ) -> None:
        """A tool's call is one of the runs inside."""
        if parent_run_id in self._outermost:
            self._outermost[run_id] = self._outermost[parent_run_id]

    async def on_tool_end(self, output: Any, *, run_id: UUID, **more: Any) -> None:
        """It is over."""
        self._outermost.pop(run_id, None)

    async def on_tool_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        """It is over."""
        self._outermost.pop(run_id, None)

    async def on_chain_end(self, outputs: Any, *, run_id: UUID, **more: Any) -> None:
        """The turn has ended, if that run was one."""
        self._ended(run_id)

    async def on_chain_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        """So it has by an error, a cancel, or a stream that nobody reads on."""
        self._ended(run_id)

    def _ended(self, run_id: UUID) -> None:
        self._outermost.pop(run_id, None)
        for session in self._turns.pop(run_id, {}).values():
            if session.drop_turn(str(run_id)):
                portal.post(self.sessions, partial(session.end_turn, str(run_id)))


def join(config: RunnableConfig, sessions: Sessions, session: Session) -> bool:
    """Have the run of `config` be a turn of that conversation, if a `SandboxCallback` watches it. False: none does."""
    manager: Any = config.get("callbacks")
    run_id = getattr(manager, "parent_run_id", None)
    handlers = [each for each in getattr(manager, "handlers", ()) if isinstance(each, SandboxCallback)]
    return any([each.join(run_id, session) for each in handlers if each.sessions is sessions])
