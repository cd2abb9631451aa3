"""What envd itself promises: health, init, metrics, and who may ask for what."""

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
    """Also for files: their signatures are checked by the engine, which then brings the token along."""
    await envd_http.post("/init", json={"accessToken": "secret"})
    calls = ["GET /envs", "GET /metrics", "GET /files?path=/etc/hostname", "POST /files?path=/nowhere/x"]
    calls += ["POST /filesystem.Filesystem/Stat", "DELETE /health", "GET /nowhere"]

    answers = [await envd_http.request(*call.split(), headers=headers) for call in calls]

    assert {answer.status_code for answer in answers} == {answer.json()["code"] for answer in answers} == {401}
    assert all("access token" in answer.json()["message"] for answer in answers)


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


async def test_metrics_tell_of_the_machine_that_is_shown(envd_http: httpx.AsyncClient) -> None:
    first, second = [(await envd_http.get("/metrics")).json() for _ in range(2)]

    assert first["cpu_used_pct"] == 0
    assert 0 <= second["cpu_used_pct"] <= 100
    assert 0 < second["mem_used"] < second["mem_total"]
    assert second["mem_total_mib"] == second["mem_total"] >> 20
    assert set(first) == {"ts", "cpu_count", "cpu_used_pct", "disk_total", "disk_used"} | {
        f"mem_{name}" for name in ("total", "used", "cache", "total_mib", "used_mib")
    }
