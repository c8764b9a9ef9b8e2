"""The policy engine: one pure function of a snapshot of the account, a request and an instant.

How it works. A `Snapshot` holds the entities of one account with the indices that decisions
read, and is carried forward by the numbered changes of the account's feed. `decide` takes the
*candidates* (the policies of the resource whose group the client's principal is in), asks each
for the properties that it sees violated, and allows if one of them sees none. The default is to
deny: no candidate, no access; what is unknown (a zone, a network, an address, a country, a
provider, a fact) is violated.

Properties that do not depend on a policy (`OF_EVERYBODY`, and `OF_A_SESSION` where a token is
looked at) are violated for all candidates alike. The names in a denial are in the order of
`PROPERTIES`; values (addresses, times, networks) never appear in it.

Expiry of one policy: the least of the end of its time window, its own `expires_at`, its lease
counted from the instant, and the token's `expires_at`. Of several policies that allow, the one
with the latest expiry wins; between equals the one with the lowest id.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Literal
from uuid import UUID

import attrs

from actors.model import Client, Fact, Principal, Resource, Token
from actors.policy.conditions import Facts, in_networks, parse_address
from actors.policy.snapshot import CompiledPolicy, Gap, Snapshot

__all__ = [
    "OF_A_SESSION",
    "OF_EVERYBODY",
    "PROPERTIES",
    "Allowed",
    "CompiledPolicy",
    "Decision",
    "Denied",
    "Gap",
    "Request",
    "Snapshot",
    "allowed_until",
    "candidates",
    "common_violations",
    "decide",
    "expiry_by",
    "facts_of",
    "in_networks",
    "parse_address",
    "principal_of",
    "sign_in_violation",
    "token_expiry",
    "visible_resources",
]

OF_EVERYBODY = ("account_disabled", "client", "principal", "principal_disabled")
"""Violated whatever a policy says. `client` is asked of a device, `principal` of anybody else."""
OF_A_SESSION = ("token", "token_expired", "token_source", "auth_provider_disabled", "identity")
"""Violated whatever a policy says, and asked where a client names the token of its session. It is
good from its `allowed_sources` (`token_source`), and, if it was made by a sign-in, while that
provider is enabled and knows the principal by an identity."""
PROPERTIES = (
    *OF_EVERYBODY,
    *OF_A_SESSION,
    "policy",
    "policy_disabled",
    "policy_expired",
    "remote_ip_location_region",
    "remote_ip",
    "auth_provider",
    "current_time",
    "client_verified",
    "client_posture",
)
"""Every name that a denial can hold, in the order in which it holds them."""

_RANK = {name: rank for rank, name in enumerate(PROPERTIES)}


@attrs.frozen(kw_only=True)
class Request:
    """Who asks for what. `remote_ip` is the validated path of the channel, None if unknown.

    A live request names a client and the token of its session, and nothing below: the country
    comes from the snapshot's regions, the provider from the token, what is known of the device
    from the client. The explainer may name a principal instead: then the question is about any
    device of it, and no token is looked at. Whoever asks "what if" may state these facts; what is
    stated counts in the place of what is known.
    """

    client_id: UUID | None = None
    principal_id: UUID | None = None
    resource_id: UUID
    remote_ip: str | None
    token_id: UUID | None = None
    region: str | None = None
    auth_provider_id: UUID | None = None
    client_verified: bool | None = None
    posture: tuple[Fact, ...] | None = None


@attrs.frozen
class Allowed:
    """The request is allowed by this policy until `expires_at` (aware; the lease counted in)."""

    policy_id: UUID
    expires_at: datetime


@attrs.frozen
class Denied:
    """The request is denied: `not_found` if the account has no such resource, else `forbidden`
    with every violated property over the candidate policies, in the order of `PROPERTIES`."""

    reason: Literal["forbidden", "not_found"]
    violated: tuple[str, ...] = ()


Decision = Allowed | Denied


def decide(snapshot: Snapshot, request: Request, instant: datetime) -> Decision:
    """Allow with a policy and an expiry, or deny with every violated property.

    `instant` is aware. The answer holds until `expires_at`, as long as nothing that it depends on
    changes: the account, the client, its principal, token and address, the group, the policy, and
    the snapshot's regions.
    """
    if snapshot.account is None or request.resource_id.int not in snapshot.resources.by_key:
        return Denied("not_found")
    client, principal, token = _subject(snapshot, request)
    common = _common(snapshot, request, principal, token, instant)
    if principal is None:
        return Denied("forbidden", _ordered(common))
    policies = snapshot.policies_for(principal, request.resource_id)
    if not policies:
        return Denied("forbidden", _ordered([*common, "policy"]))
    token_expires_at = None if token is None else token.expires_at
    facts: Facts | None = None
    best: CompiledPolicy | None = None
    best_expires_at = instant
    violated = common
    for policy in policies:
        if not policy.plain:
            facts = facts or _facts(snapshot, request, client, token, instant)
            names = policy.violated(facts)
            if names:
                violated = violated + names
                continue
        if common:
            continue
        expires_at = policy.expiry(instant, token_expires_at)
        if (
            best is None
            or expires_at > best_expires_at
            or (expires_at == best_expires_at and policy.id < best.id)
        ):
            best, best_expires_at = policy, expires_at
    if best is not None:
        return Allowed(best.id, best_expires_at)
    return Denied("forbidden", _ordered(violated))


def expiry_by(
    snapshot: Snapshot, request: Request, policy_id: UUID, instant: datetime
) -> datetime | None:
    """When access by this policy alone ends, or None if it does not allow the request."""
    for policy in _allowing(snapshot, request, instant):
        if policy.id == policy_id:
            return policy.expiry(instant, token_expiry(snapshot, request))
    return None


def allowed_until(
    snapshot: Snapshot, request: Request, instant: datetime, limit: datetime
) -> datetime | None:
    """Until when one policy keeps on allowing the request by renewal, so that leases do not count;
    `limit` if it does so until then. None if none allows it."""
    token_expires_at = token_expiry(snapshot, request)
    if token_expires_at is not None and token_expires_at < limit:
        limit = token_expires_at
    ends = [policy.end(instant, limit) for policy in _allowing(snapshot, request, instant)]
    return max(ends, default=None)


def candidates(
    snapshot: Snapshot, principal: Principal, resource_id: UUID
) -> frozenset[CompiledPolicy]:
    """The policies that could give a resource to a principal: none if it, the account or the
    policy is disabled, all others of its groups whatever their conditions and expiry."""
    if snapshot.account is None or snapshot.account.disabled or principal.disabled:
        return frozenset()
    if resource_id not in snapshot.resources:
        return frozenset()
    return frozenset(
        policy
        for policy in snapshot.policies_for(principal, resource_id)
        if not policy.policy.disabled
    )


def common_violations(snapshot: Snapshot, request: Request, instant: datetime) -> list[str]:
    """The violated properties of a request that do not depend on any policy."""
    _, principal, token = _subject(snapshot, request)
    return _common(snapshot, request, principal, token, instant)


def facts_of(snapshot: Snapshot, request: Request, instant: datetime) -> Facts:
    """What the conditions of policies are asked about."""
    client, _, token = _subject(snapshot, request)
    return _facts(snapshot, request, client, token, instant)


def principal_of(snapshot: Snapshot, request: Request) -> Principal | None:
    """Whose request it is."""
    return _subject(snapshot, request)[1]


def sign_in_violation(
    snapshot: Snapshot, token: Token
) -> Literal["auth_provider_disabled", "identity"] | None:
    """What the sign-in by which a client's token was made lacks now; None if nothing does, or the
    token was made by an administrator."""
    provider_id, principal_id = token.auth_provider_id, token.principal_id
    if provider_id is None:
        return None
    provider = snapshot.auth_providers.by_key.get(provider_id.int)
    if provider is None or provider.disabled:
        return "auth_provider_disabled"
    if principal_id is None or not snapshot.has_identity(principal_id, provider_id):
        return "identity"
    return None


def token_expiry(snapshot: Snapshot, request: Request) -> datetime | None:
    """When the token of the request ends, if it names one that does."""
    token = _subject(snapshot, request)[2]
    return None if token is None else token.expires_at


def visible_resources(snapshot: Snapshot, client_id: UUID) -> dict[UUID, Resource]:
    """The resources that a client is told of, by id.

    Those that an enabled policy gives to a group of its principal. Conditions and expiry do not
    count: they are named when access is asked for, since they may hold again a minute later.
    """
    client = snapshot.clients.get(client_id)
    principal = None if client is None else snapshot.principals.get(client.principal_id)
    if snapshot.account is None or snapshot.account.disabled:
        return {}
    if principal is None or principal.disabled:
        return {}
    resource_ids = {
        compiled.policy.resource_id
        for compiled in snapshot.policies_of(principal)
        if not compiled.policy.disabled
    }
    return {id: snapshot.resources[id] for id in resource_ids}


# --- helpers ---


def _allowing(snapshot: Snapshot, request: Request, instant: datetime) -> list[CompiledPolicy]:
    """The policies that allow a request."""
    client, principal, token = _subject(snapshot, request)
    if principal is None or _common(snapshot, request, principal, token, instant):
        return []
    facts = _facts(snapshot, request, client, token, instant)
    policies = snapshot.policies_for(principal, request.resource_id)
    return [policy for policy in policies if not policy.violated(facts)]


def _subject(
    snapshot: Snapshot, request: Request
) -> tuple[Client | None, Principal | None, Token | None]:
    """The device, whose it is, and the token of its session, as far as they are known."""
    principals = snapshot.principals.by_key
    if request.principal_id is not None:
        return None, principals.get(request.principal_id.int), None
    client = token = principal = None
    if request.token_id is not None:
        token = snapshot.tokens.by_key.get(request.token_id.int)
    if request.client_id is not None:
        client = snapshot.clients.by_key.get(request.client_id.int)
    if client is not None:
        principal = principals.get(client.principal_id.int)
    return client, principal, token


def _common(
    snapshot: Snapshot,
    request: Request,
    principal: Principal | None,
    token: Token | None,
    instant: datetime,
) -> list[str]:
    violated: list[str] = []
    if snapshot.account is None or snapshot.account.disabled:
        violated.append("account_disabled")
    if principal is None:
        violated.append("client" if request.principal_id is None else "principal")
    elif principal.disabled:
        violated.append("principal_disabled")
    if request.principal_id is not None:
        return violated
    if (
        token is None
        or token.kind != "client"
        or (principal is not None and token.principal_id != principal.id)
    ):
        violated.append("token")
        return violated
    if token.expires_at is not None and token.expires_at <= instant:
        violated.append("token_expired")
    if token.allowed_sources and not (
        request.remote_ip is not None and in_networks(token.allowed_sources, request.remote_ip)
    ):
        violated.append("token_source")
    if token.auth_provider_id is not None:
        lacking = sign_in_violation(snapshot, token)
        if lacking is not None:
            violated.append(lacking)
    return violated


def _facts(
    snapshot: Snapshot,
    request: Request,
    client: Client | None,
    token: Token | None,
    instant: datetime,
) -> Facts:
    provider_id, verified, posture = (
        request.auth_provider_id,
        request.client_verified,
        request.posture,
    )
    if provider_id is None and token is not None:
        provider_id = token.auth_provider_id
    if client is not None:
        verified = client.verified if verified is None else verified
        posture = client.posture if posture is None else posture
    return Facts(
        instant,
        remote_ip=request.remote_ip,
        region=request.region,
        regions=snapshot.regions,
        auth_provider_id=provider_id,
        client_verified=verified,
        posture=posture or (),
    )


def _ordered(names: Collection[str]) -> tuple[str, ...]:
    if len(names) < 2:
        return tuple(names)
    return tuple(sorted(set(names), key=_RANK.__getitem__))
