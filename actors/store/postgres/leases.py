"""How leases work inside their transactions: of nodes (`join`, `renew`, ...) and of accounts.

Every comparison with a lease's end is made by the database's clock at the moment of the statement
(`clock_timestamp()`), after whatever lock had to be waited for.

Locks. A join locks the row of `node_sequence`, so joins follow one another; renewals, expulsions
and farewells touch one row of `node` each. An acquisition locks the account, then its lease, as the
removal of an account does, and last, if it takes over from a dead node, the row of that one. So
none of them waits in a circle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, LiteralString
from uuid import UUID

from actors.store.interface import Fenced, Full, Held, NotFound
from actors.store.postgres.connection import TrioConnection
from runtime.cluster.leases import NodeRow
from runtime.cluster.placement import MAX_NODES

_NS_PER_US = 1_000

SELECT_NODES: LiteralString = """
SELECT name, incarnation, link_address, door_address, version, draining,
    CASE WHEN expelled THEN 0 ELSE greatest(
        0, (extract(epoch FROM lease_until - clock_timestamp()) * 1000000000)::bigint
    ) END
FROM node ORDER BY name
"""
EXPEL: LiteralString = (
    "UPDATE node SET lease_until = '-infinity' WHERE name = %s AND incarnation = %s"
)
LEAVE: LiteralString = "DELETE FROM node WHERE name = %s AND incarnation = %s"
RELEASE: LiteralString = (
    "UPDATE lease SET owner = '' WHERE account_id = %s AND owner = %s AND incarnation = %s"
)

_NEXT_INCARNATION: LiteralString = """
INSERT INTO node_sequence (incarnation) VALUES (1)
ON CONFLICT (one) DO UPDATE SET incarnation = node_sequence.incarnation + 1
RETURNING incarnation
"""
_END_LIFE: LiteralString = "DELETE FROM node WHERE name = %s"
_COUNT: LiteralString = "SELECT count(*) FROM node"
_MAKE_ROOM: LiteralString = """
DELETE FROM node WHERE lease_until <= clock_timestamp() AND name = (
    SELECT name FROM node WHERE lease_until <= clock_timestamp() ORDER BY lease_until, name LIMIT 1
) RETURNING name
"""
_BEGIN_LIFE: LiteralString = """
INSERT INTO node (name, incarnation, link_address, door_address, version, lease_until)
VALUES (%s, %s, %s, %s, %s, clock_timestamp() + %s * interval '1 microsecond')
"""
_RENEW: LiteralString = """
UPDATE node SET draining = %s, lease_until = clock_timestamp() + %s * interval '1 microsecond'
WHERE name = %s AND incarnation = %s AND NOT expelled RETURNING name
"""
_INCARNATION: LiteralString = "SELECT incarnation FROM node WHERE name = %s"
_LOCK_ACCOUNT: LiteralString = "SELECT FROM account WHERE id = %s FOR NO KEY UPDATE"
_LOCK_LEASE: LiteralString = "SELECT owner, incarnation FROM lease WHERE account_id = %s FOR UPDATE"
_STANDING: LiteralString = """
SELECT name, incarnation, lease_until > clock_timestamp(), expelled
FROM node WHERE name IN (%s, %s)
"""
_EXPEL_EXPIRED: LiteralString = """
UPDATE node SET lease_until = '-infinity'
WHERE name = %s AND incarnation = %s AND lease_until <= clock_timestamp() RETURNING name
"""
_ACQUIRE: LiteralString = """
INSERT INTO lease (account_id, epoch, owner, incarnation) VALUES (%s, 1, %s, %s)
ON CONFLICT (account_id) DO UPDATE
SET epoch = lease.epoch + 1, owner = excluded.owner, incarnation = excluded.incarnation,
    acquired_at = clock_timestamp()
RETURNING epoch
"""


def node_of(row: Sequence[Any]) -> NodeRow:
    """What a row of `SELECT_NODES` holds."""
    name, incarnation, link_address, door_address, version, draining, remaining_ns = row
    return NodeRow(
        name=name,
        incarnation=incarnation,
        link_address=link_address,
        door_address=door_address,
        version=version,
        draining=draining,
        remaining_ns=remaining_ns,
    )


async def join(
    connection: TrioConnection,
    name: str,
    *,
    link_address: str,
    door_address: str,
    version: str,
    ttl_ns: int,
) -> int:
    """See `LeaseStore.join_node`."""
    ((incarnation,),) = await _fetch(connection, _NEXT_INCARNATION, [])
    await connection.execute(_END_LIFE, [name])
    ((count,),) = await _fetch(connection, _COUNT, [])
    if count >= MAX_NODES and not await _fetch(connection, _MAKE_ROOM, []):
        raise Full(f"{MAX_NODES} nodes live")
    await connection.execute(
        _BEGIN_LIFE,
        [name, incarnation, link_address, door_address, version, ttl_ns // _NS_PER_US],
    )
    return int(incarnation)


async def renew(
    connection: TrioConnection, name: str, incarnation: int, *, draining: bool, ttl_ns: int
) -> tuple[NodeRow, ...]:
    """See `LeaseStore.renew_node`."""
    parameters = [draining, ttl_ns // _NS_PER_US, name, incarnation]
    if not await _fetch(connection, _RENEW, parameters):
        rows = await _fetch(connection, _INCARNATION, [name])
        raise _is_over(name, incarnation, superseded=any(later > incarnation for (later,) in rows))
    return tuple(map(node_of, await _fetch(connection, SELECT_NODES, [])))


async def acquire(connection: TrioConnection, key: UUID, *, owner: str, incarnation: int) -> int:
    """See `LeaseStore.acquire`."""
    if not await _fetch(connection, _LOCK_ACCOUNT, [key]):
        raise NotFound(f"account {key}")
    leases = await _fetch(connection, _LOCK_LEASE, [key])  # waits for writes under way
    holder, held_by = leases[0] if leases else ("", 0)
    # A statement of its own, so that it sees what was committed while we waited.
    nodes = {
        name: (life, stands, expelled)
        for name, life, stands, expelled in await _fetch(connection, _STANDING, [owner, holder])
    }
    life, stands, expelled = nodes.get(owner, (0, False, False))
    if (life, stands) != (incarnation, True):
        raise _is_over(owner, incarnation, superseded=life > incarnation)
    life, stands, expelled = nodes.get(holder, (None, False, False))
    is_over = holder == owner or life != held_by or expelled
    # Else its row is locked from here on: it has renewed its lease before, and keeps the key.
    if not is_over and (stands or not await _fetch(connection, _EXPEL_EXPIRED, [holder, held_by])):
        raise Held(key, holder)
    ((epoch,),) = await _fetch(connection, _ACQUIRE, [key, owner, incarnation])
    return int(epoch)


def _is_over(name: str, incarnation: int, *, superseded: bool) -> Fenced:
    reason = "was superseded" if superseded else "has no lease"
    return Fenced(f"node {name}, incarnation {incarnation}, {reason}", superseded=superseded)


async def _fetch(
    connection: TrioConnection, query: LiteralString, parameters: Sequence[object]
) -> Sequence[tuple[Any, ...]]:
    return await (await connection.execute(query, parameters)).fetchall()
