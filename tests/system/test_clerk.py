"""The clerk over PostgreSQL: what actors tell it is in the logs a moment later."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest
import trio

from actors.clerk import Clerk
from actors.logs import Seen, SessionLog
from actors.messages import ClerkStatisticsRequest, DeviceSeen, LogRows
from actors.model import Account, Client, Principal, Token
from actors.store.interface import Put
from actors.store.postgres import Logins, PostgresStore
from channel.messages import IpText
from runtime.clock import SystemClock
from runtime.host import TrioHost
from runtime.randomness import SystemRandomness, uuid7
from runtime.scheduler import Scheduler

pytestmark = pytest.mark.system

AT = datetime(2026, 3, 20, tzinfo=UTC)
ACME = Account(id=UUID(int=0xA), name="Acme", slug="acme", created_at=AT)
ANN = Principal(id=UUID(int=1), account_id=ACME.id, name="Ann", created_at=AT)
TOKEN = Token(
    id=UUID(int=2),
    account_id=ACME.id,
    kind="client",
    name="t",
    hash=bytes(32),
    principal_id=ANN.id,
    created_at=AT,
)
LAPTOP = Client(
    id=UUID(int=3),
    account_id=ACME.id,
    principal_id=ANN.id,
    token_id=TOKEN.id,
    device_key=bytes(32),
    name="laptop",
    ipv4=ACME.range_ipv4[7],
    ipv6=ACME.range_ipv6[7],
    created_at=AT,
)
ROWS = 2_500


async def test_rows_and_sightings_are_written_in_batches(database: Logins) -> None:
    clock, randomness = SystemClock(), SystemRandomness()
    scheduler = Scheduler(clock=clock, randomness=randomness)
    host = TrioHost(scheduler)
    remote = IpText("192.0.2.1")
    async with PostgresStore.open(database, migrated=True) as store, trio.open_nursery() as nursery:
        puts = [Put(ACME), Put(ANN), Put(TOKEN), Put(LAPTOP)]
        await store.apply(ACME.id, puts, who="test", at=AT)
        await nursery.start(host.run)
        clerk = scheduler.spawn(Clerk(store))
        rows = [
            SessionLog(
                id=uuid7(clock, randomness),
                account_id=account_id,
                at=AT,
                agent="client",
                event="connected",
                device_id=LAPTOP.id,
                token_id=TOKEN.id,
                remote_ip=remote,
            )
            for account_id in [*[ACME.id] * ROWS, UUID(int=0xDEAD)]
        ]
        host.cast(clerk, LogRows(tuple(rows)))
        for minute in range(3):
            seen = Seen(device_id=LAPTOP.id, at=AT.replace(minute=minute), remote_ip=remote)
            host.cast(clerk, DeviceSeen(account_id=ACME.id, token_id=TOKEN.id, seen=seen))
        with trio.fail_after(60):
            while True:
                statistics = await host.call(clerk, ClerkStatisticsRequest())
                if not statistics.rows_waiting and not statistics.devices_waiting:
                    break
                await trio.sleep(0.05)
        assert (statistics.rows_written, statistics.rows_lost) == (ROWS, 1)
        kept = await store.logs(ACME.id, "session", limit=1_000)
        assert {row.id for row in kept} <= {row.id for row in rows}
        assert len(kept) == 1_000
        assert (await store.seen(ACME.id, [LAPTOP.id]))[LAPTOP.id].at == AT.replace(minute=2)
        assert await store.last_used(ACME.id, [TOKEN.id]) == {TOKEN.id: AT.replace(minute=2)}
        nursery.cancel_scope.cancel()
