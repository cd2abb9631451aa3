"""What this client sends for each verb, in each dialect, is what the vendor's own SDK sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox_tools.errors import ConfigError
from tests.client.contract.differences import ABSENT, ANY, DIFFERENCES, FURTHER, REFUSED
from tests.client.contract.ours import BEFORE, CALLS
from tests.client.contract.places import PLACES, Place
from tests.client.contract.recorder import Recorder
from tests.client.contract.service import CLIENT_ID, ID, TRAFFIC, well
from tests.client.contract.vendors import TABLES, Flat, of

ONE_OF_EACH = ("create", "run_code", "files.read", "commands.run", "list")

ROWS = [
    pytest.param(place, verb, id=f"{name}: {verb}")
    for name, place in PLACES.items()
    for verb in CALLS
    if (place.whole or verb in ONE_OF_EACH) and (place.table, verb) not in REFUSED
]


def expected(place: Place, verb: str) -> list[Flat]:
    """The requests of the SDK, with what this client does on purpose otherwise."""
    return [*(_rows(place, BEFORE[verb]) if verb in BEFORE else []), *_rows(place, verb)]


def _rows(place: Place, verb: str) -> list[Flat]:
    theirs = TABLES[place.table].get(verb)
    rows = theirs or FURTHER[place.table, verb][0]
    changes = [change for change in DIFFERENCES if place.table in change.dialects and verb in change.verbs]
    all_fields = []
    for row in rows:
        fields = row.flat()
        for change in changes if theirs else ():
            fields = change.apply(fields)

        if not place.key:
            fields.pop(("header", "x-api-key"), None)

        all_fields.append(fields)

    return all_fields


def odd(wanted: Flat, sent: Flat) -> dict[tuple[str, ...], tuple[object, object]]:
    """What differs: what is due, and what came."""
    both = {name: (wanted.get(name, ABSENT), sent.get(name, ABSENT)) for name in wanted | sent}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def masked(fields: Flat, wanted: Flat) -> Flat:
    """With what only has to be some text taken as such."""
    return {
        name: ANY if wanted.get(name) is ANY and isinstance(value, str) and value else value
        for name, value in fields.items()
    }


@pytest.mark.parametrize(("place", "verb"), ROWS)
async def test_each_verb_is_said_as_the_vendors_sdk_says_it(
    place: Place, verb: str, recorder: Recorder, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in place.variables(recorder).items():
        monkeypatch.setenv(name, value)

    async with place.client(recorder, state) as client:
        sandbox = await client.create()
        recorder.requests.clear()
        await CALLS[verb](client, sandbox)

    sent = recorder.requests
    wanted = expected(place, verb)
    assert len(wanted) == len(sent), sent
    for request, fields in zip(sent, wanted, strict=True):
        row = of(request)
        assert odd(fields, masked(row.flat(), fields)) == {}
        assert place.host(row.to, recorder) == request.headers["host"]
        assert (place.host(row.to, recorder) if place.tls else None) == request.server_name


@pytest.mark.parametrize("where", REFUSED, ids=lambda where: ": ".join(where))
async def test_what_a_provider_does_not_have_is_refused_before_any_request(
    where: tuple[str, str], recorder: Recorder, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialect, verb = where
    place = next(place for place in PLACES.values() if place.table == dialect)
    for name, value in place.variables(recorder).items():
        monkeypatch.setenv(name, value)

    async with place.client(recorder, state) as client:
        sandbox = await client.create()
        recorder.requests.clear()
        with pytest.raises(ConfigError) as caught:
            await CALLS[verb](client, sandbox)

    assert not recorder.requests
    assert client.dialect.name in str(caught.value)
    assert caught.value.op is not None
    assert f"`{caught.value.op}" in str(caught.value)


def test_each_verb_of_a_vendor_is_said_or_there_is_a_reason() -> None:
    """Nothing of the tables is left out in silence, and no reason stays behind when its cause is gone."""
    for dialect, table in TABLES.items():
        for verb in CALLS:
            has = verb in table
            assert has + ((dialect, verb) in FURTHER) + ((dialect, verb) in REFUSED) == 1, (dialect, verb)

        assert set(table) - set(CALLS) == {"health"}  # said by `connect` alone, of its own accord

    for change in DIFFERENCES:
        assert set(change.dialects) <= set(TABLES)
        assert set(change.verbs) <= set(CALLS)
        assert change.theirs != change.ours
        assert change.reason


@pytest.mark.parametrize(
    ("name", "domain", "host"),
    [
        ("e2b", "e2b.dev", "sandbox.e2b.dev"),
        ("e2b", "other.example", f"49999-{ID}.other.example"),
        ("ucloud", "other.example", f"49999-{ID}.other.example"),
        ("ppio", "other.example", f"49999-{ID}.other.example"),
        ("ppio on its first domain", "other.example", f"49999-{ID}-{CLIENT_ID}.other.example"),
    ],
)
async def test_the_domain_that_a_grant_names_wins_over_the_configured_one(
    name: str, domain: str, host: str, recorder: Recorder, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters differ, and only the service knows on which one a sandbox is."""
    well(recorder, domain=domain)
    for variable, value in PLACES[name].variables(recorder).items():
        monkeypatch.setenv(variable, value)

    async with PLACES[name].client(recorder, state) as client:
        await (await client.create()).run_code("1+1")

    assert (host, host) == (recorder.requests[-1].headers["host"], recorder.requests[-1].server_name)


@pytest.mark.parametrize("name", [name for name, place in PLACES.items() if place.whole])
async def test_the_token_for_traffic_goes_with_code_where_one_was_issued(
    name: str, recorder: Recorder, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    well(recorder, trafficAccessToken=TRAFFIC)
    for variable, value in PLACES[name].variables(recorder).items():
        monkeypatch.setenv(variable, value)

    async with PLACES[name].client(recorder, state) as client:
        await (await client.create()).run_code("1+1")

    create, execute = recorder.requests
    assert TRAFFIC == execute.headers["e2b-traffic-access-token"]
    assert "x-api-key" not in execute.headers
    assert not {"x-access-token", "e2b-traffic-access-token"} & set(create.headers)
