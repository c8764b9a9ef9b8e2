"""What a token may do: scopes such as `sites:read`, `policies:write` (which includes reading) and
`*:write`. Each noun is declared once, by `noun`; the verb is the method's, unless a route says
otherwise by `opt={VERB: "read"}` (a question that is asked by POST).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from litestar import Router
from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from portal.api.problems import Problem

NOUN: Final = "noun"
VERB: Final = "verb"
EVERYTHING: Final = ("*:write",)

_declared: set[str] = set()


def noun(name: str, *handlers: BaseRouteHandler) -> Router:
    """The routes at `/v1/<name>`, for tokens with the scope of this noun."""
    _declared.add(name)
    return Router(f"/v1/{name}", route_handlers=handlers, tags=[name], opt={NOUN: name})


def scope_of(handler: BaseRouteHandler) -> str | None:
    """The scope that a route needs, None for what any token may do."""
    if NOUN not in handler.opt:
        return None
    methods: frozenset[str] = getattr(handler, "http_methods", frozenset())
    verb = handler.opt.get(VERB) or ("read" if methods <= {"GET", "HEAD"} else "write")
    return f"{handler.opt[NOUN]}:{verb}"


def allows(scopes: Iterable[str], needed: str) -> bool:
    """Whether one of the scopes covers the one that is needed (itself a scope, `*` included)."""
    noun_, _, verb = needed.partition(":")
    verbs = {verb, "write"}
    return any(
        held in verbs and name in {noun_, "*"}
        for name, _, held in (each.partition(":") for each in scopes)
    )


def unknown(scopes: Iterable[str]) -> list[str]:
    """Those of `scopes` that are of no noun, such as `site:write`."""
    return [each for each in scopes if each.partition(":")[0] not in _declared | {"*"}]


def exceeding(scopes: Iterable[str], held: Iterable[str]) -> list[str]:
    """Those of `scopes` that `held` does not cover."""
    own = tuple(held)
    return [each for each in scopes if not allows(own, each)]


async def require_scope(
    connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler
) -> None:
    """Litestar guard, after `require_token`. Raises Problem 403 (RFC 6750, section 3.1)."""
    needed = scope_of(handler)
    if needed is None or allows(connection.scope["state"]["caller"].scopes, needed):
        return
    raise missing(needed)


def missing(needed: str) -> Problem:
    """403: the token lacks this scope."""
    return Problem(
        403,
        "scope_missing",
        f"This token lacks the scope {needed}. Use one that has it.",
        headers={
            "WWW-Authenticate": f'Bearer realm="holloway", error="insufficient_scope",'
            f' scope="{needed}"'
        },
    )
