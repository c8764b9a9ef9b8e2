"""The account of a scenario, as real entities in the store, and what an admin changes in it.

Every entity goes through `Store.apply`, as the API's own mutations do. Names are those of the file;
a policy, membership or user that a fault adds later is left out at first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

import attrs
import msgspec

from actors.model import (
    Account,
    Conditions,
    Entity,
    EntityKind,
    Group,
    Membership,
    Policy,
    Principal,
    Resource,
    Site,
    Token,
)
from actors.policy.conditions import Regions
from actors.policy.engine import Allowed, Request, decide
from actors.policy.snapshot import Snapshot
from actors.store.codec import read_value
from actors.store.interface import MAX_MUTATIONS, Mutation, Put, Remove
from channel.credentials import TokenKind, encode_token, hash_token
from channel.messages import Filter
from runtime.clock import NS_PER_S
from runtime.randomness import uuid7
from runtime.secret import Secret
from simulations.hosts.database import Database, at_once
from simulations.hosts.inner import packed
from simulations.net.world import World
from simulations.scenario import schema
from simulations.scenario.units import duration_ns

EVERYONE: Final = "everyone"
ADMIN: Final = "admin"
PIN: Final = bytes(32)
"""Stands for the pin of the installation's CA: TLS is left out of the world."""


