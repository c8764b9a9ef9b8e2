"""What PostgreSQL keeps of an entity is the entity: rows and back, without a server."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from typing import Any
from uuid import UUID

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.model import ENTITIES, Entity, EntityKind, Relay
from actors.store.postgres.mapping import RELAYS, TABLES, Table
from channel.messages import IpText, SocketAddress
from tests.store_machine import ACCOUNT_IDS, START, entities_by_kind

ELSEWHERE = timezone(timedelta(hours=-3, minutes=-30))


def as_read(value: Any) -> Any:
    """A parameter as the server gives it back: instants in another zone, addresses as such."""
    if isinstance(value, datetime):
        return value.astimezone(ELSEWHERE)
    if isinstance(value, IpText):
        return ip_address(str(value))
    return value


def through(table: Table[Any], value: Any) -> Any:
    return table.value([as_read(each) for each in table.row(value)])


@pytest.mark.parametrize("kind", ENTITIES)
def test_every_entity_comes_back_from_its_row(kind: EntityKind) -> None:
    @given(st.sampled_from(ACCOUNT_IDS).flatmap(lambda id: entities_by_kind(id)[kind]))
    def comes_back(entity: Entity) -> None:
        assert through(TABLES[kind], entity) == entity

    comes_back()


@given(
    st.lists(
        st.builds(
            SocketAddress,
            address=st.ip_addresses().map(lambda address: IpText(str(address))),
            port=st.integers(1, 65_535),
            transport=st.sampled_from(["udp", "tcp", "tls", "quic"]),
        ),
        max_size=4,
    )
)
def test_the_addresses_of_a_relay_come_back_from_its_row(addresses: list[SocketAddress]) -> None:
    relay = Relay(
        id=UUID(int=1),
        token_id=UUID(int=2),
        name="r",
        addresses=tuple(addresses),
        last_seen_at=START,
    )
    assert through(RELAYS, relay) == relay


@pytest.mark.parametrize("kind", ENTITIES)
def test_an_update_ends_with_what_names_the_row(kind: EntityKind) -> None:
    @given(st.sampled_from(ACCOUNT_IDS).flatmap(lambda id: entities_by_kind(id)[kind]))
    def names_its_row(entity: Entity) -> None:
        parameters = TABLES[kind].changed_row(entity)
        names = [name for name in ("account_id", "id") if hasattr(entity, name)]
        assert parameters[-len(names) :] == [getattr(entity, name) for name in names]
        assert len(parameters) == len(attrs.fields(type(entity)))

    names_its_row()
