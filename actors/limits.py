"""How many entities of each kind an account may have, and how many policies a resource."""

from __future__ import annotations

from typing import Final

from actors.model import Account, EntityKind

LIMITS: Final[dict[EntityKind, int]] = {
    "principal": 50_000,
    "group": 5_000,
    "membership": 500_000,
    "identity": 100_000,
    "auth_provider": 50,
    "directory": 20,
    "site": 1_000,
    "resource": 10_000,
    "policy": 20_000,
    "policy_test": 1_000,
    "token": 50_000,
    "client": 50_000,
    "gateway": 2_000,
}
"""The installation's limits. An account may have lower ones (`Account.limits`), never higher."""

LIMIT_FIELDS: Final[dict[EntityKind, str]] = {
    "principal": "principals",
    "group": "groups",
    "site": "sites",
    "resource": "resources",
    "policy": "policies",
    "token": "tokens",
    "client": "clients",
    "gateway": "gateways",
}
"""The fields of `AccountLimits` that count entities of a kind."""

POLICIES_PER_RESOURCE: Final = 200
"""A decision asks all policies of a resource that are for the principal's groups."""


def limit_of(account: Account, kind: EntityKind) -> int:
    """How many of a kind this account may have."""
    field = LIMIT_FIELDS.get(kind)
    own: int | None = None if field is None else getattr(account.limits, field)
    return LIMITS[kind] if own is None else min(own, LIMITS[kind])


def policies_per_resource(account: Account) -> int:
    """How many policies one resource of this account may have."""
    own = account.limits.policies_per_resource
    return POLICIES_PER_RESOURCE if own is None else min(own, POLICIES_PER_RESOURCE)