class AccountBook:
    """The account and everything in it by the names of the file. `addresses` are those of
    resources."""

    def __init__(
        self,
        world: World,
        database: Database,
        scenario: schema.Scenario,
        *,
        portal: str,
        addresses: dict[str, str],
        regions: Regions,
    ) -> None:
        self._regions = regions
        self._world = world
        self._database = database
        self._portal = portal
        self._names_by_id: dict[UUID, str] = {}
        self._users = {user.name: user for user in scenario.account.users}
        self._policies = {policy.name: policy for policy in scenario.account.policies}
        self._resources = {resource.name: resource for resource in scenario.account.resources}
        self._secrets: dict[tuple[str, str], Secret] = {}
        self._ids: dict[tuple[str, str], UUID] = {}
        self.addresses = addresses
        self.account_id = self.id("account", scenario.name)
        self.user_by_client = {client.name: client.user for client in scenario.clients}
        self._snapshot: tuple[int, Snapshot] | None = None
        later = added_later(scenario)
        self._apply([Put(self._account(scenario.name))])
        self._put(self._group(name) for name in (EVERYONE, *_groups(scenario)))
        self._put(self._site(name) for name in scenario.account.sites)
        self._put(self._resource(each) for each in scenario.account.resources)
        self._put(self._principal(user) for user in scenario.account.users)
        self._put(
            self._membership(user.name, group)
            for user in scenario.account.users
            for group in user.groups
            if group != EVERYONE and ("membership", f"{user.name}/{group}") not in later
        )
        self._put(
            self._policy(policy)
            for policy in scenario.account.policies
            if ("policy", policy.name) not in later
        )
        self._put(self._token("client", user.name) for user in scenario.account.users)
        self._put(self._token("gateway", site) for site in scenario.account.sites)
        at_once(database.store.put_installation_token(self._token("relay", "relays")))

    # --- who is who ------------------------------------------------------------------------------

    def id(self, kind: str, name: str) -> UUID:
        """The id of an entity; drawn when it is asked for first."""
        found = self._ids.get((kind, name))
        if found is None:
            found = uuid7(self._world.clock, self._world.randomness(f"id {kind} {name}"))
            self._ids[kind, name] = found
            self._names_by_id[found] = name
        return found

    def known_id(self, kind: str, name: str) -> UUID | None:
        """The id of an entity that is there; None if it was removed."""
        return self._ids.get((kind, name))

    def name(self, id: UUID) -> str:
        """The name in the file of what has this id; the id itself if it is not known."""
        return self._names_by_id.get(id) or str(id)

    def knows_device(self, kind: str, name: str, id: UUID) -> bool:
        """The portal gave a client or gateway this id. Whether that is news."""
        is_news = self._ids.get((kind, name)) != id
        self._ids[kind, name] = id
        self._names_by_id[id] = name
        return is_news

    def token(self, kind: TokenKind, name: str) -> Secret:
        """The token of a user (`client`), a site (`gateway`), or of the relays."""
        return self._secrets[kind, name]

    def packed_addresses(self, resource: str) -> tuple[bytes, ...]:
        """The address of a resource, packed; none for one that is a prefix."""
        address = self.addresses[resource]
        return () if "/" in address else (packed(address),)

    def all_packed_addresses(self) -> tuple[bytes, ...]:
        """The addresses of all resources that are no prefixes, packed."""
        return tuple(each for name in self.addresses for each in self.packed_addresses(name))

    # --- who may what ----------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The account as it is now, as the policy engine reads it."""
        number = at_once(self._database.store.last_number(self.account_id))
        if self._snapshot is None or self._snapshot[0] != number:
            contents = at_once(self._database.store.contents(self.account_id))
            self._snapshot = (number, Snapshot.of(contents, self._regions))
        return self._snapshot[1]

    def may(self, client: str, resource: str, remote_ip: str | None) -> bool:
        """What the policy engine says of a client's user now. A device that the portal does not
        know yet is judged by its user alone."""
        snapshot = self.snapshot()
        user_id = self._ids.get(("principal", self.user_by_client[client]))
        client_id = self._ids.get(("client", client))
        if user_id is None or user_id.int not in snapshot.principals.by_key:
            return False
        known = client_id is not None and client_id.int in snapshot.clients.by_key
        token_id = self._ids.get(("token client", self.user_by_client[client]))
        if token_id is None or token_id.int not in snapshot.tokens.by_key:
            return False
        request = Request(
            client_id=client_id if known else None,
            principal_id=None if known else user_id,
            token_id=token_id if known else None,
            resource_id=self.id("resource", resource),
            remote_ip=remote_ip,
        )
        return isinstance(decide(snapshot, request, self._world.clock.utc_now()), Allowed)

    # --- what an admin does ----------------------------------------------------------------------

    def change(self, change: schema.Change, subject: Sequence[str]) -> str:
        """Carry out a `Change`; what was done, in words. Raises ValueError for a subject that is
        not there."""
        first = subject[0] if subject else ""
        match change:
            case "add_policy" | "enable_policy":
                self._put([self._policy(attrs.evolve(self._policies[first], disabled=False))])
            case "disable_policy":
                self._put([self._policy(attrs.evolve(self._policies[first], disabled=True))])
            case "remove_policy":
                self._remove("policy", "policy", first)
            case "add_membership":
                self._put([self._membership(*subject)])
            case "remove_membership":
                self._remove("membership", "membership", "/".join(subject))
            case "remove_user":
                self._remove("principal", "principal", first)
            case "disable_user":
                user = self._principal(self._users[first])
                self._put([attrs.evolve(user, disabled=True)])
            case "delete_token":
                self._remove("token", "token client", self._user_of(first))
            case "remove_resource":
                self._remove("resource", "resource", first)
        return f"{change} {' '.join(subject)}"

    def remove_users(self, names: Sequence[str]) -> None:
        """As a directory that lost them does."""
        self._apply(
            [
                Remove("principal", self._ids.pop(("principal", name)))
                for name in names
                if ("principal", name) in self._ids
            ]
        )

    def users(self) -> tuple[str, ...]:
        """Of the file, in its order."""
        return tuple(self._users)

    # --- entities --------------------------------------------------------------------------------

    def _account(self, name: str) -> Account:
        return Account(
            id=self.account_id, name=name, slug="simulation", created_at=self._world.clock.utc_now()
        )

    def _group(self, name: str) -> Group:
        kind: Any = "everyone" if name == EVERYONE else "static"
        return Group(**self._common("group", name), kind=kind, name=name)

    def _site(self, name: str) -> Site:
        return Site(**self._common("site", name), name=name)

    def _principal(self, user: schema.User) -> Principal:
        return Principal(**self._common("principal", user.name), name=user.name)

    def _membership(self, user: str, group: str) -> Membership:
        return Membership(
            **self._common("membership", f"{user}/{group}"),
            group_id=self.id("group", group),
            principal_id=self.id("principal", user),
        )

    def _resource(self, written: schema.Resource) -> Resource:
        address = self.addresses[written.name]
        return Resource(
            **self._common("resource", written.name),
            name=written.name,
            kind="cidr" if "/" in address else "ip",
            address=address,
            site_ids=tuple(self.id("site", site) for site in written.sites),
            filters=tuple(msgspec.convert(each, Filter) for each in written.filters),
        )

    def _policy(self, written: schema.Policy) -> Policy:
        common = self._common("policy", written.name)
        fields: dict[str, Any] = {}
        if written.lease:
            fields["lease_s"] = max(1, duration_ns(written.lease) // NS_PER_S)
        if written.expires_in:
            lasts = timedelta(microseconds=duration_ns(written.expires_in) // 1_000)
            fields["expires_at"] = common["created_at"] + lasts
        return Policy(
            **common,
            group_id=self.id("group", written.group),
            resource_id=self.id("resource", written.resource),
            conditions=msgspec.convert(
                _named(written.conditions), Conditions, strict=False, dec_hook=read_value
            ),
            disabled=written.disabled,
            **fields,
        )

    def _token(self, kind: TokenKind, name: str) -> Token:
        key = f"token {kind}"
        id = self.id(key, name)
        secret = self._world.randomness(f"{key} {name}").bytes(32)
        self._secrets[kind, name] = encode_token(kind, id, secret, self._portal, PIN)
        return Token(
            id=id,
            account_id=None if kind == "relay" else self.account_id,
            kind=kind,
            name=name,
            hash=hash_token(kind, id, secret),
            principal_id=self.id("principal", name) if kind == "client" else None,
            site_id=self.id("site", name) if kind == "gateway" else None,
            created_at=self._world.clock.utc_now(),
        )

    def _common(self, kind: str, name: str) -> dict[str, Any]:
        return {
            "id": self.id(kind, name),
            "account_id": self.account_id,
            "created_at": self._world.clock.utc_now(),
        }

    def _user_of(self, client: str) -> str:
        user = self.user_by_client.get(client)
        if user is None:
            raise ValueError(f"there is no client {client!r}")
        return user

    def _remove(self, kind: EntityKind, key: str, name: str) -> None:
        id = self._ids.pop((key, name), None)
        if id is None:
            raise ValueError(f"there is no {key} {name!r}")
        self._apply([Remove(kind, id)])

    def _put(self, entities: Iterable[Entity]) -> None:
        self._apply([Put(entity) for entity in entities])

    def _apply(self, mutations: list[Mutation]) -> None:
        at = self._world.clock.utc_now()
        store = self._database.store
        for first in range(0, len(mutations), MAX_MUTATIONS):
            some = mutations[first : first + MAX_MUTATIONS]
            at_once(store.apply(self.account_id, some, who=ADMIN, at=at))


def _groups(scenario: schema.Scenario) -> tuple[str, ...]:
    """Every group that is named anywhere, but for that of everyone."""
    names = [group for user in scenario.account.users for group in user.groups]
    names += [policy.group for policy in scenario.account.policies]
    names += [fault.subject[1] for fault in scenario.faults if fault.change == "add_membership"]
    return tuple(name for name in dict.fromkeys(names) if name != EVERYONE)


def added_later(scenario: schema.Scenario) -> frozenset[tuple[str, str]]:
    """What the first change of a policy or membership adds, and so is not there before."""
    first: dict[tuple[str, str], bool] = {}
    for fault in sorted(scenario.faults, key=lambda each: duration_ns(each.at)):
        if fault.change in ("add_policy", "remove_policy", "disable_policy", "enable_policy"):
            first.setdefault(("policy", fault.subject[0]), fault.change == "add_policy")
        elif fault.change in ("add_membership", "remove_membership"):
            key = ("membership", "/".join(fault.subject))
            first.setdefault(key, fault.change == "add_membership")
    return frozenset(key for key, added in first.items() if added)


def _named(conditions: dict[str, Any]) -> dict[str, Any]:
    """As the model has them: each condition says which property it is of."""
    return {
        name: {"property": name, **value} if isinstance(value, dict) else value
        for name, value in conditions.items()
    }
