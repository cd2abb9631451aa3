"""Environment variables of sandbox, context and call, and what a birth from an image changes."""

from __future__ import annotations

import pytest

from .conftest import Guest, of_type

pytestmark = pytest.mark.asyncio(loop_scope="module")

READ = "import os\n[os.environ.get(name) for name in ('SANDBOX', 'CONTEXT', 'CALL')]"


async def test_variables_of_a_call_are_there_during_it_and_gone_after(guest: Guest) -> None:
    """Also what they covered comes back, and neither counter nor history shows a trace."""
    await guest.run("import os\nos.environ['COVERED'] = 'before'")
    before = (await guest.run("0"))[0]["execution_count"]

    during = await guest.value("os.environ['COVERED'], os.environ['NEW']", env_vars={"COVERED": "call", "NEW": "1"})

    assert during == "('call', '1')"
    assert await guest.value("os.environ['COVERED'], os.environ.get('NEW')") == "('before', None)"
    assert (await guest.run("0"))[0]["execution_count"] == before + 3
    assert "_sandbox" not in await guest.value("repr(In) + repr(sorted(globals()))")


async def test_variables_of_a_call_are_gone_also_after_an_interrupt(guest: Guest) -> None:
    async with guest.stream("print(1, flush=True)\nwhile True: pass", env_vars={"SECRET": "s"}) as events:
        while (await anext(events))["type"] != "stdout":
            pass

    assert await guest.value("import os\nos.environ.get('SECRET', 'none')") == "none"


async def test_a_variable_that_cannot_be_set_is_an_error_and_the_code_does_not_run(guest: Guest) -> None:
    events = await guest.run("unset = 1", env_vars={"A": "nul \0 inside"})

    (error,) = of_type(events, "error")
    assert error["name"] == "ValueError"
    assert await guest.value("'unset' in globals()") == "False"


async def test_call_covers_context_and_context_covers_sandbox(guest: Guest) -> None:
    guest.settings.init(env_vars={"SANDBOX": "s", "CONTEXT": "s", "CALL": "s"})
    context = await guest.context(env_vars={"CONTEXT": "c", "CALL": "c"})

    assert await guest.value(READ, context_id=context, env_vars={"CALL": "x"}) == "['s', 'c', 'x']"
    assert await guest.value(READ, context_id=context) == "['s', 'c', 'c']"
    assert await guest.value(READ) == "['s', 's', 's']"

    guest.settings.init(env_vars={"CALL": "new"})
    assert await guest.value(READ, context_id=context) == "[None, 'c', 'c']"
    assert await guest.value(READ) == "[None, None, 'new']"
    await guest.http.delete(f"/contexts/{context}")


async def test_what_code_set_itself_outlives_a_resume(guest: Guest) -> None:
    """The engine repeats `/init` at each resume; variables that code changed since stay as the code left them."""
    guest.settings.init(env_vars={"SANDBOX": "given"}, lifecycle_id="one")
    await guest.run("import os\nos.environ['SANDBOX'] = 'own'")

    guest.settings.init(env_vars={"SANDBOX": "given"}, lifecycle_id="one")

    assert await guest.value("os.environ['SANDBOX']") == "own"


async def test_a_birth_reseeds_the_generators_and_a_resume_does_not(guest: Guest) -> None:
    """Sandboxes restored from one image must not share random numbers; a seeded generator goes on over a pause."""
    seed = "import random, numpy\nrandom.seed(1); numpy.random.seed(1)"
    python, numpy = "random.random()", "numpy.random.random()"
    guest.settings.init(lifecycle_id="one")
    await guest.run(seed)
    expected = [await guest.value(python), await guest.value(numpy)]

    await guest.run(seed)
    guest.settings.init(lifecycle_id="one")
    assert [await guest.value(python), await guest.value(numpy)] == expected

    await guest.run(seed)
    guest.settings.init(lifecycle_id="two")
    assert await guest.value(python) != expected[0]
    assert await guest.value(numpy) != expected[1]
