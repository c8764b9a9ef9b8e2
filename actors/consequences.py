"""What a change of the account touches, and what becomes of a live authorisation: pure rules.

The table of docs/control-plane.md is this file in words. `Touched` errs on the side of looking
once more: to look at an authorisation that nothing happened to changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final
from uuid import UUID

import attrs

from actors import model
from actors.model import Authorization, Change, EntityKind
from actors.policy.engine import Decision, Denied, Request, Snapshot, decide, expiry_by
from channel import messages

QUIET: Final[dict[EntityKind, frozenset[str]]] = {
    "account": frozenset({"name", "slug", "limits", "retention"}),
    "principal": frozenset({"role", "name", "email"}),
    "auth_provider": frozenset({
        "kind", "name", "issuer", "client_id", "client_secret", "context", "client_session_s",
        "portal_session_s",
    }),
    "directory": frozenset({
        "kind", "name", "credentials", "disabled", "synced_at", "last_error",
    }),
    "identity": frozenset({"issuer", "subject"}),
    "group": frozenset({"name", "directory_id", "external_id"}),
    "site": frozenset({"name", "kind"}),
    "policy": frozenset({"description"}),
    "policy_test": frozenset(field.name for field in attrs.fields(model.PolicyTest)),
    "token": frozenset({"name", "scopes", "max_uses", "approves_devices"}),
    "client": frozenset({"name"}),
    "gateway": frozenset({"name"}),
}  # fmt: skip
"""Fields whose change has no effect on anybody who is connected. `created_at` is one everywhere."""

_RANGES = frozenset({"range_ipv4", "range_ipv6"})
_NAMES = frozenset({"names_ipv4", "names_ipv6", "resolver_ipv4", "search_domain", "dns_upstreams"})
_PLACE = frozenset({"address", "kind", "ip_stack"})
_GIFT = frozenset({"group_id", "resource_id", "disabled"})
_TOLD = frozenset({"name", "filters"})
_IDENTITY_OF_DEVICE = frozenset({"ipv4", "ipv6", "device_key"})


@attrs.define
class Touched:
    """Ids of what a batch of changes touches. Who is connected by a token, as a principal or as a
    device of these may have lost the right to be."""

    everything: bool = False
    principals: set[UUID] = attrs.Factory(set)
    policies: set[UUID] = attrs.Factory(set)
    resources: set[UUID] = attrs.Factory(set)
    """Those that may have lost sites, or are gone."""
    tokens: set[UUID] = attrs.Factory(set)
    auth_providers: set[UUID] = attrs.Factory(set)
    clients: set[UUID] = attrs.Factory(set)
    gateways: set[UUID] = attrs.Factory(set)
    rebuilt: set[UUID] = attrs.Factory(set)
    """Resources whose address, kind or IP stack is another now: nothing granted for them holds."""
    updated: set[UUID] = attrs.Factory(set)
    """Resources that gateways have to be told of again (filters, name)."""
    renewed_tokens: set[UUID] = attrs.Factory(set)
    """Tokens that have another secret: who came by the old one has to show the new one."""
    renewed_devices: set[UUID] = attrs.Factory(set)
    """Devices with another tunnel address or key: they have to come anew."""
    ranges: bool = False
    """The account's tunnel ranges are others: nothing that stands fits any more."""
    config: bool = False
    """What clients are told of the account is another."""
    seen: set[UUID] = attrs.Factory(set)
    """Resources that those who see them have to be told of."""
    given: dict[UUID, set[UUID]] = attrs.Factory(dict)
    """Resources that may have come or gone for the members of a group, by group."""
    appeared: set[UUID] = attrs.Factory(set)
    """Resources that anybody may see now, since agents can be told of them."""

    @classmethod
    def by(cls, changes: Iterable[Change]) -> Touched:
        touched = cls()
        for change in changes:
            touched._add(change, _differing(change))
        return touched

    def _add(self, change: Change, fields: frozenset[str] | None) -> None:
        """`fields` differ, None: the entity was made or removed."""
        kind, id = change.kind, change.entity_id
        if fields is not None and not fields - QUIET.get(kind, frozenset()) - {"created_at"}:
            return
        for entity in (change.before, change.after):
            match entity:
                case model.Account():
                    self.everything = self.everything or fields is None or "disabled" in fields
                case model.Principal():
                    self.principals.add(id)
                case model.Identity() | model.Membership():
                    self.principals.add(entity.principal_id)
                case model.AuthProvider():
                    self.auth_providers.add(id)
                case model.Group():
                    self.everything = self.everything or fields is not None  # else in the cascade
                case model.Policy():
                    self.policies.add(id)
                    if fields is None or fields & _GIFT:
                        self.given.setdefault(entity.group_id, set()).add(entity.resource_id)
                case model.Resource():
                    self.resources.add(id)
                    self.seen.add(id)
                case model.Token():
                    self.tokens.add(id)
                case model.Client():
                    self.clients.add(id)
                case model.Gateway():
                    self.gateways.add(id)
                case _:
                    pass
        if fields is not None:
            self._add_differing(kind, id, fields)

    def _add_differing(self, kind: EntityKind, id: UUID, fields: frozenset[str]) -> None:
        if kind == "account":
            self.ranges = self.ranges or bool(fields & _RANGES)
            self.config = self.config or bool(fields & (_RANGES | _NAMES))
        elif kind == "resource":
            if fields & _PLACE:
                self.rebuilt.add(id)
                self.appeared.add(id)
            elif fields & _TOLD:
                self.updated.add(id)
        elif kind == "token" and fields & {"hash", "kind"}:
            self.renewed_tokens.add(id)
        elif kind in ("client", "gateway") and fields & _IDENTITY_OF_DEVICE:
            self.renewed_devices.add(id)


