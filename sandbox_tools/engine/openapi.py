"""The OpenAPI 3.1 document that the engine serves of itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sandbox_tools.engine.operations import IDEMPOTENCY_KEY, SANDBOX_ID, Operation
from sandbox_tools.models import ErrorBody

_REF = "#/components/schemas/{model}"


def document(operations: Iterable[Operation]) -> dict[str, Any]:
    """The document, as plain data."""
    operations = list(operations)
    models = {model for operation in operations for model in _models(operation)} | {ErrorBody}
    # Each once and as what is read: as what is written, whatever has a default would be there always.
    wanted = [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)]
    _, schemas = models_json_schema(wanted, ref_template=_REF)  # type: ignore[arg-type]  # a literal, widened
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described = _operation(operation)
        for status, name, pointer in operation.yields:
            described["responses"][str(status)]["links"] = {
                each.name: {"operationId": each.name, "parameters": {name: f"$response.body#{pointer}"}}
                for each in operations
                if name in _names(each.path)
            }
        paths.setdefault(operation.path.replace(":path}", "}"), {})[operation.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "sandbox-tools: the local engine's control plane", "version": version("sandbox-tools")},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-KEY"}},
        },
        "security": [{"ApiKey": []}],
    }


def _models(operation: Operation) -> Iterable[type[BaseModel]]:
    if operation.body is not None:
        yield operation.body
    for content in operation.answers.values():
        model = get_args(content)[0] if get_origin(content) is list else content
        if isinstance(model, type) and issubclass(model, BaseModel):
            yield model


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": [*_path_parameters(operation), *_query_parameters(operation), *_header_parameters(operation)],
        "responses": {
            **{str(status): _answer(operation, status) for status in operation.answers},
            **{str(status): _error(status) for status in sorted(errors(operation))},
        },
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": operation.body_required,
            "content": {"application/json": {"schema": {"$ref": _REF.format(model=operation.body.__name__)}}},
        }
    if operation.open:
        described["security"] = []
    if operation.extension:
        described["description"] = "An extension: E2B, PPIO and UCloud don't have it."
        described["x-extension"] = True
    return described


def errors(operation: Operation) -> set[int]:
    """Every status with an error body that the operation may have."""
    found = {*operation.errors, 500, 503}
    if not operation.open:
        found.add(401)
    if operation.body or operation.query or operation.keyed or "{" in operation.path:
        found.add(400)
    return found


def _path_parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    for name in _names(operation.path):
        schema = {"type": "string", "minLength": 1}
        if name == "sandboxID":
            schema["pattern"] = f"^{SANDBOX_ID}$"
        yield {"name": name, "in": "path", "required": True, "schema": schema}


def _names(path: str) -> list[str]:
    return re.findall(r"{(\w+)", path)


def _query_parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    if operation.query is not None:
        schema = operation.query.model_json_schema(by_alias=True)
        for name, its in schema["properties"].items():
            # None is what a parameter is that isn't there; it can't be sent.
            choices = [each for each in its.get("anyOf", ()) if each != {"type": "null"}]
            plain = {key: value for key, value in its.items() if key not in ("anyOf", "default", "title")}
            if its.get("default") is not None:
                plain["default"] = its["default"]
            yield {
                "name": name,
                "in": "query",
                "required": name in schema.get("required", ()),
                "schema": {**plain, **(choices[0] if choices else {})},
            }


def _header_parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    if operation.keyed:
        schema = {"type": "string", "pattern": f"^{IDEMPOTENCY_KEY}$"}
        yield {"name": "Idempotency-Key", "in": "header", "required": False, "schema": schema}


def _answer(operation: Operation, status: int) -> dict[str, Any]:
    content = operation.answers[status]
    described: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if operation.headers:
        described["headers"] = {
            name: {"description": text, "schema": {"type": "string"}} for name, text in operation.headers.items()
        }
    if content is str:
        described["content"] = {"text/plain": {"schema": {"type": "string"}}}
    elif content is not None:
        described["content"] = {"application/json": {"schema": _schema(content)}}
    return described


def _schema(content: Any) -> dict[str, Any]:
    if get_origin(content) is list:
        return {"type": "array", "items": _schema(get_args(content)[0])}
    if content is dict:
        return {"type": "object"}
    return {"$ref": _REF.format(model=content.__name__)}


def _error(status: int) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=ErrorBody.__name__)}
    return {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}
