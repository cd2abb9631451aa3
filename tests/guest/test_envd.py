"""What envd promises so far: health, init, and who may ask for what."""

from __future__ import annotations

import httpx
import pytest


async def test_health_is_204_with_nothing_in_it_and_never_needs_a_token(envd_http: httpx.AsyncClient) -> None:
    await envd_http.post("/init", json={"accessToken": "secret"})

    answer = await envd_http.get("/health")

    assert (answer.status_code, answer.content) == (204, b"")


async def test_what_init_gives_can_be_read_by_who_has_the_token(envd_http: httpx.AsyncClient) -> None:
    """An init that leaves something out leaves it as it was."""
    body = {"envVars": {"A": "1"}, "accessToken": "secret", "timestamp": "2026-01-01T00:00:00Z", "lifecycleID": "x"}
    assert (await envd_http.post("/init", json=body)).status_code == 204
    assert (await envd_http.post("/init", json={})).status_code == 204

    answer = await envd_http.get("/envs", headers={"X-Access-Token": "secret"})

    assert (answer.status_code, answer.json()) == (200, {"A": "1"})


@pytest.mark.parametrize("headers", [{}, {"X-Access-Token": "wrong"}, {"X-Access-Token": ""}])
async def test_without_the_token_the_answer_is_401(envd_http: httpx.AsyncClient, headers: dict[str, str]) -> None:
    await envd_http.post("/init", json={"accessToken": "secret"})

    answer = await envd_http.get("/envs", headers=headers)

    assert answer.status_code == answer.json()["code"] == 401
    assert "access token" in answer.json()["message"]


async def test_where_no_token_was_given_none_is_asked_for(envd_http: httpx.AsyncClient) -> None:
    assert (await envd_http.get("/envs")).json() == {}


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"envVars": {"A": 1}}', b'{"envVars": 3}', b'{"accessToken": 1}'])
async def test_a_malformed_init_is_refused_and_changes_nothing(envd_http: httpx.AsyncClient, body: bytes) -> None:
    answer = await envd_http.post("/init", content=body)

    assert answer.status_code == answer.json()["code"] == 400
    assert (await envd_http.get("/envs")).json() == {}


async def test_an_unknown_route_is_a_json_404(envd_http: httpx.AsyncClient) -> None:
    answer = await envd_http.get("/nowhere")

    assert answer.status_code == answer.json()["code"] == 404
