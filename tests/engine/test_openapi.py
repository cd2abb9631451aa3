"""The engine's description of itself is what it does: whatever is sent is answered as the description says."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from sandbox_tools.engine import controls, reports, unsupported
from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.openapi import document
from tests.engine.inside import EngineInside, engine_inside
from tests.machine import PATIENCE

KEY = "e2b_key"

OPERATIONS = (*controls.OPERATIONS, *reports.OPERATIONS, *unsupported.OPERATIONS)

ALWAYS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]

# Of those that nothing was changed of.
AS_GENERATED = [*ALWAYS, unsupported_method, ignored_auth]

# Of bodies that break the description. Queries may hold what is not in it: it is passed over.
BROKEN = [*AS_GENERATED, negative_data_rejection]

# Cases of each kind for each operation: fewer of those that restore a sandbox, which takes its time.
FEW, SOME, MANY = 2, 6, 30


@pytest.fixture(scope="module")
def served(templates: Path) -> Iterator[EngineInside]:
    """An engine on TCP with room for three sandboxes."""
    with engine_inside(templates, max_sandboxes=3, host="127.0.0.1", api_key=KEY) as engine:
        yield engine


@pytest.fixture(scope="module")
def schema(served: EngineInside) -> Any:
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{served.port}/openapi.json")


class Living:
    """Real things for generated requests to be about: without them nearly all would be about nothing."""

    def __init__(self, engine: EngineInside) -> None:
        self.engine = engine
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{engine.port}", headers={"X-API-KEY": KEY}, timeout=PATIENCE, trust_env=False
        )

    def sandbox(self, phase: str) -> str:
        """The id of a sandbox in that phase."""
        self.tidy()
        found = [entry for entry in self.all() if entry.phase == phase]
        if found:
            return found[0].record.id

        answer = self.http.post("/sandboxes", json={"templateID": "base", "timeout": 600})
        assert answer.status_code == 201, answer.text
        sandbox_id: str = answer.json()["sandboxID"]
        if phase == "paused":
            assert self.http.post(f"/sandboxes/{sandbox_id}/pause").status_code == 204
        return sandbox_id

    def snapshot(self) -> str:
        """The id of a snapshot."""
        found = self.engine.supervisor.saved.all()
        if found:
            return found[0].reference

        answer = self.http.post(f"/sandboxes/{self.sandbox('running')}/snapshots")
        assert answer.status_code == 201, answer.text
        reference: str = answer.json()["snapshotID"]
        return reference

    def tidy(self) -> None:
        """Room for one more of everything."""
        running = [entry for entry in self.all() if entry.phase == "running"]
        paused = [entry for entry in self.all() if entry.phase == "paused"]
        for entry in (*running[1:], *paused[1:]):
            self.http.delete(f"/sandboxes/{entry.record.id}")
        for each in self.engine.supervisor.saved.all()[1:]:
            self.http.delete(f"/templates/{each.reference}")

    def all(self) -> list[Entry]:
        return self.engine.supervisor.entries()


def _exercise(schema: Any, engine: EngineInside, name: str, examples: int) -> int:
    """Sends generated requests to one operation and checks each answer; how many."""
    operation = next(
        each.ok() for each in schema.get_all_operations() if each.ok().definition.raw["operationId"] == name
    )
    living = Living(engine)
    sent = 0
    quiet = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )

    @quiet
    @given(case=operation.as_strategy(), about=st.sampled_from(["running", "paused", "running", "nothing"]))
    def sensible(case: Any, about: str) -> None:
        nonlocal sent
        sent += 1
        changed = _make_real(case, living, about)
        case.call_and_validate(headers={"X-API-KEY": KEY}, timeout=PATIENCE, checks=ALWAYS if changed else AS_GENERATED)

    @quiet
    @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def broken(case: Any) -> None:
        nonlocal sent
        sent += 1
        checks = BROKEN if operation.body else AS_GENERATED
        case.call_and_validate(headers={"X-API-KEY": KEY}, timeout=PATIENCE, checks=checks)

    sensible()
    if operation.body or list(operation.iter_parameters()):
        broken()
    living.http.close()
    return sent


def _make_real(case: Any, living: Living, about: str) -> bool:
    """Puts what there is in the place of what was made up; whether it did."""
    if about == "nothing":
        return False
    changed = False
    if "sandboxID" in (case.path_parameters or {}):
        case.path_parameters["sandboxID"] = living.sandbox(about)
        changed = True
    if "templateID" in (case.path_parameters or {}):
        case.path_parameters["templateID"] = living.snapshot()
        changed = True
    if isinstance(case.body, dict) and "templateID" in case.body:
        living.tidy()
        case.body["templateID"] = "base" if about == "running" else living.snapshot()
        changed = True
    return changed


ACTING = {operation.name for operation in controls.OPERATIONS}
NAMES = sorted(operation.name for operation in OPERATIONS)


@pytest.mark.parametrize("name", NAMES)
def test_generated_requests_are_answered_as_the_description_says(schema: Any, served: EngineInside, name: str) -> None:
    """No 5xx, no status that is not in the description, no body that does not conform."""
    _exercise(schema, served, name, FEW if name in ACTING else SOME)


@pytest.mark.soak
def test_thousands_of_generated_requests_are_answered_as_the_description_says(
    schema: Any, served: EngineInside
) -> None:
    sent = sum(_exercise(schema, served, name, MANY) for name in NAMES)
    logging.getLogger(__name__).warning("%d generated requests", sent)
    assert sent >= 2000
    # And the engine still does what it is for.
    living = Living(served)
    assert living.http.get(f"/sandboxes/{living.sandbox('running')}").json()["state"] == "running"


def test_the_description_needs_no_key_and_everything_else_does(served: EngineInside) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", trust_env=False) as http:
        described = http.get("/openapi.json")
        assert described.status_code == 200
        assert described.json()["openapi"] == "3.1.0"
        assert http.get("/health").status_code == 200
        for operation in OPERATIONS:
            if not operation.open:
                path = re.sub(r"{[^}]*}", "x", operation.path)
                answer = http.request(operation.method, path)
                assert (answer.status_code, answer.json()["code"]) == (401, 401), operation.name


def test_every_error_is_json_also_where_there_is_no_route(served: EngineInside) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", headers={"X-API-KEY": KEY}, trust_env=False) as http:
        for method, path, status in (
            ("GET", "/nowhere", 404),
            ("GET", "/v9/sandboxes", 404),
            ("PATCH", "/sandboxes", 405),
            ("PUT", "/sandboxes/i1", 405),
            ("GET", "/sandboxes/i1-6532622b", 404),
            ("GET", "/sandboxes/UPPER", 400),
            ("GET", "/sandboxes/i1-a-b", 400),
            ("POST", "/sandboxes/i1/pause/", 404),
            ("POST", "/v2/templates", 403),
            ("PUT", "/sandboxes/i1/network", 404),
        ):
            answer = http.request(method, path)
            assert answer.status_code == status, (method, path, answer.text)
            assert answer.json()["code"] == status
            assert answer.json()["message"]
        assert set(http.request("PATCH", "/sandboxes").headers["Allow"].split(", ")) >= {"GET", "POST"}
        assert http.head("/v2/sandboxes").status_code == 200


def test_operations_have_names_of_their_own_and_the_document_describes_all() -> None:
    described = document(OPERATIONS)
    names = [each["operationId"] for methods in described["paths"].values() for each in methods.values()]
    assert sorted(names) == NAMES
    assert len(set(names)) == len(names)
    extensions = [path for path, methods in described["paths"].items() if methods.get("post", {}).get("x-extension")]
    assert extensions == ["/sandboxes/{sandboxID}/freeze"]
    assert "templateID" in described["components"]["schemas"]["NewSandbox"]["required"]
