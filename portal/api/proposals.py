"""Changes that are proposed, not made: calls of this API as data, worked out by the very functions
that would carry them out, at a desk that writes nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar, cast
from uuid import UUID

import attrs
import msgspec
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta

from actors.model import KIND_OF, Entity, EntityKind
from actors.store.interface import Invalid, Mutation, Put, Remove
from actors.store.validity import validate
from portal.api import groups, memberships, policies, policy_tests, principals, resources, sites
from portal.api.call import Call
from portal.api.misfits import misfits
from portal.api.office import Desk
from portal.api.problems import FieldError, Problem, invalid, not_found
from portal.api.requests import Body

E = TypeVar("E", bound=Entity)

MAX_PROPOSED: Final = 100
Action = Literal["create", "update", "delete"]
Noun = Literal[
    "principals", "groups", "memberships", "sites", "resources", "policies", "policy_tests"
]


class Proposed(Body, frozen=True, kw_only=True):
    """One call that is not made: `fields` is its body. `id` names what is updated or deleted; with
    a creation it may be given, so that later ones can refer to it."""

    action: Action
    noun: Noun
    id: UUID | None = None
    fields: dict[str, Any] = {}


Proposals = Annotated[
    tuple[Proposed, ...],
    Meta(max_length=MAX_PROPOSED, description="Carried out in this order, all or none."),
]


@attrs.frozen
class _Calls:
    """The routes of a noun; None for what it does not have."""

    create: HTTPRouteHandler
    update: HTTPRouteHandler | None
    delete: HTTPRouteHandler


_CALLS: Final[Mapping[Noun, _Calls]] = {
    "principals": _Calls(
        principals.create_principal, principals.update_principal, principals.delete_principal
    ),
    "groups": _Calls(groups.create_group, groups.update_group, groups.delete_group),
    "memberships": _Calls(memberships.create_membership, None, memberships.delete_membership),
    "sites": _Calls(sites.create_site, sites.update_site, sites.delete_site),
    "resources": _Calls(
        resources.create_resource, resources.update_resource, resources.delete_resource
    ),
    "policies": _Calls(policies.create_policy, policies.update_policy, policies.delete_policy),
    "policy_tests": _Calls(
        policy_tests.create_policy_test,
        policy_tests.update_policy_test,
        policy_tests.delete_policy_test,
    ),
}


@attrs.frozen(kw_only=True)
class DraftDesk(Desk):
    """A desk at which nothing is written: what would be, is gathered in `mutations`."""

    mutations: list[Mutation] = attrs.Factory(list)
    drafts: dict[UUID, Entity | None] = attrs.Factory(dict)
    next_ids: list[UUID] = attrs.Factory(list)

    def new_id(self) -> UUID:
        return self.next_ids.pop() if self.next_ids else super().new_id()

    async def get(self, entity_type: type[E], id: UUID) -> E:
        if id not in self.drafts:
            return await super().get(entity_type, id)
        draft = self.drafts[id]
        if not isinstance(draft, entity_type):
            raise not_found(KIND_OF[cast("type[Entity]", entity_type)])
        return draft

    async def apply(self, *mutations: Mutation, shown: object = None) -> None:
        for mutation in mutations:
            match mutation:
                case Put(entity=entity):
                    _check(entity)
                    self.drafts[entity.id] = entity
                case Remove(kind=kind, id=id):
                    await self.get(_TYPES[kind], id)
                    self.drafts[id] = None
        self.mutations.extend(mutations)


async def mutations_of(desk: Desk, proposals: Sequence[Proposed]) -> tuple[Mutation, ...]:
    """What the proposed calls would write. Raises the Problem of the first that would fail, with
    its place in the list."""
    draft = DraftDesk(
        office=desk.office,
        caller=desk.caller,
        account=desk.account,
        call=Call(request_id=desk.call.request_id, method="POST"),
    )
    for place, each in enumerate(proposals):
        try:
            await _carry_out(draft, each)
        except Problem as problem:
            raise _at(problem, f"mutations[{place}]") from None
    return tuple(draft.mutations)


async def _carry_out(desk: DraftDesk, proposed: Proposed) -> None:
    calls = _CALLS[proposed.noun]
    handler = {"create": calls.create, "update": calls.update, "delete": calls.delete}[
        proposed.action
    ]
    if handler is None:
        raise invalid(FieldError(field="action", message=f"{proposed.noun} are never updated"))
    run: Callable[..., Awaitable[Any]] = handler.fn
    arguments: dict[str, Any] = {"desk": desk}
    if proposed.action != "create":
        if proposed.id is None:
            raise invalid(FieldError(field="id", message="is required"))
        arguments["id"] = proposed.id
    elif proposed.id is not None:
        desk.next_ids.append(proposed.id)
    field = handler.parsed_data_field
    if field is not None:
        try:
            arguments["data"] = msgspec.convert(proposed.fields, field.annotation)
        except msgspec.ValidationError:
            found = misfits(proposed.fields, field.annotation, within="fields")
            raise invalid(*found) from None
    elif proposed.fields:
        raise invalid(FieldError(field="fields", message="has no place in a deletion"))
    await run(**arguments)


def _check(entity: Entity) -> None:
    """Raises Problem 422 for what the store would refuse of the entity by itself."""
    try:
        validate(entity)
    except Invalid as error:
        raise invalid(FieldError(field=error.field, message="cannot be taken")) from None


def _at(problem: Problem, where: str) -> Problem:
    problem.errors = tuple(
        FieldError(field=f"{where}.{each.field}".rstrip("."), message=each.message)
        for each in problem.errors or (FieldError(field="", message=problem.code),)
    )
    return problem


_TYPES: Final[dict[EntityKind, type[Entity]]] = {kind: type_ for type_, kind in KIND_OF.items()}
