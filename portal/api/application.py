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

from actors.policy.effort import Exhausted
from actors.store.interface import Invalid, StoreError
from portal.api import (
    accounts,
    auth_providers,
    authorizations,
    changes,
    clients,
    declaration,
    directories,
    events,
    gateways,
    groups,
    identities,
    logs,
    memberships,
    nodes,
    policies,
    policy_tests,
    principals,
    questions,
    relays,
    resources,
    sites,
    tokens,
)
from portal.api.authentication import PUBLIC, Authenticator, caller_of, require_token
from portal.api.call import call_of
from portal.api.documentation import documentation_page, openapi_document
from portal.api.feeds import Feeds
from portal.api.filters import FILTERS, provide_filters
from portal.api.frontdoor import FrontDoor
from portal.api.idempotency import (
    REPLAY_HEADER,
    IdempotencyKeys,
    Replayed,
    claim_of,
    is_creation,
    takes_key,
)
from portal.api.journal import RequestJournal
from portal.api.office import (
    ACCOUNT_HEADER,
    Office,
    provide_call,
    provide_caller,
    provide_desk,
    provide_office,
)
from portal.api.openapi import describe
from portal.api.pagination import provide_page
from portal.api.preconditions import NotModified, Preconditions
from portal.api.problems import (
    MEDIA_TYPE,
    FieldError,
    Problem,
    invalid,
    of_store,
    too_complex,
    unavailable,
)
from portal.api.requests import StrictBody
from portal.api.scopes import NOUN, require_scope
from portal.metrics import CallMetrics
from runtime.errors import CallError
from runtime.service import Health, get_logger

NOUNS = (
    accounts,
    principals,
    groups,
    memberships,
    identities,
    auth_providers,
    directories,
    sites,
    resources,
    policies,
    questions,
    policy_tests,
    tokens,
    clients,
    gateways,
    relays,
    nodes,
    authorizations,
    changes,
    logs,
    events,
    declaration,
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
    feeds = Feeds(office.store, office.clock, office.live, authenticator)
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
            "call": Provide(provide_call),
            "desk": Provide(provide_desk),
            "filters": Provide(provide_filters),
            "page": Provide(provide_page),
        },
        guards=[require_token, require_scope, require_form, require_sense],
        dto=StrictBody,
        return_dto=None,
        exception_handlers={
            Exception: answer_failure,
            NotModified: answer_not_modified,
            Replayed: answer_again,
        },
        openapi_config=None,
        logging_config=None,
        state=State(
            {
                "office": office,
                "authenticator": authenticator,
                "feeds": feeds,
                "idempotency": IdempotencyKeys(office.store, office.clock),
                "health": health,
            }
        ),
    )
    description = app.state.description = describe(app)
    asgi: ASGIApp = app
    return FrontDoor(
        asgi,
        description=description,
        feeds=feeds,
        journal=RequestJournal(office.store, office.clock),
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
    known = set(handler.opt.get(FILTERS, {}))
    if "page" in handler.parsed_fn_signature.parameters:
        known.update(PAGE_QUERY)
    unknown = sorted(set(connection.query_params) - known)
    if unknown:
        raise invalid(
            *(FieldError(field=name[:100], message="is no parameter here") for name in unknown)
        )


async def require_sense(
    connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler
) -> None:
    """Litestar guard: takes note of the headers by which a call makes conditions. Raises Problem;
    Replayed for what was carried out before."""
    if handler.opt.get(PUBLIC):
        return
    call = call_of(connection)
    call.preconditions = Preconditions.of(connection.headers)
    if not takes_key(handler):
        return
    if is_creation(handler):
        call.creates = handler.opt[NOUN]
    caller = caller_of(connection)
    account = connection.headers.get(ACCOUNT_HEADER, str(caller.account_id))
    claim = claim_of(connection, caller.token_id, account, call.body_hash)
    if claim is not None:
        keys: IdempotencyKeys = connection.app.state.idempotency
        await keys.claim(claim)
        call.claim = claim
        call.at_end.append(lambda: keys.release(claim))


def answer_not_modified(request: Request[Any, Any, Any], found: NotModified) -> Response[None]:
    """The caller has what it asks for."""
    return Response(None, status_code=304, headers={"ETag": f'"{found.tag}"'})


def answer_again(request: Request[Any, Any, Any], replayed: Replayed) -> Response[bytes]:
    """The answer that the same call had before."""
    body, call = replayed.answer.body, call_of(request)
    headers = {REPLAY_HEADER: "true"}
    if call.creates:
        headers["Location"] = call.location_of(msgspec.json.decode(body)["id"])
    return Response(
        body,
        status_code=replayed.answer.status,
        media_type="application/json",
        headers=headers,
    )


def answer_failure(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Whatever ended a call, as a problem. What is not foreseen is logged, and told to nobody."""
    problem = _problem_of(error)
    call = call_of(request)
    call.code, request_id = problem.code, call.request_id
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
        case Exhausted():
            return too_complex()
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
