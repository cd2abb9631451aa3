from __future__ import annotations

import httpx
import pytest

from sandbox_tools.client import Client
from sandbox_tools.errors import ConfigError, ConflictError, NotFoundError, ProtocolError, SandboxStateError
from tests.client.server import Server


async def test_a_sandbox_lives_pauses_wakes_and_ends(client: Client, server: Server) -> None:
    sandbox = await client.create(metadata={"k": "v"}, env={"A": "1"})
    assert "running" == (await sandbox.info()).state

    assert await sandbox.pause()
    assert not await sandbox.pause()
    assert "paused" == (await client.info(sandbox.id)).state

    again = await client.connect(sandbox.id)
    assert "running" == (await again.info()).state
    await again.set_timeout(60)

    assert await sandbox.kill()
    assert not await sandbox.kill()


async def test_create_asks_for_a_pause_at_the_timeout_unless_told_otherwise(client: Client, server: Server) -> None:
    """The net under a client that dies: its sandbox is paused by the server, not killed."""
    await client.create()
    await client.create("other", timeout=5, auto_pause=False)
    (_, first), (_, second) = server.bodies

    assert (True, 300, "code-interpreter-v1") == (first["autoPause"], first["timeout"], first["templateID"])
    assert (False, 5, "other") == (second["autoPause"], second["timeout"], second["templateID"])


async def test_an_unknown_sandbox_is_not_found(client: Client) -> None:
    for call in (client.info, client.pause, client.connect):
        with pytest.raises(NotFoundError):
            await call("nobody")
    with pytest.raises(NotFoundError):
        await client.set_timeout("nobody", 5)


async def test_a_paused_sandbox_without_an_end_is_not_taken_for_one_that_is_gone(client: Client) -> None:
    """The wire says 404 to both; believing it would lead to a second sandbox."""
    sandbox = await client.create()
    await sandbox.pause()

    with pytest.raises(SandboxStateError):
        await sandbox.set_timeout(60)


async def test_a_conflict_that_is_no_pause_stays_an_error(client: Client, server: Server) -> None:
    sandbox = await client.create()
    await sandbox.pause()
    server.states[sandbox.id] = "running"
    server.pausing_fails = True

    with pytest.raises(ConflictError):
        await sandbox.pause()


async def test_a_listing_goes_through_all_pages_and_filters(client: Client, server: Server) -> None:
    for number in range(5):
        await client.create(metadata={"k 1": "v&=/é" if number % 2 else "other"})
    await client.pause("i1")

    assert ["i0", "i1", "i2", "i3", "i4"] == [info.sandbox_id async for info in client.list()]
    assert ["i1"] == [info.sandbox_id async for info in client.list(state="paused")]
    # This server ignores the metadata filter.
    assert ["i1", "i3"] == [info.sandbox_id async for info in client.list(metadata={"k 1": "v&=/é"})]
    # As recorded from the vendors' SDKs.
    assert "metadata=k%2525201%3Dv%252526%25253D%252F%2525C3%2525A9" in server.asked[-1]


async def test_a_token_that_leads_in_circles_ends_the_listing_with_an_error(server: Server) -> None:
    row = {**Server().row_of("i1"), "state": "running"}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=[row], headers={"X-Next-Token": "t"}))

    async with Client(provider="local", transport=transport) as client:
        with pytest.raises(ProtocolError):
            _ = [info async for info in client.list()]


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"sandboxID": "i1"}', b""], ids=repr)
async def test_a_shapeless_answer_is_a_protocol_error_that_shows_no_token(answer: bytes) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=answer))

    async with Client(provider="e2b", api_key="k", transport=transport) as client:
        for call in (client.create(), client.connect("i1"), client.info("i1")):
            with pytest.raises(ProtocolError) as caught:
                await call
            assert caught.value.__cause__ is None


async def test_nulls_in_a_listing_are_as_good_as_absent_fields(server: Server) -> None:
    """Servers written in Go send null for an empty map; the rows beside it are not worse for it."""
    plain = {**server.row_of("i1"), "metadata": {"k": "v"}}
    odd = {**server.row_of("i2"), "metadata": None, "cpuCount": None, "alias": None, "lifecycle": None}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=[plain, odd]))
    async with Client(provider="local", api_url="http://sandboxes", transport=transport) as client:
        rows = [info async for info in client.list()]

    assert [("i1", {"k": "v"}, 2), ("i2", {}, 0)] == [(row.sandbox_id, row.metadata, row.cpu_count) for row in rows]


async def test_a_legacy_id_leads_back_to_its_sandbox(server: Server) -> None:
    """Where paths want the client's id too, every verb gives it, so that what a listing shows can be used."""
    paths = []

    def handler(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        listed = request.url.path == "/v2/sandboxes"
        row = Server().row_of("i1")
        return httpx.Response(200, json=[row] if listed else row)

    async with Client(provider="ppio", api_key="k", transport=httpx.MockTransport(handler)) as client:
        (info,) = [info async for info in client.list()]
        await client.pause(info.sandbox_id)
        assert "i1-c" == (await client.info(info.sandbox_id)).sandbox_id
        assert "i1-c" == (await client.connect(info.sandbox_id)).id
    assert "/sandboxes/i1-c/pause" in paths


async def test_bad_arguments_are_refused_before_any_request(client: Client, server: Server) -> None:
    calls = [
        lambda: client.create(timeout=0),
        lambda: client.create(metadata={"k": 1}),  # type: ignore[dict-item]
        lambda: client.create(env={"PASSWORD": ["hunter2"]}),  # type: ignore[dict-item]
        lambda: client.connect("i0", timeout=-1),
        lambda: client.set_timeout("i0", -1),
        lambda: client.kill(""),
        lambda: client.info(".."),
    ]
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            await call()
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError):
        Client(provider="local", request_timeout=0)

    assert not server.bodies


async def test_an_id_cannot_lead_to_another_path(client: Client, server: Server) -> None:
    await client.create()

    with pytest.raises(ProtocolError):
        await client.kill("x/../i0")
    assert "i0" in server.states
