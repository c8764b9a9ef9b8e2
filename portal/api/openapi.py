"""The OpenAPI 3.1 description, made from the routes and from the very types that decode bodies.

msgspec writes the schemas (JSON Schema 2020-12, the dialect of OpenAPI 3.1), so every limit that
is enforced is described and nothing is described that is not enforced.
"""

from __future__ import annotations

import inspect
from typing import Any
from uuid import UUID

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from portal.api.authentication import PUBLIC
from portal.api.office import ACCOUNT_HEADER
from portal.api.pagination import DEFAULT_LIMIT, MAX_LIMIT
from portal.api.problems import MEDIA_TYPE, ProblemBody
from runtime.version import product_version

DESCRIPTION = f"""Every call but /healthz and the documentation wants the header
`Authorization: Bearer <token>`, with a token of the kind `api` (acts on its account) or `operator`
(acts on the installation, and on one account that the header `{ACCOUNT_HEADER}` names). Failures
are problems (RFC 9457)."""

SCHEMAS = "#/components/schemas/{name}"
FAILURES = {
    400: "Malformed JSON, or a header is missing.",
    401: "No good token.",
    403: "The token may not do this.",
    404: "No such thing here, or a field names something that is not.",
    409: "Conflicts with what exists.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    422: "Fields are wrong; `errors` names them.",
    429: "Too many calls; see Retry-After.",
    503: "Not just now; see Retry-After.",
}


def describe(app: Litestar) -> dict[str, Any]:
    """The OpenAPI 3.1 document of every route that is part of the interface."""
    handlers = [
        (route.path_format, method, handler)
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for method, (handler, _) in route.route_handler_map.items()
        if handler.resolve_include_in_schema() and method != "OPTIONS"
    ]
    types = {type_ for _, _, handler in handlers for type_ in _types_of(handler)} | {ProblemBody}
    ordered = sorted(types, key=repr)
    schemas, components = msgspec.json.schema_components(
        ordered, schema_hook=_schema_of_foreign, ref_template=SCHEMAS
    )
    for schema in components.values():
        schema["description"] = inspect.cleandoc(schema.get("description", ""))
    schema_by_type = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for path, method, handler in sorted(handlers, key=lambda each: (each[0], each[1])):
        paths.setdefault(path, {})[method.lower()] = _operation(path, handler, schema_by_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Holloway", "version": product_version(), "description": DESCRIPTION},
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "responses": {
                str(status): {
                    "description": text,
                    "content": {MEDIA_TYPE: {"schema": schema_by_type[ProblemBody]}},
                }
                for status, text in FAILURES.items()
            },
        },
    }


def _operation(
    path: str, handler: HTTPRouteHandler, schema_by_type: dict[Any, Any]
) -> dict[str, Any]:
    text = inspect.cleandoc(inspect.getdoc(handler.fn) or "").partition("\n")
    operation: dict[str, Any] = {
        "operationId": handler.handler_name.rpartition(".")[2],
        "summary": text[0].partition(". ")[0].rstrip("."),
        "description": (text[0] + "\n" + text[2]).strip(),
        "tags": [path.split("/")[2] if path.startswith("/v1/") else "health"],
        "parameters": _parameters(path, handler),
    }
    failures = set(FAILURES) - {409, 413, 415}
    if handler.parsed_data_field is not None:
        failures |= {409, 413, 415}
        schema = schema_by_type[handler.parsed_data_field.annotation]
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    if "DELETE" in handler.http_methods:
        failures |= {409}
    if handler.opt.get(PUBLIC):
        operation["security"] = []
        failures -= {401, 403}
    returned = handler.parsed_return_field.annotation
    success: dict[str, Any] = {"description": "Done."}
    if returned in schema_by_type:
        success["content"] = {"application/json": {"schema": schema_by_type[returned]}}
    operation["responses"] = {str(handler.status_code): success} | {
        str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(failures)
    }
    return operation


def _parameters(path: str, handler: HTTPRouteHandler) -> list[dict[str, Any]]:
    names = set(handler.parsed_fn_signature.parameters)
    found: list[dict[str, Any]] = [
        {
            "name": part[1:-1],
            "in": "path",
            "required": True,
            "schema": {"type": "string", "format": "uuid"},
        }
        for part in path.split("/")
        if part.startswith("{")
    ]
    if "page" in names:
        limit = {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
        cursor = {"type": "string"}
        found.append({"name": "limit", "in": "query", "schema": limit})
        found.append(
            {
                "name": "cursor",
                "in": "query",
                "schema": cursor,
                "description": "The next_cursor of the page before.",
            }
        )
    for name, description in handler.opt.get("query", {}).items():
        schema = {"type": "string"}
        found.append({"name": name, "in": "query", "schema": schema, "description": description})
    if not handler.opt.get(PUBLIC):
        found.append(
            {
                "name": ACCOUNT_HEADER,
                "in": "header",
                "schema": {"type": "string", "format": "uuid"},
                "description": "The account to act on; operators need it for what is in one.",
            }
        )
    return found


def _types_of(handler: HTTPRouteHandler) -> list[Any]:
    found = [] if handler.parsed_data_field is None else [handler.parsed_data_field.annotation]
    returned = handler.parsed_return_field.annotation
    return found if returned in (None, type(None)) else [*found, returned]


def _schema_of_foreign(type_: type) -> dict[str, Any]:
    """msgspec knows neither networks nor our own texts."""
    if issubclass(type_, UUID):
        return {"type": "string", "format": "uuid"}
    return {"type": "string", "title": type_.__name__}
