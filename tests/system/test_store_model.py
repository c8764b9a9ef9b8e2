"""Both stores against the naive model, and against each other."""

from __future__ import annotations

import psycopg
import pytest

from actors.store.interface import Store
from actors.store.memory import MemoryStore
from actors.store.postgres import Logins, PostgresStore
from tests.store_machine import check_stores

pytestmark = pytest.mark.system

EVERYTHING = (
    "account, account_sequence, change, principal, auth_provider, directory, identity,"
    ' "group", membership, site, resource, resource_site, resource_device, policy, policy_test,'
    ' token, client, gateway, tunnel_address, "authorization", lease, relay, answer, seen,'
    " session_log, flow_log, request_log, encryption_key, node, node_sequence"
)


async def test_both_stores_do_what_the_model_says(database: Logins) -> None:
    with psycopg.connect(database.owner, autocommit=True) as owner:
        async with PostgresStore.open(database, migrated=True) as postgres:

            async def make_stores() -> list[Store]:
                owner.execute(f"TRUNCATE {EVERYTHING}")
                return [MemoryStore(), postgres]

            await check_stores(make_stores, examples=50, steps=40)
