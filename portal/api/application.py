"""The whole API as one ASGI application, and how each failure becomes a problem."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Litestar, Request, Response, get
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.di import Provide
from litestar.exceptions import HTTPException, ValidationException
from litestar.handlers.base import BaseRouteHandler
from litestar.types import ASGIApp

from actors.store.interface import Invalid, StoreError
from portal.api import (
    accounts,
    authorizations,
    changes,
    clients,
    gateways,
    groups,
    memberships,
    policies,
    principals,
    relays,
    resources,
    sites,
    tokens,
)
from portal.api.authentication import PUBLIC, Authenticator, require_token
from portal.api.documentation import documentation_page, openapi_document
from portal.api.frontdoor import FrontDoor
from portal.api.office import Office, provide_caller, provide_desk, provide_office
from portal.api.openapi import describe
from portal.api.pagination import provide_page
from portal.api.problems import MEDIA_TYPE, FieldError, Problem, invalid, of_store, unavailable
from portal.api.requests import StrictBody
from portal.metrics import CallMetrics
from runtime.errors import CallError
from runtime.service import Health, get_logger

NOUNS = (
    accounts,
    principals,
    groups,
    memberships,
    sites,
    resources,
    policies,
    tokens,
    clients,
    gateways,
    relays,
    authorizations,
    changes,
)
PAGE_QUERY = ("limit", "cursor")

log = get_logger("portal.api")


class Alive(msgspec.Struct, frozen=True):
    """That the API answers at all."""

    status: str = "ok"


class Ready(msgspec.Struct, frozen=True):
    """Whether the node can serve; why not is told at the observability port alone."""

    ready: bool


@get("/healthz", opt={PUBLIC: True})
async def healthz() -> Alive:
    """Tell that the API is alive."""
    return Alive()


@get("/readyz", opt={PUBLIC: True})
async def readyz(request: Request[Any, Any, Any]) -> Ready:
    """Tell whether the portal can serve; 503 if not."""
    health: Health | None = request.app.state.health
    if health is not None and not health.ready:
        raise unavailable("The portal is not ready. Try again shortly.")
    return Ready(ready=True)


def create_api(
    office: Office,
    *,
    authenticator: Authenticator | None = None,
    health: Health | None = None,
    metrics: CallMetrics | None = None,
) -> FrontDoor:
    """The API over this office, with its limits and its request log in front.

    Without `health` it is always ready; without `metrics` calls are not counted.
    """
    authenticator = authenticator or Authenticator(office.store, office.clock)
    app = Litestar(
        route_handlers=[
            *(noun.router for noun in NOUNS),
            healthz,
            readyz,
            documentation_page,
            openapi_document,
        ],
        dependencies={
            "office": Provide(provide_office),
            "caller": Provide(provide_caller),
            "desk": Provide(provide_desk),
            "page": Provide(provide_page),
        },
        guards=[require_token, require_form],
        dto=StrictBody,
        return_dto=None,
        exception_handlers={Exception: answer_failure},
        openapi_config=None,
        logging_config=None,
        state=State({"office": office, "authenticator": authenticator, "health": health}),
    )
    description = app.state.description = describe(app)
    asgi: ASGIApp = app
    return FrontDoor(
        asgi,
        description=description,
        clock=office.clock,
        randomness=office.randomness,
        metrics=metrics,
    )


async def require_form(
    connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler
) -> None:
    """Litestar guard. Raises Problem: 415 for a body that is not announced as JSON, 422 for a
    query parameter that the route does not know."""
    if handler.parsed_data_field is not None:
        media_type, _, _ = connection.headers.get("content-type", "").partition(";")
        if media_type.strip().lower() != "application/json":
            raise Problem(
                415, "not_json", "Send the body as JSON, with `Content-Type: application/json`."
            )
    known = set(handler.opt.get("query", {}))
    if "page" in handler.parsed_fn_signature.parameters:
        known.update(PAGE_QUERY)
    unknown = sorted(set(connection.query_params) - known)
    if unknown:
        raise invalid(
            *(FieldError(field=name[:100], message="is no parameter here") for name in unknown)
        )


def answer_failure(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Whatever ended a call, as a problem. What is not foreseen is logged, and told to nobody."""
    problem = _problem_of(error)
    request_id = str(request.scope["state"].get("request_id", ""))
    if problem.status >= 500 and problem.status != 503:
        log.error("call_failed", request_id=request_id, exc_info=error)
    return Response(
        problem.body(request_id),
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers=problem.headers,
    )


def _problem_of(error: Exception) -> Problem:
    match error:
        case Problem():
            return error
        case Invalid():
            return invalid(FieldError(field=error.field, message="cannot be taken"))
        case StoreError():
            return of_store(error)
        case CallError():
            return unavailable("The account is busy just now. Try again shortly.")
        case ValidationException():
            return invalid(FieldError(field="", message="a JSON body is required"))
        case HTTPException(status_code=404):
            return Problem(404, "no_such_path", "Nothing is at this path; see /v1/docs.")
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("allow", "")
            return Problem(
                405,
                "method_not_allowed",
                f"This path takes {allowed}.",
                headers={"Allow": allowed},
            )
        case HTTPException() if 400 <= error.status_code < 500:
            return Problem(error.status_code, "bad_request", "The call cannot be understood.")
        case _:
            return Problem(
                500, "internal_error", "A defect of the portal. Its log has the request id."
            )
