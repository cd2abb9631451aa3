from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.client.control import KNOWN_SIZES
from sandbox_tools.client.dialects import DIALECTS, PPIO_LEGACY, Dialect
from sandbox_tools.errors import APIError, CapacityError, ConfigError, ProtocolError, SandboxError, ServerError
from sandbox_tools.models import SandboxInfo
from tests.client.server import NOW

Answer = Callable[[httpx.Request], httpx.Response]


def client(answer: Answer, dialect: Dialect | str = "e2b", **more: Any) -> Client:
    """For answers that no real server gives on demand."""
    return Client(provider=dialect, api_key="k", transport=httpx.MockTransport(answer), **more)


def row(sandbox_id: str, **more: Any) -> dict[str, Any]:
    whole = {"templateID": "t", "clientID": "c", "startedAt": NOW, "endAt": NOW, "state": "running"}
    return {**whole, "sandboxID": sandbox_id, "metadata": {}, **more}


def pages(*script: tuple[list[str], str]) -> tuple[Answer, list[str | None]]:
    """Rows and the next token for each request in turn, the last page for good; also the tokens that were asked for."""
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        ids, token = script[min(len(asked), len(script) - 1)]
        asked.append(request.url.params.get("nextToken"))
        return httpx.Response(200, json=[row(each) for each in ids], headers={"X-Next-Token": token})

    return answer, asked


async def listed(client: Client, **filters: Any) -> list[str]:
    return [info.sandbox_id async for info in client.list(**filters)]


async def test_a_page_that_comes_twice_or_is_empty_does_not_end_a_listing() -> None:
    answer, asked = pages((["a", "a", "b"], "1"), (["a", "b"], "1"), ([], "2"), (["b", "c"], ""))

    assert ["a", "b", "c"] == await listed(client(answer))
    assert [None, "1", "1", "2"] == asked


async def test_pages_without_end_that_bring_nothing_new_end_with_an_error() -> None:
    """A server that ignores the token gives the first page for ever; to stop quietly would hide rows."""
    answer, asked = pages((["a"], "1"), (["a"], "2"), (["a"], "3"), (["a"], "4"), (["a"], "5"))
    rows = client(answer).list()

    assert "a" == (await anext(rows)).sandbox_id
    with pytest.raises(ProtocolError):
        await anext(rows)
    assert 4 == len(asked)


async def test_a_server_that_ignores_filters_does_not_widen_a_listing() -> None:
    later = "2026-11-24T07:00:00Z"
    rows = [
        row("old"),
        row("new", startedAt=later),
        row("other", startedAt=later, templateID="u"),
        row("alias", startedAt=later, templateID="u", alias="t"),
        row("paused", startedAt=later, state="paused"),
        row("tagged", startedAt=later, templateID="t:default"),
    ]
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(dict(request.url.params))
        return httpx.Response(200, json=rows)

    after = datetime(2026, 11, 24, tzinfo=UTC)
    found = await listed(client(answer), state="running", template="t", started_after=after)
    assert ["new", "alias", "tagged"] == found
    expected = {"limit": "100", "state": "running", "template": "t", "startedAfter": "2026-11-24T00:00:00+00:00"}
    assert [expected] == asked


async def test_an_empty_listing_may_be_null() -> None:
    assert [] == await listed(client(lambda _: httpx.Response(200, text="null")))


async def test_moments_without_a_time_zone_are_refused() -> None:
    naive = datetime(2026, 11, 24)
    with pytest.raises(ConfigError, match="started_after"):
        await listed(client(lambda _: httpx.Response(500)), started_after=naive)
    with pytest.raises(ConfigError, match="start"):
        await client(lambda _: httpx.Response(500)).metrics("i1", start=naive)


