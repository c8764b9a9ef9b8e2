"""What a change of the account touches, and what becomes of a live authorisation: pure rules.

The table of docs/control-plane.md is this file in words. `Touched` errs on the side of looking
once more: to look at an authorisation that nothing happened to changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from uuid import UUID

import attrs

from actors import model
from actors.model import Authorization, Change
from actors.policy.engine import Decision, Denied, Request, Snapshot, decide, expiry_by
from channel import messages


@attrs.define
class Touched:
    """Ids of what a batch of changes touches."""

    everything: bool = False
    presences: bool = False
    """Whether a device may have lost its right to be connected."""
    principals: set[UUID] = attrs.Factory(set)
    groups: set[UUID] = attrs.Factory(set)
    resources: set[UUID] = attrs.Factory(set)
    tokens: set[UUID] = attrs.Factory(set)
    clients: set[UUID] = attrs.Factory(set)
    gateways: set[UUID] = attrs.Factory(set)
    rebuilt: set[UUID] = attrs.Factory(set)
    """Resources whose address, kind or site is another now: nothing granted for them holds."""
    updated: set[UUID] = attrs.Factory(set)
    """Resources that gateways and clients have to be told of again (filters, name)."""

    @classmethod
    def by(cls, changes: Iterable[Change]) -> Touched:
        touched = cls()
        for change in changes:
            touched._add(change)
        return touched

    def concerns(self, authorization: Authorization, snapshot: Snapshot) -> bool:
        """Whether an authorisation has to be decided anew."""
        if self.everything:
            return True
        if (
            authorization.client_id in self.clients
            or authorization.gateway_id in self.gateways
            or authorization.resource_id in self.resources
            or authorization.token_id in self.tokens
        ):
            return True
        if not self.principals:
            return False
        client = snapshot.clients.get(authorization.client_id)
        return client is None or client.principal_id in self.principals

    def concerns_view(self, client_id: UUID, visible: Collection[UUID], snapshot: Snapshot) -> bool:
        """Whether the resources that a connected client sees may be others now."""
        if self.everything or client_id in self.clients:
            return True
        client = snapshot.clients.get(client_id)
        principal = None if client is None else snapshot.principals.get(client.principal_id)
        if principal is None or principal.id in self.principals:
            return True
        return any(snapshot.is_member(principal, id) for id in self.groups) or any(
            id in visible for id in self.resources
        )

    def _add(self, change: Change) -> None:
        for entity in (change.before, change.after):
            match entity:
                case model.Account():
                    self.everything = self.presences = True
                case model.Principal():
                    self.principals.add(entity.id)
                    self.presences = True
                case model.Group():
                    self.everything = True
                case model.Membership():
                    self.principals.add(entity.principal_id)
                case model.Resource():
                    self.resources.add(entity.id)
                case model.Policy():
                    self.groups.add(entity.group_id)
                    self.resources.add(entity.resource_id)
                case model.Token():
                    self.tokens.add(entity.id)
                    self.presences = True
                case model.Client():
                    self.clients.add(entity.id)
                    self.presences = True
                case model.Gateway():
                    self.gateways.add(entity.id)
                    self.presences = True
                case _:
                    pass
        if is_rebuilt(change):
            self.rebuilt.add(change.entity_id)
        elif change.kind == "resource" and change.before and change.after:
            self.updated.add(change.entity_id)


def is_rebuilt(change: Change) -> bool:
    """Whether a change makes a resource lie somewhere else."""
    before, after = change.before, change.after
    if not isinstance(before, model.Resource) or not isinstance(after, model.Resource):
        return False
    return (before.address, before.kind, before.site_ids) != (
        after.address,
        after.kind,
        after.site_ids,
    )


def rejudge(snapshot: Snapshot, authorization: Authorization, instant: datetime) -> Decision:
    """Decide a live authorisation anew: over all policies, and by whether its gateway may still
    carry it (a denial of that kind names `gateway`)."""
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
