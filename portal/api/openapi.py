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

from actors.store.interface import MAX_KEY
from portal.api.authentication import PUBLIC
from portal.api.changes import MAX_NUMBER
from portal.api.events import EVENT_STREAM, EVENTS, LAST_EVENT_ID, STREAM
from portal.api.filters import FILTERS
from portal.api.idempotency import IDEMPOTENCY_HEADER, REPLAY_HEADER, is_creation, takes_key
from portal.api.office import ACCOUNT_HEADER
from portal.api.pagination import DEFAULT_LIMIT, MAX_CURSOR_TEXT, MAX_LIMIT
from portal.api.problems import MEDIA_TYPE, ProblemBody
from portal.api.scopes import scope_of
from runtime.version import product_version

DESCRIPTION = f"""Every call but /healthz, /readyz and the documentation wants the header
`Authorization: Bearer <token>`, with a token of the kind `api` (acts on its account, within its
scopes) or `operator` (acts on the installation, and on one account that the header
`{ACCOUNT_HEADER}` names). Failures are problems (RFC 9457)."""

SCHEMAS = "#/components/schemas/{name}"
FAILURES = {
    400: "Malformed JSON, or a header is missing or malformed.",
    401: "No good token.",
    403: "The token may not do this.",
    404: "No such thing here, or a field names something that is not.",
    408: "The body did not arrive in time.",
    409: "Conflicts with what exists.",
    410: "What follows is not kept any more.",
    412: "A precondition does not hold.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    422: "Fields, parameters or headers are wrong; `errors` names them.",
    429: "Too many calls; see Retry-After.",
    503: "Not just now; see Retry-After.",
}
EVERYWHERE = frozenset({408, 413, 422, 503})
WITH_TOKEN = frozenset({400, 401, 403, 404, 429})

TEXT: dict[str, Any] = {"type": "string"}
TAGS = {"type": "string", "maxLength": 1_024}
HEADERS: dict[str, dict[str, Any]] = {
    "Holloway-Request-Id": {
        "description": "Finds the call in the portal's log.",
        "schema": {"type": "string", "format": "uuid"},
    },
    "RateLimit": {
        "description": "How many calls the token has left (r), and when all are back (t, in s).",
        "schema": TEXT,
    },
    "RateLimit-Policy": {
        "description": "How many calls a token has (q) in how many seconds (w).",
        "schema": TEXT,
    },
    "Retry-After": {
        "description": "After how many seconds to ask again.",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    },
    "WWW-Authenticate": {"description": "What the portal wants (RFC 6750).", "schema": TEXT},
    "ETag": {"description": "Names this state of the entity.", "schema": TEXT},
    "Location": {"description": "The path of what was made.", "schema": TEXT},
    REPLAY_HEADER: {
        "description": "`true` if this answer was given before, for the same key.",
        "schema": {"type": "string", "enum": ["true"]},
    },
}
OF_FAILURES = {
    401: ("WWW-Authenticate",),
    403: ("WWW-Authenticate",),
    409: ("Retry-After",),
    429: ("Retry-After",),
    503: ("Retry-After",),
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
    types: set[Any] = {type_ for _, _, handler in handlers for type_ in _types_of(handler)}
    types |= {ProblemBody, *EVENTS}
    ordered = sorted(types, key=repr)
    schemas, components = msgspec.json.schema_components(
        ordered, schema_hook=_schema_of_foreign, ref_template=SCHEMAS
    )
    for schema in components.values():
        schema["description"] = inspect.cleandoc(schema.get("description", ""))
    schema_by_type = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for path, method, handler in sorted(handlers, key=lambda each: (each[0], each[1])):
        paths.setdefault(path, {})[method.lower()] = _operation(
            path, method, handler, schema_by_type
        )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Holloway", "version": product_version(), "description": DESCRIPTION},
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "headers": HEADERS,
            "responses": {
                str(status): {
                    "description": text,
                    "headers": _headers("Holloway-Request-Id", *OF_FAILURES.get(status, ())),
                    "content": {MEDIA_TYPE: {"schema": schema_by_type[ProblemBody]}},
                }
                for status, text in FAILURES.items()
            },
        },
    }


def _operation(
    path: str, method: str, handler: HTTPRouteHandler, schema_by_type: dict[Any, Any]
) -> dict[str, Any]:
    text = inspect.cleandoc(inspect.getdoc(handler.fn) or "").partition("\n")
    operation: dict[str, Any] = {
        "operationId": handler.handler_name.rpartition(".")[2],
        "summary": text[0].partition(". ")[0].rstrip("."),
        "description": (text[0] + "\n" + text[2]).strip(),
        "tags": [path.split("/")[2] if path.startswith("/v1/") else "health"],
        "parameters": _parameters(path, method, handler),
    }
    needed = scope_of(handler)
    if needed is not None:
        operation["description"] += f"\n\nScope: `{needed}`."
    if handler.parsed_data_field is not None:
        schema = schema_by_type[handler.parsed_data_field.annotation]
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    if handler.opt.get(PUBLIC):
        operation["security"] = []
    operation["responses"] = _successes(path, method, handler, schema_by_type) | {
        str(status): {"$ref": f"#/components/responses/{status}"}
        for status in sorted(_failures(path, method, handler))
    }
    return operation


