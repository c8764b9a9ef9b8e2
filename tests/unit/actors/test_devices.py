"""The index of devices, held against a search among all of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address
from uuid import UUID

import attrs
import pytest

from actors.devices import Devices
from actors.model import Change, Client, Gateway

ACCOUNT, TOKEN = UUID(int=1), UUID(int=2)
AT = datetime(2026, 1, 1, tzinfo=UTC)
PRINCIPALS = [UUID(int=10 + n) for n in range(3)]
KEYS = [bytes([n]) * 32 for n in range(12)]
IPV4 = [IPv4Address(f"100.64.0.{n}") for n in range(1, 40)]
IPV6 = [IPv6Address(f"fd00::{n:x}") for n in range(1, 40)]


class Model:
    """Devices that are added, changed and removed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rows: dict[UUID, Client | Gateway] = {}
        self.devices = Devices()
        self.number = 0

    def step(self) -> None:
        if self.rows and self.rng.randrange(3) == 0:
            self.put(self.rng.choice(list(self.rows.values())), None)
        elif self.rows and self.rng.randrange(2):
            row = self.rng.choice(list(self.rows.values()))
            changes: dict[str, object] = {"ipv4": self.free(IPV4, "ipv4")}
            if isinstance(row, Client):
                changes["principal_id"] = self.rng.choice(PRINCIPALS)
            self.put(row, attrs.evolve(row, **changes))
        else:
            self.put(None, self.new())

    def free(self, among: Sequence[object], name: str) -> object:
        taken = {getattr(row, name) for row in self.rows.values()}
        return self.rng.choice([each for each in among if each not in taken])

    def new(self) -> Client | Gateway:
        kind = self.rng.choice((Client, Gateway))
        keys = {row.device_key for row in self.rows.values() if isinstance(row, kind)}
        common = {
            "id": UUID(int=1_000 + self.number),
            "account_id": ACCOUNT,
            "token_id": TOKEN,
            "device_key": self.rng.choice([key for key in KEYS if key not in keys]),
            "name": "device",
            "ipv4": self.free(IPV4, "ipv4"),
            "ipv6": self.free(IPV6, "ipv6"),
            "created_at": AT,
        }
        if kind is Client:
            return Client(principal_id=self.rng.choice(PRINCIPALS), **common)
        return Gateway(site_id=UUID(int=5), approved=True, **common)

    def put(self, before: Client | Gateway | None, after: Client | Gateway | None) -> None:
        row = after or before
        assert row is not None
        self.number += 1
        if after is None:
            del self.rows[row.id]
        else:
            self.rows[row.id] = after
        self.devices.follow(
            Change(
                number=self.number,
                account_id=ACCOUNT,
                kind="client" if isinstance(row, Client) else "gateway",
                entity_id=row.id,
                before=before,
                after=after,
                who="test",
                at=AT,
            )
        )

    def check(self, devices: Devices) -> None:
        rows = self.rows.values()
        for key in KEYS:
            clients = [row.id for row in rows if isinstance(row, Client) and row.device_key == key]
            gateways = [
                row.id for row in rows if isinstance(row, Gateway) and row.device_key == key
            ]
            assert devices.by_key("client", key) == (clients[0] if clients else None)
            assert devices.by_key("gateway", key) == (gateways[0] if gateways else None)
        for principal in PRINCIPALS:
            own = [row for row in rows if isinstance(row, Client) and row.principal_id == principal]
            assert devices.clients_of(principal) == len(own)
        taken = {row.ipv4 for row in rows} | {row.ipv6 for row in rows}
        assert {each for each in (*IPV4, *IPV6) if each in devices} == taken


@pytest.mark.parametrize("seed", range(10))
def test_what_was_followed_is_found_as_a_search_would_find_it(seed: int) -> None:
    model = Model(seed)
    for _ in range(60):
        if len(model.rows) < 10:
            model.step()
        else:
            model.put(model.rng.choice(list(model.rows.values())), None)
        model.check(model.devices)
        model.check(Devices(model.rows.values()))


def test_an_address_that_passes_from_one_to_another_stays_taken() -> None:
    """In whichever order the two changes come."""
    model = Model(1)
    one, other = (model.new() for _ in range(2))
    other = attrs.evolve(other, id=UUID(int=7), device_key=KEYS[-1], ipv6=IPV6[-1])
    model.put(None, one)
    model.put(None, attrs.evolve(other, ipv4=IPV4[-1]))
    model.put(attrs.evolve(other, ipv4=IPV4[-1]), attrs.evolve(other, ipv4=one.ipv4))
    model.put(one, None)
    assert one.ipv4 in model.devices
    assert IPV4[-1] not in model.devices