async def test_a_pause_has_the_time_that_the_sandboxs_size_demands() -> None:
    """60 s and 16 s per GiB where this client has seen the size, 600 s where not."""
    deadlines = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET" and request.url.path == "/v2/sandboxes":
            return httpx.Response(200, json=[row("small", memoryMB=512), row("large", memoryMB=65536)])
        return httpx.Response(204)

    owner = client(answer)
    send = owner.transport.send

    async def recorded(call: Any) -> httpx.Response:
        deadlines.append(call.deadline)
        return await send(call)

    owner.transport.send = recorded  # type: ignore[method-assign]
    await owner.pause("small")
    await listed(owner)
    await owner.pause("small")
    await owner.pause("large")
    assert [600.0, None, 68.0, 60.0 + 16 * 64] == deadlines

    for number in range(KNOWN_SIZES + 5):
        owner._own(SandboxInfo.model_validate(row(f"i{number}", memoryMB=1)))
    assert KNOWN_SIZES == len(owner._memory_mb)


MODERN = replace(DIALECTS["ppio"], by_domain={})


@pytest.mark.parametrize(
    ("dialect", "bodies"),
    [
        (DIALECTS["e2b"], [{}, {"memory": False}]),
        (DIALECTS["ucloud"], [{"memory": True}, {"memory": False}]),
        (DIALECTS["local"], [{}, {"memory": False}]),
        (MODERN, [None, ConfigError]),
        (PPIO_LEGACY, [{"sync": True}, ConfigError]),
    ],
    ids=["e2b", "ucloud", "local", "ppio", "ppio-legacy"],
)
async def test_a_pause_with_or_without_memory_is_asked_for_in_the_providers_words(
    dialect: Dialect, bodies: list[Any]
) -> None:
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content) if request.content else None)
        return httpx.Response(204)

    for memory, body in zip((True, False), bodies, strict=True):
        if body is ConfigError:
            with pytest.raises(ConfigError, match=r"`pause\(memory=False\)` at 'ppio'"):
                await client(answer, dialect).pause("i1", memory=memory)
        else:
            await client(answer, dialect).pause("i1", memory=memory)
    assert [body for body in bodies if body is not ConfigError] == sent


@pytest.mark.parametrize(("verb", "status"), [("pause", 409), ("freeze", 409), ("set_timeout", 404)])
async def test_why_a_verb_was_refused_is_asked_in_what_is_left_of_its_time(verb: str, status: int) -> None:
    owner = client(lambda _: httpx.Response(status, json={"code": status, "message": "because"}), "local")
    send, clock = owner.transport.send, asyncio.get_running_loop().time
    ends = []

    async def recorded(call: Any) -> httpx.Response:
        ends.append(clock() + (owner.transport.request_timeout if call.deadline is None else call.deadline))
        await asyncio.sleep(0.3)
        return await send(call)

    owner.transport.send = recorded  # type: ignore[method-assign]
    with pytest.raises(SandboxError):
        await getattr(owner, verb)("i1", *([5] if verb == "set_timeout" else []))
    first, second = ends
    assert second < first + 0.2


async def test_what_a_provider_does_not_have_is_named_before_any_request() -> None:
    owner = client(lambda _: pytest.fail("a request"), PPIO_LEGACY)

    async def first(rows: Any) -> None:
        async for _ in rows:
            return

    for verb, call in {
        "snapshot": owner.snapshot("i1"),
        "list_snapshots": first(owner.list_snapshots()),
        "delete_snapshot": owner.delete_snapshot("s1"),
        "freeze": owner.freeze("i1"),
    }.items():
        with pytest.raises(ConfigError, match=f"`{verb}` at 'ppio'") as caught:
            await call
        assert verb == caught.value.op


@pytest.mark.parametrize("name", ["e2b", "ppio", "novita", "ucloud"])
async def test_only_the_local_engine_freezes(name: str) -> None:
    owner = client(lambda _: pytest.fail("a request"), name)

    assert (False, True) == (owner.dialect.can_freeze, DIALECTS["local"].can_freeze)
    with pytest.raises(ConfigError, match=f"`freeze` at '{name}'"):
        await owner.freeze("i1")


