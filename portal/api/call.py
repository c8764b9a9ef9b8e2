"""One call apart from what it is about: the conditions it makes, and the headers of its answer.

It lives in the `state` of the ASGI scope, where the front door puts it and finds it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

import attrs
from litestar.connection import ASGIConnection

from portal.api.idempotency import Claim
from portal.api.preconditions import Preconditions, tag_of

STATE_KEY: Final = "call"


@attrs.define(kw_only=True)
class Call:
    """What the guards found out about a call, and what its answer will say besides its body.

    `headers` go into the answer whatever it is, `validators` into a success alone; `at_end` is
    called once the answer is sent, or the caller gone. `account_id` is the account that the call is
    about, `code` that of the problem that it ended with, `creates` the noun of what it makes.
    """

    request_id: str
    method: str
    account_id: UUID | None = None
    code: str = ""
    creates: str = ""
    body_hash: bytes = attrs.field(default=b"", repr=False)
    preconditions: Preconditions = Preconditions()
    claim: Claim | None = None
    headers: dict[str, str] = attrs.Factory(dict)
    validators: dict[str, str] = attrs.Factory(dict)
    at_end: list[Callable[[], None]] = attrs.Factory(list)

    def show(self, entity: object, live: object = None) -> None:
        """The answer will show this entity, as it is stored, and `live` beside it. Raises Problem
        412, NotModified where a read has a precondition that does not hold."""
        tag = tag_of(entity, live)
        if self.method in ("GET", "HEAD"):
            self.preconditions.check(tag, is_read=True)
        self.validators["ETag"] = f'"{tag}"'
        if self.creates:
            self.validators["Location"] = self.location_of(getattr(entity, "id", ""))

    def location_of(self, id: object) -> str:
        """The path of what was made (RFC 9110, section 10.2.2)."""
        return f"/v1/{self.creates}/{id}"

    def check(self, entity: object) -> None:
        """Before a write. Raises Problem 412 unless the present entity is what the caller knows."""
        self.preconditions.check(tag_of(entity), is_read=False)

    @property
    def is_conditional(self) -> bool:
        """Whether a write has to be of the very state that was checked."""
        return self.preconditions != Preconditions()


def call_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Call:
    """The call that the front door made for this request."""
    found: Call = connection.scope["state"][STATE_KEY]
    return found
