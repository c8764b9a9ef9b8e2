"""RFC 9457 problems: the one shape of every answer that is not a success.

`code` is for programs and never changes its meaning; `detail` tells a person what to do; `errors`
names the fields that were refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import cast

import msgspec

from actors.model import EntityKind
from actors.policy.proposals import FailedTest
from actors.store.interface import (
    Conflict,
    InvalidReference,
    LastOperator,
    NotFound,
    Outdated,
    StorageFull,
    StoreError,
    TooMany,
    Unavailable,
)
from actors.store.rules import UNIQUE

MEDIA_TYPE = "application/problem+json"
MAX_FIELD_ERRORS = 100
FULL_RETRY_S = 10


class FieldError(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with one field; `field` is a path such as `filters[0].port_start`."""

    field: str
    message: str


class ProblemBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The JSON of a problem (RFC 9457). `request_id` finds the call in the portal's log."""

    status: int
    title: str
    code: str
    detail: str
    errors: tuple[FieldError, ...] = ()
    request_id: str = ""


class Problem(Exception):
    """Ends a call with this status, code and advice. Never holds a secret."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = tuple(errors[:MAX_FIELD_ERRORS])
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> bytes:
        """The answer's JSON."""
        return msgspec.json.encode(
            ProblemBody(
                status=self.status,
                title=HTTPStatus(self.status).phrase,
                code=self.code,
                detail=self.detail,
                errors=self.errors,
                request_id=request_id,
            )
        )


def not_found(what: str) -> Problem:
    """404: it does not exist, or belongs to somebody else; the answer does not tell which."""
    return Problem(
        404, "not_found", f"There is no such {what} here. Check the id, and whose token you use."
    )


def invalid(*errors: FieldError) -> Problem:
    """422: the body is JSON, but these fields cannot be taken."""
    listed = "; ".join(f"{error.field or 'body'}: {error.message}" for error in errors[:3])
    return Problem(422, "invalid_fields", f"Correct and send again: {listed}.", errors=errors)


def too_many(code: str, detail: str, wait_ns: int) -> Problem:
    """429, with the time to wait rounded up to whole seconds."""
    seconds = max(1, -(-wait_ns // 10**9))
    return Problem(429, code, detail, headers={"Retry-After": str(seconds)})


def unavailable(detail: str, *, retry_after_s: int = 2) -> Problem:
    """503: nothing is wrong with the call; it should be made again."""
    return Problem(503, "unavailable", detail, headers={"Retry-After": str(retry_after_s)})


def too_complex() -> Problem:
    """422: the answer would cost more than one call may."""
    return Problem(
        422,
        "too_complex",
        "Working this out would take too long. Have fewer policies on one resource, fewer policy"
        " tests of it or simpler conditions; or ask about less.",
    )


def limit_reached(kind: str, limit: int) -> Problem:
    """409: the account has as many of a kind as it may."""
    name = kind.replace("_", " ")
    return Problem(
        409,
        "limit_reached",
        f"This account may have {limit:,} of the kind {name}, and has them. Delete some, or have an"
        " operator raise the limit.",
        errors=(FieldError(field=kind, message=f"has a limit of {limit}"),),
    )


def tests_failed(failing: Sequence[FailedTest]) -> Problem:
    """409: policy tests of the account say that this must not be."""
    names = ", ".join(repr(each.test.name) for each in failing[:3])
    return Problem(
        409,
        "policy_test_failed",
        f"Nothing was changed: policy tests would fail ({names}). Change the tests first, if they"
        " are wrong.",
        errors=[
            FieldError(
                field=f"policy_tests.{each.test.id}",
                message=f"{each.test.name}: would not be {each.test.expected}",
            )
            for each in failing
        ],
    )


def of_store(error: StoreError) -> Problem:
    """What the store refused, as a problem."""
    if isinstance(error, NotFound):
        return not_found("entity")
    if isinstance(error, Conflict):
        unique = UNIQUE.get(cast("EntityKind", error.kind), ())
        names = next((each for each in unique if each[-1] == error.field), (error.field,))
        told = " and ".join(name.removesuffix("_id").replace("_", " ") for name in names)
        message = f"another {error.kind.replace('_', ' ')} has this {told} already"
        return Problem(
            409,
            "conflict",
            f"Choose another value: {message}.",
            errors=(FieldError(field=error.field, message=message),),
        )
    if isinstance(error, InvalidReference):
        message = "names nothing in this account"
        return Problem(
            404,
            "not_found",
            f"{error.field} {message}. Check the id.",
            errors=(FieldError(field=error.field, message=message),),
        )
    if isinstance(error, TooMany):
        name = error.kind.replace("_", " ")
        of = error.field.removesuffix("_id").replace("_", " ")
        message = f"has a limit of {error.limit} of the kind {name}"
        return Problem(
            409,
            "limit_reached",
            f"One {of} {message}, and would have more. Delete some, or put several into one.",
            errors=(FieldError(field=error.field, message=message),),
        )
    if isinstance(error, Outdated):
        return Problem(
            409, "changed_meanwhile", "Somebody else changed this just now. Look, and try again."
        )
    if isinstance(error, LastOperator):
        return Problem(
            409,
            "last_operator_token",
            "This is the last token of an operator. Make another one before it is deleted: see"
            " docs/api.md.",
        )
    if isinstance(error, StorageFull):
        return Problem(
            503,
            "storage_full",
            "The database has no room to write. Tell its operator; what only reads goes on.",
            headers={"Retry-After": str(FULL_RETRY_S)},
        )
    if isinstance(error, Unavailable):
        return unavailable("The database cannot be reached just now. Try again shortly.")
    return unavailable("The account is moving to another node. Try again shortly.")