@pytest.mark.parametrize(("status", "state", "outcome"), [(204, "", True), (409, "paused", False)])
async def test_a_freeze_says_whether_the_sandbox_is_frozen_or_sleeps_already(
    status: int, state: str, outcome: bool
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=row("i1", state=state))
        assert ("/sandboxes/i1/freeze", b"") == (request.url.path, request.content)
        return httpx.Response(status, json={"code": status, "message": "because"} if status > 400 else None)

    assert outcome is await client(answer, "local").freeze("i1")


async def test_metrics_of_a_legacy_domain_are_asked_for_in_milliseconds_and_come_in_mebibytes() -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(dict(request.url.params))
        return httpx.Response(200, json=[{"timestamp": NOW, "cpuCount": 2, "memUsedMiB": 1.5, "memTotalMiB": 512}])

    start = datetime(2026, 11, 24, tzinfo=UTC)
    (sample,) = await client(answer, PPIO_LEGACY).metrics("i1", start=start, end=start + timedelta(seconds=1.5))
    assert (1_572_864, 512 << 20, None) == (sample.mem_used, sample.mem_total, sample.disk_used)
    await client(answer, "e2b").metrics("i1", start=start)

    unix = int(start.timestamp())
    assert [{"start": f"{unix}000", "end": f"{unix + 1}500"}, {"start": str(unix)}] == asked


async def test_each_copy_of_a_fork_is_a_sandbox_or_the_reason_why_not() -> None:
    sent = []
    grant = {"templateID": "t", "sandboxID": "i2", "clientID": "c", "envdVersion": "0.6.13"}

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((request.url.path, json.loads(request.content)))
        if request.url.path.endswith("/clone"):
            return httpx.Response(201, json={"sandboxes": [grant], "snapshotTemplateId": "s"})
        problems = [{"error": {"code": code, "message": "because"}} for code in (503, 404)]
        return httpx.Response(201, json=[{"sandbox": grant}, *problems])

    first, *rest = await client(answer).fork("i1", count=3, timeout=9)
    assert isinstance(first, Sandbox)
    assert ("i2", [CapacityError, APIError]) == (first.id, [type(each) for each in rest])
    assert "because" in str(rest[0])

    # PPIO says only which copies there are.
    made, missing = await client(answer, PPIO_LEGACY).fork("i1-c", count=2)
    assert isinstance(made, Sandbox)
    assert isinstance(missing, SandboxError)
    assert "i2-c" == made.id
    assert sent == [
        ("/sandboxes/i1/fork", {"timeout": 9, "count": 3}),
        ("/sandboxes/i1-c/clone", {"timeout": 300, "count": 2, "strict": False}),
    ]


@pytest.mark.parametrize("verb", ["fork", "snapshot"])
async def test_a_copy_whose_answer_was_lost_is_not_made_again(verb: str) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return httpx.Response(502, json={"code": 502, "message": "because"})

    with pytest.raises(ServerError) as caught:
        await getattr(client(answer), verb)("i1")
    assert (1, None) == (len(asked), caught.value.retryable)


async def test_a_connect_that_was_sent_again_does_not_say_that_the_sandbox_ran_before() -> None:
    """The lost answer may have been that of a resume."""
    grant = {"templateID": "t", "sandboxID": "i1", "clientID": "c", "envdVersion": "0.6.13"}
    script = [httpx.Response(200, json=grant), httpx.Response(201, json=grant)]
    script += [httpx.Response(502), httpx.Response(200, json=grant)]
    owner = client(lambda _: script.pop(0))

    assert [False, True, True] == [(await owner.grant("i1", timeout=5))[1] for _ in range(3)]


async def test_a_number_of_copies_that_cannot_be_is_refused() -> None:
    for count in (0, 101):
        with pytest.raises(ConfigError):
            await client(lambda _: pytest.fail("a request")).fork("i1", count=count)