def _differing(change: Change) -> frozenset[str] | None:
    """The fields in which an entity is another now; None if it was made or removed."""
    before, after = change.before, change.after
    if before is None or after is None:
        return None
    names = (field.name for field in attrs.fields(type(before)))
    return frozenset(name for name in names if getattr(before, name) != getattr(after, name))


def is_rebuilt(change: Change) -> bool:
    """Whether a change makes a resource another: one that was granted before is not this one."""
    return change.kind == "resource" and bool((_differing(change) or frozenset()) & _PLACE)


def has_other_ranges(change: Change) -> bool:
    """Whether a change gives the account other tunnel ranges."""
    return change.kind == "account" and bool((_differing(change) or frozenset()) & _RANGES)


def rejudge(snapshot: Snapshot, authorization: Authorization, instant: datetime) -> Decision:
    """Decide a live authorisation anew: over all policies, from where its client was, and by
    whether its gateway may still carry it (a denial of that kind names `gateway`)."""
    decision = decide(snapshot, _request(authorization), instant)
    if isinstance(decision, Denied):
        return decision
    resource = snapshot.resources[authorization.resource_id]
    gateway = snapshot.gateways.get(authorization.gateway_id)
    if gateway is None or not gateway.approved or gateway.site_id not in resource.site_ids:
        return Denied("forbidden", ("gateway",))
    return decision


def stands(snapshot: Snapshot, authorization: Authorization, instant: datetime) -> bool:
    """Whether its own policy still gives it at least until its end, so that nothing has to be
    told. (A later end is the business of the next renewal.)"""
    expires_at = expiry_by(snapshot, _request(authorization), authorization.policy_id, instant)
    return expires_at is not None and expires_at >= authorization.expires_at


def _request(authorization: Authorization) -> Request:
    return Request(
        client_id=authorization.client_id,
        resource_id=authorization.resource_id,
        remote_ip=authorization.remote_ip,
        token_id=authorization.token_id,
    )


def end_reason(decision: Denied) -> str:
    """Why an authorisation ends: the violated properties, never values."""
    return ", ".join(decision.violated)[:255] or decision.reason


def as_told(resource: model.Resource) -> messages.Resource:
    """A resource as agents are told of it. A pool of devices, which no gateway carries, is not."""
    assert resource.kind != "device_pool"
    return messages.Resource(
        id=resource.id,
        name=resource.name,
        kind=resource.kind,
        address=resource.address,
        filters=resource.filters,
    )


def names_of(account: model.Account) -> messages.NameSettings:
    """How clients of the account are to have names resolved."""
    return messages.NameSettings(
        names_ipv4=account.names_ipv4,
        names_ipv6=account.names_ipv6,
        resolver_ipv4=account.resolver_ipv4,
        search_domain=account.search_domain,
        upstreams=tuple(
            messages.DnsUpstream(kind=each.kind, address=each.address)
            for each in account.dns_upstreams
        ),
    )
