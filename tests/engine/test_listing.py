"""Listings: filters as the SDKs encode them, and pages that stay right while sandboxes come and go."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.engine.listing import Order, Row, has, micros, page, parse_metadata
from sandbox_tools.errors import ConfigError
from tests.machine import Box, EngineProcess

BEGIN = datetime(2026, 11, 23, tzinfo=UTC)

# Anything that a URL can carry: lone surrogates are no text.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.dictionaries(text, text, max_size=5))
def test_metadata_comes_back_as_the_sdks_encode_it(metadata: dict[str, str]) -> None:
    """PROTOCOL.md section 2.3: each key and value, then all as a query, then once more as a parameter."""
    once = urlencode({quote(key): quote(value) for key, value in metadata.items()})
    arrives = parse_qs(urlencode({"metadata": once}), keep_blank_values=True)["metadata"][0]
    assert parse_metadata(arrives) == metadata


@given(text)
def test_a_metadata_filter_is_read_or_refused_and_nothing_else(query: str) -> None:
    try:
        found = parse_metadata(query)
    except ConfigError:
        return
    assert all(isinstance(each, str) for pair in found.items() for each in pair)


@pytest.mark.parametrize("query", ["key", "a=b=c", "a=b&c", "="])
def test_what_is_not_made_of_pairs_is_refused(query: str) -> None:
    if query == "=":
        assert parse_metadata(query) == {"": ""}
    else:
        with pytest.raises(ConfigError, match="Error parsing metadata"):
            parse_metadata(query)


def test_all_pairs_of_a_filter_must_be_there() -> None:
    assert has({"a": "1", "b": "2"}, {"a": "1"})
    assert not has({"a": "1"}, {"a": "1", "b": "2"})
    assert not has({}, {"a": "1"})
    assert has({}, {})


def test_microseconds_are_exact_in_any_zone() -> None:
    moment = datetime(2262, 4, 11, 23, 47, 16, 854775, tzinfo=UTC)
    assert micros(moment) == 9223372036854775
    assert micros(moment.astimezone()) == 9223372036854775


# What happens between two pages: something is created, killed, or paused and resumed.
change = st.tuples(st.sampled_from(["create", "kill", "resume"]), st.integers(0, 30))


@given(
    st.integers(0, 12),
    st.lists(st.lists(change, max_size=4), max_size=12),
    st.integers(1, 5),
    st.sampled_from(["asc", "desc"]),
    st.integers(0, 2),
)
def test_no_row_is_shown_twice_and_none_that_stayed_is_missed(
    count: int, changes: list[list[tuple[str, int]]], limit: int, order: Order, tick: int
) -> None:
    """Whatever comes and goes between two pages; `tick` 0 has everything happen in the same microsecond."""
    clock = BEGIN
    rows: dict[str, Row[str]] = {}
    made = 0

    def create() -> None:
        nonlocal made
        made += 1
        name = f"i{made:03}"
        rows[name] = Row(id=name, starts=(micros(clock),), item=name)

    for _ in range(count):
        create()
        clock += timedelta(microseconds=tick)
    clock += timedelta(microseconds=1)
    expected = {name: rows[name].starts[0] for name in rows}
    stayed = set(rows)

    shown: list[str] = []
    items, token = page(rows.values(), limit=limit, order=order, token=None, now=clock)
    shown += items
    pending = iter(changes)
    while token:
        clock += timedelta(microseconds=max(tick, 1))
        for what, which in next(pending, []):
            names = sorted(rows)
            if what == "create":
                create()
            elif names:
                name = names[which % len(names)]
                if what == "kill":
                    del rows[name]
                    stayed.discard(name)
                else:
                    rows[name] = Row(id=name, starts=(micros(clock), *rows[name].starts), item=name)
        items, token = page(rows.values(), limit=limit, order=None, token=token, now=clock)
        assert len(items) <= limit
        shown += items

    assert len(shown) == len(set(shown))
    assert stayed <= set(shown) <= set(expected)
    sign = 1 if order == "asc" else -1
    assert shown == sorted(shown, key=lambda name: (sign * expected[name], name))


@given(st.text(max_size=60), st.sampled_from([None, "asc", "desc"]))
def test_any_token_that_is_not_ours_is_refused(token: str, order: Order | None) -> None:
    if token:
        with pytest.raises(ConfigError, match="Invalid next token"):
            page([], limit=1, order=order, token=token, now=BEGIN)


def test_a_token_is_of_one_order_only() -> None:
    rows = [Row(id=name, starts=(1,), item=name) for name in ("a", "b")]
    _, token = page(rows, limit=1, order="asc", token=None, now=BEGIN)
    assert page(rows, limit=1, order="asc", token=token, now=BEGIN) == (["b"], None)
    with pytest.raises(ConfigError):
        page(rows, limit=1, order="desc", token=token, now=BEGIN)


@pytest.fixture(scope="module")
def three(engine: EngineProcess) -> Iterator[list[Box]]:
    """A paused sandbox of Ann's, and two that run of hers and Bob's, in the order of their starts."""
    mark = {"test": "listing"}
    boxes = [
        engine.create(metadata={"owner": "ann", **mark}),
        engine.create(metadata={"owner": "ann", **mark}, templateID="code-interpreter-v1"),
        engine.create(metadata={"owner": "bob", **mark}),
    ]
    boxes[0].post("pause")
    yield boxes
    for box in boxes:
        box.kill()


def listed(engine: EngineProcess, path: str = "/v2/sandboxes", **query: Any) -> tuple[list[str], dict[str, str]]:
    with engine.http() as http:
        answer = http.get(path, params={"metadata": "test=listing", **query})
    assert answer.status_code == 200, answer.text
    return [row["sandboxID"] for row in answer.json()], dict(answer.headers)


def test_a_listing_is_filtered_ordered_and_counted(engine: EngineProcess, three: list[Box]) -> None:
    first, second, third = (box.id for box in three)
    assert listed(engine)[0] == [third, second, first]
    assert listed(engine, order="asc")[0] == [first, second, third]
    assert listed(engine, state="running,paused")[0] == [third, second, first]
    assert listed(engine, state="paused")[0] == [first]
    assert listed(engine, metadata="test=listing&owner=ann")[0] == [second, first]
    assert listed(engine, template="code-interpreter-v1")[0] == [second]
    assert listed(engine, template="base:default")[0] == [third, first]
    started = three[1].info()["startedAt"]
    assert listed(engine, startedAfter=started)[0] == [third]
    assert listed(engine, "/sandboxes")[0] == [third, second]
    assert listed(engine)[1]["x-total-running"] == "2"
    assert "x-total-running" not in listed(engine, state="paused")[1]


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 0},
        {"limit": 101},
        {"limit": "many"},
        {"state": "pausing"},
        {"state": ""},
        {"order": "up"},
        {"startedAfter": "yesterday"},
        {"startedAfter": "2026-11-23T07:00:00"},
        {"template": "base:v2"},
        {"nextToken": "?"},
        {"metadata": "key"},
    ],
)
def test_a_query_that_makes_no_sense_is_refused(engine: EngineProcess, query: dict[str, Any]) -> None:
    with engine.http() as http:
        answer = http.get("/v2/sandboxes", params=query)
    assert answer.status_code == 400
    assert answer.json()["code"] == 400


def test_a_listed_row_has_what_the_sdks_need_and_no_secret(engine: EngineProcess, three: list[Box]) -> None:
    """PROTOCOL.md section 2.1."""
    with engine.http() as http:
        rows = http.get("/v2/sandboxes", params={"metadata": "test=listing"}).json()
    needed = {
        "templateID", "sandboxID", "clientID", "startedAt", "endAt", "cpuCount",
        "memoryMB", "diskSizeMB", "state", "envdVersion", "metadata",
    }  # fmt: skip
    for row in rows:
        assert needed <= set(row)
        assert not {box.token for box in three} & set(map(str, row.values()))
        assert row["diskSizeMB"] > 0
    paused = next(row for row in rows if row["state"] == "paused")
    assert paused["snapshotBytes"] > 1 << 20


def test_metrics_are_of_the_host_and_kept_over_a_pause(engine: EngineProcess, three: list[Box]) -> None:
    box = three[1]
    box.run("blob = b'x' * (100 << 20)\nimport time\nend = time.time() + 0.5\nwhile time.time() < end: pass")
    with engine.http() as http:
        samples = http.get(f"/sandboxes/{box.id}/metrics").json()
        many = http.get("/sandboxes/metrics", params={"sandbox_ids": f"{box.id},{three[2].id}-6532622b,ino"}).json()
        paused = three[0]
        assert http.get(f"/sandboxes/{paused.id}/metrics").status_code == 200
        assert http.get("/sandboxes/ino/metrics").status_code == 404
        last = samples[-1]["timestampUnix"]
        for unit in (1, 1000):  # PPIO's legacy domain sends milliseconds
            after = http.get(
                f"/sandboxes/{box.id}/metrics", params={"start": (last + 2) * unit, "end": (last + 3) * unit}
            )
            assert [each for each in after.json() if each["timestampUnix"] <= last] == []
            before = http.get(
                f"/sandboxes/{box.id}/metrics", params={"start": (last - 9) * unit, "end": (last + 1) * unit}
            )
            assert last in [each["timestampUnix"] for each in before.json()]

    assert {"timestamp", "cpuCount", "cpuUsedPct", "memUsed", "memTotal", "memCache", "diskUsed", "diskTotal"} <= set(
        samples[-1]
    )
    assert samples[-1]["memTotal"] >= samples[-1]["memUsed"] > 10 << 20
    assert samples[-1]["diskTotal"] > samples[-1]["diskUsed"] >= 0
    assert set(many["sandboxes"]) == {box.id, three[2].id}
    box.post("pause")
    with engine.http() as http:
        assert http.get(f"/sandboxes/{box.id}/metrics").json()[: len(samples)] == samples
    box.post("connect", timeout=600)


def test_logs_tell_a_sandboxs_life_and_are_kept_over_a_pause(engine: EngineProcess, three: list[Box]) -> None:
    box = three[0]
    with engine.http() as http:
        first = http.get(f"/sandboxes/{box.id}/logs").json()
        entries = http.get(f"/v2/sandboxes/{box.id}/logs").json()["logs"]
        backward = http.get(f"/v2/sandboxes/{box.id}/logs", params={"direction": "backward", "limit": 1}).json()["logs"]
        pauses = http.get(f"/v2/sandboxes/{box.id}/logs", params={"search": "paused", "level": "info"}).json()["logs"]
        errors = http.get(f"/v2/sandboxes/{box.id}/logs", params={"level": "error"}).json()["logs"]
        cursor = int(datetime.fromisoformat(entries[-1]["timestamp"]).timestamp() * 1000)
        late = http.get(f"/v2/sandboxes/{box.id}/logs", params={"cursor": cursor}).json()["logs"]
        assert http.get("/v2/sandboxes/ino/logs").status_code == 404
        assert http.get(f"/v2/sandboxes/{box.id}/logs", params={"limit": 1001}).status_code == 400

    assert first["logEntries"] == entries
    assert [each["line"] for each in first["logs"]] == [each["message"] for each in entries]
    assert entries[0]["message"] == "created from base"
    assert backward == entries[-1:]
    assert pauses
    assert {each["message"] for each in pauses} == {"paused"}
    assert errors == []
    assert late[-1] == entries[-1]


def test_a_sandbox_that_is_resumed_between_two_pages_keeps_its_place(engine: EngineProcess, three: list[Box]) -> None:
    whole, _ = listed(engine)
    shown, headers = listed(engine, limit=1)
    box = next(box for box in three if box.id == whole[-1])
    box.post("pause")
    assert box.post("connect", timeout=600).status_code == 201
    while token := headers.get("x-next-token"):
        ids, headers = listed(engine, limit=1, nextToken=token)
        shown += ids

    assert shown == whole
    assert listed(engine)[0][0] == box.id
