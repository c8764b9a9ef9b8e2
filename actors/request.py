"""One request for access on its way: ask the account, ask the gateway, tell the account.

It lives beside its session, so that neither the session nor the account actor waits for a
gateway. A gateway that does not acknowledge in time is left for the next one. When none is left,
those that were silent are asked once more, with more patience: they, or their nodes, may be busy.
After that, or after the whole deadline, the client is told `offline`.
"""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

import attrs

from actors.messages import (
    COURIERS,
    Acknowledge,
    CarryOrder,
    DecideAccess,
    Denial,
    FromOwner,
    GiveUp,
    Grant,
    IsAnswered,
    Stale,
)
from actors.services import Services
from channel.messages import Ack, AuthorizationDenied, DenialReason, RequestAuthorization
from runtime.actor import (
    Actor,
    ActorError,
    ActorRef,
    CallError,
    Crashed,
    Dead,
    NamedRef,
    NodeLost,
    Refused,
    TimedOut,
    Unreachable,
    handles,
)
from runtime.cluster.envelopes import Enclosed
from runtime.cluster.keyed import NotEntitled

RETRY_AFTER_NS = 2 * 10**9
ACCOUNT_ATTEMPTS = 3
ACCOUNT_PAUSE_NS = 200 * 10**6
GATEWAY_PAUSE_NS = 50 * 10**6
"""Until the account knows that a gateway's channel is another, or another's."""
GIVE_UP_DEADLINE_NS = 10**9


@attrs.frozen
class _Begin:
    pass


