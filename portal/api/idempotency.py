"""Creations, and whole declarations, that may be sent again: the header `Idempotency-Key`.

A key belongs to the token that sends it, and is good for ANSWER_KEPT. The answer to a creation is
kept in the transaction that creates, so there is no moment at which one exists without the other.
Only successes are kept: what was refused did nothing, and may be tried again with the same key.
"""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import datetime
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

import attrs
import msgspec
from litestar.connection import ASGIConnection
from litestar.handlers import HTTPRouteHandler
from litestar.handlers.base import BaseRouteHandler

from actors.store.codec import to_json
from actors.store.interface import ANSWER_KEPT, MAX_KEY, Answer, Store
from portal.api.problems import FieldError, Problem, invalid
from runtime.clock import Clock

IDEMPOTENCY_HEADER: Final = "Idempotency-Key"
KEYED: Final = "takes a key"
"""The `opt` of a route that is no creation and takes a key all the same."""
REPLAY_HEADER: Final = "Idempotency-Replayed"
WITHHELD: Final = "The text of a token is shown once and never kept. If it was lost, make another."

_KEY = re.compile(rf"[!-~]{{1,{MAX_KEY}}}")


class Replayed(Exception):
    """This call was carried out before: its answer is to be given again."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.key)
        self.answer = answer


@attrs.frozen(kw_only=True)
class Claim:
    """The right to carry out the call of this key, and to keep its answer."""

    token_id: UUID
    key: str
    request_hash: bytes = attrs.field(repr=False)

    def answer(self, status: int, shown: object, at: datetime) -> Answer:
        """The record of an answer, without the text of a token that it may show."""
        body = to_json(shown)
        if getattr(shown, "token", None) is not None:
            body = msgspec.json.encode(
                msgspec.json.decode(body) | {"token": None, "token_withheld": WITHHELD}
            )
        return Answer(
            token_id=self.token_id,
            key=self.key,
            request_hash=self.request_hash,
            status=status,
            body=body,
            at=at,
        )

    def replay(self, answer: Answer) -> Exception:
        """What ends a call whose key has this answer already: Replayed, or Problem 422."""
        if answer.request_hash == self.request_hash:
            return Replayed(answer)
        return Problem(
            422,
            "idempotency_key_reused",
            "This key was used for another call. Take a new key for each.",
            errors=[FieldError(field=IDEMPOTENCY_HEADER, message="was used for another body")],
        )


class IdempotencyKeys:
    """Which keys are being worked on at this node."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._claimed: set[tuple[UUID, str]] = set()

    def __len__(self) -> int:
        return len(self._claimed)

    async def claim(self, claim: Claim) -> None:
        """Hold the key until `release`.

        Raises Replayed; Problem: 409 while another call has it, 422 if it was used otherwise.
        """
        name = (claim.token_id, claim.key)
        if name in self._claimed:
            raise Problem(
                409,
                "idempotency_in_progress",
                "A call with this key is being carried out. Ask again for its answer.",
                headers={"Retry-After": "1"},
            )
        self._claimed.add(name)
        try:
            found = await self._store.answer_of(claim.token_id, claim.key)
        except BaseException:
            self.release(claim)
            raise
        if found is not None and self._clock.utc_now() - found.at < ANSWER_KEPT:
            self.release(claim)
            raise claim.replay(found)

    def release(self, claim: Claim) -> None:
        """The call is over, whatever came of it."""
        self._claimed.discard((claim.token_id, claim.key))


def is_creation(handler: BaseRouteHandler) -> bool:
    """Whether a route makes something."""
    return isinstance(handler, HTTPRouteHandler) and (
        handler.http_methods == {"POST"} and handler.status_code == 201
    )


def takes_key(handler: BaseRouteHandler) -> bool:
    """Whether a route heeds IDEMPOTENCY_HEADER."""
    return is_creation(handler) or bool(handler.opt.get(KEYED))


def claim_of(
    connection: ASGIConnection[Any, Any, Any, Any],
    token_id: UUID,
    account: str,
    body_hash: bytes,
) -> Claim | None:
    """What the header of a creation claims. Raises Problem 422 for a key of another form."""
    key = connection.headers.get(IDEMPOTENCY_HEADER)
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        message = f"must be 1 to {MAX_KEY} printable ASCII characters without a space"
        raise invalid(FieldError(field=IDEMPOTENCY_HEADER, message=message))
    named = account
    with suppress(ValueError):
        named = str(UUID(account))
    request = "\n".join((connection.scope["method"], connection.scope["path"], named))  # type: ignore[typeddict-item]  # of HTTP alone
    return Claim(
        token_id=token_id,
        key=key,
        request_hash=sha256(
            request.encode("utf-8", "surrogateescape") + b"\n" + body_hash
        ).digest(),
    )
