"""One scenario, in an SDK's own environment: `python -m tests.sdk.user e2b sync`; a line of JSON for each step."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

from tests.sdk.spellings import SPELLINGS
from tests.sdk.steps import Steps


def main(spelling: str, half: str) -> None:
    """Take all steps with one half of one SDK."""
    says = SPELLINGS[spelling]
    if half == "sync":
        from tests.sdk import sync_life, sync_use

        world = SimpleNamespace(says=says, core=says.core(), Sandbox=says.code().Sandbox)
        Steps(*sync_use.step.all, *sync_life.step.all).take(world)
    else:
        from tests.sdk import async_life, async_use

        world = SimpleNamespace(says=says, core=says.core(), Sandbox=says.code().AsyncSandbox)
        asyncio.run(Steps(*async_use.step.all, *async_life.step.all).atake(world))


if __name__ == "__main__":
    main(*sys.argv[1:])