class AccessRequest(Actor):
    """Casts a `Denial` to its session, and ends. (A granted access the account actor tells.)"""

    def __init__(
        self,
        services: Services,
        *,
        session: ActorRef,
        account_id: UUID,
        client_id: UUID,
        number: int,
        request: RequestAuthorization,
    ) -> None:
        self._services = services
        self._session = session
        self._account_id = account_id
        self._ask = DecideAccess(client_id=client_id, number=number, request=request)
        self._refusals: set[str] = set()
        self._silent: set[UUID] = set()
        self._patience_ns = services.limits.gateway_answer_ns
        self._deadline_ns = 0

    def started(self) -> None:
        self.cast(self.context.ref, _Begin())

    @handles(_Begin)
    async def _on_begin(self, message: _Begin) -> None:
        answer = await self._carry_through()
        self.cast(self._session, Denial(self.context.ref, answer))
        self.stop()

    async def _carry_through(self) -> AuthorizationDenied | None:
        self._deadline_ns = self.context.now() + self._services.limits.request_deadline_ns
        while (left_ns := self._deadline_ns - self.context.now()) > 0:
            answer = await self._ask_account(self._ask, left_ns)
            if isinstance(answer, AuthorizationDenied):
                if answer.reason == "offline" and self._silent:
                    self._try_the_silent()
                    continue
                return self._verdict(answer)
            if not isinstance(answer, Grant):
                return self._denied("unavailable", retry_after_ns=RETRY_AFTER_NS)
            ack = await self._ask_gateway(answer, min(self._patience_ns, left_ns))
            if ack is None:
                continue
            done = Acknowledge(client_id=self._ask.client_id, grant=answer, ack=ack)
            told = await self._have_told(done)
            if told is None:
                return self._denied("unavailable", retry_after_ns=RETRY_AFTER_NS)
            if told:
                return None
        return self._denied("offline")

    async def _have_told(self, done: Acknowledge) -> bool | None:
        """Have the account tell the client, once more if the session did not heed it: that account
        actor has a successor by now. (What it said has come before its answer to us.)"""
        while True:
            told = await self._ask_account(done, self._services.limits.request_deadline_ns)
            if not isinstance(told, bool):
                return None
            if not told or await self._is_answered():
                return told
            if self.context.now() >= self._deadline_ns:
                return None
            await self.sleep(ACCOUNT_PAUSE_NS)

    async def _is_answered(self) -> bool:
        answered = False
        with suppress(CallError):  # it may still be looking for the account's new owner
            answered = await self.call(
                self._session,
                IsAnswered(self.context.ref),
                self._services.limits.request_deadline_ns,
            )
        return answered

    async def _ask_account(self, message: object, deadline_ns: int) -> object:
        """The answer of the account's actor, of the next one if it has just ended; or None."""
        accounts = self._services.accounts
        for _ in range(ACCOUNT_ATTEMPTS):
            try:
                return await accounts.call(self, self._account_id, message, deadline_ns)
            except (Crashed, Dead, NodeLost, NotEntitled, Refused):  # it is decided anew
                await self.sleep(ACCOUNT_PAUSE_NS)
            except ActorError:
                return None
        return None

    async def _ask_gateway(self, grant: Grant, deadline_ns: int) -> Ack | None:
        """The gateway's acknowledgement, or None once the account knows that there is none."""
        silent = moved = False
        try:
            ack = await self._order(grant, deadline_ns)
            reason: str = ack.refusal
        except (CallError, Stale) as error:
            silent = isinstance(error, TimedOut | Unreachable | NodeLost)
            # Dead: its channel is over, and it may be back. Stale (of another node: Refused): the
            # account has another owner by now. Neither was said by the gateway.
            moved = isinstance(error, Dead | Stale | Refused)
            reason = "moved" if moved else "no answer"
        if not reason:
            if not grant.is_new_connection or ack.kem_ciphertext is not None:
                return ack
            reason = "no ciphertext"
        await self._give_up(GiveUp(grant=grant, reason=f"gateway: {reason}", silent=silent))
        if reason == "unknown_connection" and not grant.is_new_connection:
            self._ask = attrs.evolve(self._ask, fresh=True)
        elif moved:
            await self.sleep(GATEWAY_PAUSE_NS)
        else:
            if silent and self._patience_ns < self._services.limits.gateway_last_answer_ns:
                self._silent.add(grant.gateway_id)
            else:
                self._refusals.add(reason)
            tried = self._ask.tried | {grant.gateway_id}
            self._ask = attrs.evolve(self._ask, tried=tried, fresh=False)
        return None

    async def _order(self, grant: Grant, deadline_ns: int) -> Ack:
        """Directly, or where no link leads there by way of the account's node. Raises CallError."""
        order = FromOwner(grant.epoch, Enclosed(grant.authorize))
        try:
            ack: Ack = await self.call(grant.gateway, order, deadline_ns)
        except Unreachable:
            owner = self._services.tenure.owner_of(self._account_id)
            if owner is None or owner in (self._services.tenure.node, grant.gateway.node):
                raise
            carry = CarryOrder(grant.gateway, order, deadline_ns)
            ack = await self.call(NamedRef(COURIERS, owner), carry, deadline_ns)
        return ack

    def _try_the_silent(self) -> None:
        """No other gateway is left."""
        self._ask = attrs.evolve(self._ask, tried=self._ask.tried - self._silent)
        self._silent.clear()
        self._patience_ns = self._services.limits.gateway_last_answer_ns
        self._deadline_ns = min(self._deadline_ns, self.context.now() + self._patience_ns)

    async def _give_up(self, message: GiveUp) -> None:
        """Tell the account. If it cannot be told, the authorisation ends by itself there, since
        nobody acknowledges it."""
        with suppress(ActorError):
            account = await self._services.accounts.locate(
                self, self._account_id, deadline_ns=GIVE_UP_DEADLINE_NS
            )
            self.cast(account, message)

    def _verdict(self, answer: AuthorizationDenied) -> AuthorizationDenied:
        """No gateway is left: say what those that answered said, if they said the same."""
        if answer.reason != "offline":
            return answer
        if self._refusals in ({"ceiling"}, {"unsupported"}):
            (refusal,) = self._refusals
            return self._denied("forbidden", violated=(f"gateway_{refusal}",))
        if self._refusals == {"limits_exceeded"}:
            return self._denied("limits_exceeded", retry_after_ns=RETRY_AFTER_NS)
        return answer

    def _denied(
        self, reason: DenialReason, *, violated: tuple[str, ...] = (), retry_after_ns: int = 0
    ) -> AuthorizationDenied:
        return AuthorizationDenied(
            resource_id=self._ask.request.resource_id,
            reason=reason,
            violated=violated,
            retry_after_ns=retry_after_ns,
        )
