"""One attachment on its way: find the account's actor, and learn the truth for an agent from it.

It lives beside the owner of the agent's channel, so that this one waits for nobody. It casts
`Attached` or `NotAttached` to it, and ends. An account that moves, or whose owner has just ended,
is looked for again; one whose node no link reaches (while others may: the two are parted) is left
after NO_WAY_NS, and the agent sent to that node's own door.
"""

from __future__ import annotations

from uuid import UUID

import attrs

from actors.enrolment import occupied, refusal, sent_on
from actors.messages import (
    AttachClient,
    Attached,
    AttachGateway,
    ClientTruth,
    GatewayTruth,
    NotAttached,
    Occupied,
    Probe,
)
from actors.services import Services
from actors.store.interface import StoreError
from channel.messages import Disconnect
from runtime.actor import Actor, ActorError, ActorRef, CallError, Crashed, Dead, handles
from runtime.cluster.keyed import MOVED, NoWay

ATTACH_DEADLINE_NS = 10 * 10**9
LOCATE_NS = 4 * 10**9
"""For one of the attempts to find where the account lives: all of them outlast a node's lease."""
NO_WAY_NS = 2 * 10**9
"""After so long without a link to the account's node, and up to NO_WAY_SPREAD_NS more, an agent is
sent there. (A node that is dead has lost its keys by then: a silent link is given up as late as
its lease.)"""
NO_WAY_SPREAD_NS = 10**9
MAX_ATTEMPTS = 6
PAUSE_NS = 50 * 10**6
"""The first pause before an account actor that ended is looked for again; it doubles."""


@attrs.frozen
class _Begin:
    pass


class Attaching(Actor):
    """See the module. `ask` names the owner of the channel, to which the outcome is told."""

    def __init__(
        self,
        services: Services,
        *,
        owner: ActorRef,
        account_id: UUID,
        ask: AttachClient | AttachGateway,
    ) -> None:
        self._services = services
        self._owner = owner
        self._account_id = account_id
        self._ask = attrs.evolve(ask, owner=owner)

    def started(self) -> None:
        self.cast(self.context.ref, _Begin())

    @handles(_Begin)
    async def _on_begin(self, message: _Begin) -> None:
        self.cast(self._owner, await self._carry_through())
        self.stop()

    async def _carry_through(self) -> Attached | NotAttached:
        randomness = self._services.randomness
        accounts = self._services.accounts
        no_way_ns = NO_WAY_NS + randomness.integer(NO_WAY_SPREAD_NS)
        pause_ns = PAUSE_NS
        for _ in range(MAX_ATTEMPTS):
            try:
                account = await accounts.locate(
                    self, self._account_id, deadline_ns=LOCATE_NS, no_way_ns=no_way_ns
                )
                answer = await self.call(account, self._ask, ATTACH_DEADLINE_NS)
            except ActorError as error:
                parting = await self._parting(error)
                if parting is not None:
                    return NotAttached(parting)
                await self.sleep(pause_ns + randomness.integer(pause_ns))
                pause_ns *= 2
                continue
            if isinstance(answer, Occupied):
                if await self._is_alive(answer.owner):
                    return NotAttached(occupied(randomness))
                assert isinstance(self._ask, AttachGateway)
                self._ask = attrs.evolve(self._ask, replaces=answer.owner)
                continue
            if isinstance(answer, Disconnect):
                return NotAttached(answer)
            assert isinstance(answer, ClientTruth | GatewayTruth)
            return Attached(account, self._ask.remote, answer)
        return NotAttached(refusal("unavailable", randomness=randomness))

    async def _parting(self, error: ActorError) -> Disconnect | None:
        """What to part with, where another attempt would end the same."""
        if isinstance(error, NoWay):
            door = self._services.door_of(error.node, self.context.now())
            return None if door is None else sent_on(door, self._services.randomness)
        did_not_come_up = isinstance(error, Dead | Crashed) and error.reason != MOVED
        if did_not_come_up and await self._is_token_gone():
            return refusal("invalid_token")
        return None

    async def _is_token_gone(self) -> bool:
        """It goes with its account, whose actor then does not come up."""
        try:
            token = await self.perform(self._services.store.find_token, self._ask.token_id)
        except StoreError:
            return False
        return token is None

    async def _is_alive(self, owner: ActorRef) -> bool:
        """Whether the agent at the other end of this owner's channel is heard in time."""
        try:
            await self.call(owner, Probe(), self._services.limits.probe_ns)
        except CallError:
            return False
        return True
