"""Orders to gateways, carried by way of a third node.

A request lives where its client is, the gateway elsewhere, the account perhaps on a third node. If
the link between the first two is lost, the third still reaches both: the request has the order
carried from there. Each order has a courier of its own, so that none waits for another.
"""

from __future__ import annotations

import attrs

from actors.messages import CarryOrder
from runtime.actor import LATER, Actor, ActorError, Caller, Down, Overloaded, Raise, handles

MAX_ORDERS = 10_000
"""Orders under way at a time."""


@attrs.frozen
class _Begin:
    pass


class Couriers(Actor):
    """One on each node, registered as `COURIERS`. Answers a `CarryOrder` as the gateway's actor
    does: by its `Ack`, or by what the call raised."""

    mailbox_limit = 20_000

    def __init__(self) -> None:
        self._under_way = 0

    @handles(CarryOrder)
    def _on_carry(self, message: CarryOrder) -> object:
        caller = self.context.caller
        if caller is None:
            return None
        if self._under_way >= MAX_ORDERS:
            return Raise(Overloaded("couriers", MAX_ORDERS))
        self.monitor(self.spawn(_Courier(message, caller), label="courier"))
        self._under_way += 1
        return LATER

    @handles(Down)
    def _on_down(self, message: Down) -> None:
        self._under_way -= 1


class _Courier(Actor):
    def __init__(self, carry: CarryOrder, caller: Caller) -> None:
        self._carry = carry
        self._caller = caller

    def started(self) -> None:
        self.cast(self.context.ref, _Begin())

    @handles(_Begin)
    async def _on_begin(self, message: _Begin) -> None:
        carry = self._carry
        try:
            answer = await self.call(carry.gateway, carry.order, carry.deadline_ns)
        except ActorError as error:
            answer = Raise(error)
        self.reply(self._caller, answer)
        self.stop()
