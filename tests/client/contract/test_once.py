"""A create is not made twice where the service has no header for it (PROTOCOL.md 2.4): its metadata finds it again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandbox_tools.client import Client
from sandbox_tools.client.client import CREATE_KEY
from sandbox_tools.errors import APIError, CapacityError, RateLimitError, SandboxError, TransportError
from tests.client.contract.places import PLACES
from tests.client.contract.recorder import Answer, Recorded, Recorder, refused, said
from tests.client.contract.service import ROW

ONCE = [name for name, place in PLACES.items() if place.whole and place.table not in ("e2b", "local")]
"""The places without the header."""

MINE = said(200, [{**ROW, "metadata": {CREATE_KEY: "key-1"}}])
OTHERS = said(200, [{**ROW, "sandboxID": "iother", "metadata": {CREATE_KEY: "key-2"}}])
"""A service that ignores the filter gives what others have made."""

LOST = {
    "a reset": Answer(ending="deaf"),
    "half an answer": Answer(status=201, body=b'{"sandboxID": "i', ending="cut"),
    "a login page": Answer(status=200, body=b"<html>", headers={"content-type": "text/html"}),
    "500": refused(500),
    "502": refused(502),
    "503 of something in between": Answer(status=503, body=b"<h1>busy</h1>"),
    "504": refused(504, error_code="sandbox_placement_timeout"),
}


@pytest.fixture(params=ONCE)
async def client(
    request: pytest.FixtureRequest, recorder: Recorder, state: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Client]:
    place = PLACES[request.param]
    for variable, value in place.variables(recorder).items():
        monkeypatch.setenv(variable, value)
    async with place.client(recorder, state, request_timeout=0.5) as client:
        assert not client.dialect.idempotency_header
        yield client


def creates(recorder: Recorder) -> list[Recorded]:
    return [asked for asked in recorder.asked("/sandboxes") if asked.method == "POST"]


@pytest.mark.parametrize("lost", LOST)
async def test_a_create_whose_answer_was_lost_is_found_by_its_metadata(
    client: Client, recorder: Recorder, lost: str
) -> None:
    recorder.on("POST", "/sandboxes", LOST[lost])
    recorder.on("GET", "/v2/sandboxes", OTHERS, MINE)  # before, and after

    sandbox = await client.create(idempotency_key="key-1")

    (create,) = creates(recorder)
    assert b'"key-1"' in create.body
    assert "idempotency-key" not in create.headers
    assert f"/sandboxes/{sandbox.id}/connect" == recorder.requests[-1].path


@pytest.mark.parametrize("lost", LOST)
async def test_a_create_that_is_not_found_is_left_in_doubt_and_names_its_key(
    client: Client, recorder: Recorder, lost: str
) -> None:
    recorder.on("POST", "/sandboxes", LOST[lost])
    recorder.on("GET", "/v2/sandboxes", OTHERS)

    with pytest.raises((TransportError, APIError)) as caught:
        await client.create()

    (create,) = creates(recorder)
    assert caught.value.retryable is None
    key = str(caught.value).partition("idempotency_key='")[2].partition("'")[0]
    assert f'"{key}"'.encode() in create.body


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (refused(429, retry_after="0.001"), RateLimitError),
        (refused(503, error_code="sandbox_capacity_unavailable", retry_after="0.001"), CapacityError),
    ],
    ids=["429", "no capacity"],
)
async def test_a_create_that_was_certainly_not_made_is_sent_again(
    client: Client, recorder: Recorder, refusal: Answer, error: type[SandboxError]
) -> None:
    recorder.on("POST", "/sandboxes", refusal)
    with pytest.raises(error) as caught:
        await client.create()
    assert (4, True) == (len(creates(recorder)), caught.value.retryable)

    recorder.requests.clear()
    recorder.on("POST", "/sandboxes", refusal, Answer(ending="deaf"))
    with pytest.raises(TransportError) as doubtful:
        await client.create()
    assert (2, None) == (len(creates(recorder)), doubtful.value.retryable)