def _successes(
    path: str, method: str, handler: HTTPRouteHandler, schema_by_type: dict[Any, Any]
) -> dict[str, Any]:
    names = ["Holloway-Request-Id"]
    if not handler.opt.get(PUBLIC):
        names += ["RateLimit", "RateLimit-Policy"]
    if _is_of_one(path, method, handler) and method != "DELETE":
        names.append("ETag")
    if is_creation(handler):
        names.append("Location")
    if takes_key(handler):
        names.append(REPLAY_HEADER)
    success: dict[str, Any] = {"description": "Done.", "headers": _headers(*names)}
    returned = handler.parsed_return_field.annotation
    if returned in schema_by_type:
        success["content"] = {"application/json": {"schema": schema_by_type[returned]}}
    elif handler.opt.get(STREAM):
        success["content"] = {EVENT_STREAM: {"schema": TEXT}}
    found = {str(handler.status_code): success}
    if method == "GET" and _is_of_one(path, method, handler):
        found["304"] = {"description": "You have it already.", "headers": _headers(*names)}
    return found


def _failures(path: str, method: str, handler: HTTPRouteHandler) -> set[int]:
    found = set(EVERYWHERE)
    if not handler.opt.get(PUBLIC):
        found |= WITH_TOKEN
    if handler.parsed_data_field is not None:
        found |= {400, 415}
    if method != "GET" and not (scope_of(handler) or "").endswith(":read"):
        found.add(409)
    if _is_of_one(path, method, handler) and not is_creation(handler):
        found.add(412)
    if handler.opt.get(STREAM):
        found.add(410)
    return found


def _is_of_one(path: str, method: str, handler: HTTPRouteHandler) -> bool:
    """Whether a call is about one entity, which has a tag."""
    return is_creation(handler) or ("{" in path and method in ("GET", "PATCH", "DELETE"))


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _parameters(path: str, method: str, handler: HTTPRouteHandler) -> list[dict[str, Any]]:
    names = set(handler.parsed_fn_signature.parameters)
    found = [
        {
            "name": part[1:-1],
            "in": "path",
            "required": True,
            "schema": PATH_SCHEMAS.get(part[1:-1], {"type": "string", "format": "uuid"}),
        }
        for part in path.split("/")
        if part.startswith("{")
    ]
    if "page" in names:
        limit = {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
        found.append(_parameter("limit", "query", limit))
        cursor = {"type": "string", "maxLength": MAX_CURSOR_TEXT}
        found.append(_parameter("cursor", "query", cursor, "The next_cursor of the page before."))
    for name, each in handler.opt.get(FILTERS, {}).items():
        schema = msgspec.json.schema(each.type, schema_hook=_schema_of_foreign)
        description = each.description or f"Only those with this {name}."
        found.append(_parameter(name, "query", schema, description))
    if handler.opt.get(PUBLIC):
        return found
    account = {"type": "string", "format": "uuid"}
    found.append(
        _parameter(
            ACCOUNT_HEADER,
            "header",
            account,
            "The account to act on; operators need it for what is in one.",
        )
    )
    if takes_key(handler):
        key = {"type": "string", "minLength": 1, "maxLength": MAX_KEY, "pattern": "^[!-~]+$"}
        text = "Makes it safe to send this again: it is carried out once in 24 h."
        found.append(_parameter(IDEMPOTENCY_HEADER, "header", key, text))
    elif _is_of_one(path, method, handler):
        text = "Entity tags, or *: only if the present state is one of these."
        found.append(_parameter("If-Match", "header", TAGS, text))
        text = "Entity tags, or *: only if the present state is none of these."
        found.append(_parameter("If-None-Match", "header", TAGS, text))
    if handler.opt.get(STREAM):
        number = {"type": "string", "pattern": "^[0-9]{1,18}$"}
        found.append(_parameter(LAST_EVENT_ID, "header", number, "Resume after this event."))
    return found


def _parameter(
    name: str, where: str, schema: dict[str, Any], description: str = ""
) -> dict[str, Any]:
    text = {"description": description} if description else {}
    return {"name": name, "in": where, "schema": schema, **text}


PATH_SCHEMAS: dict[str, dict[str, Any]] = {
    "number": {"type": "integer", "minimum": 1, "maximum": MAX_NUMBER},
    "name": {"type": "string", "pattern": "^[^/]+$"},
}
"""Of path parameters that are no id."""


def _types_of(handler: HTTPRouteHandler) -> list[Any]:
    found = [] if handler.parsed_data_field is None else [handler.parsed_data_field.annotation]
    returned = handler.parsed_return_field.annotation
    if returned in (None, type(None)) or handler.opt.get(STREAM):
        return found
    return [*found, returned]


def _schema_of_foreign(type_: type) -> dict[str, Any]:
    """msgspec knows neither networks nor our own texts."""
    if issubclass(type_, UUID):
        return {"type": "string", "format": "uuid"}
    return {"type": "string", "title": type_.__name__}
