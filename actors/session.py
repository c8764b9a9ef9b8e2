"""The session actor: one connected client. It owns the client's channel and decides nothing.

What the client says goes to the account actor (or, for a request, to an `AccessRequest` beside
it); what the account actor says goes to the client. It remembers what it told its client, so that
when the account actor was started anew, the client can be told exactly what became different.
"""

from __future__ import annotations

from uuid import UUID

import attrs

from actors.attachment import Channel
from actors.messages import (
    AttachClient,
    ClientTruth,
    Denial,
    IsAnswered,
    KnownConnection,
    PostureReported,
    Received,
    ViewChanged,
)
from actors.model import Client, Fact
from actors.owner import AgentOwner
from actors.request import AccessRequest
from actors.services import Bucket, Services
from channel.messages import (
    MAX_RESOURCES,
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRenewed,
    AuthorizationRevoked,
    Candidates,
    ClientInit,
    ConfigChanged,
    FlowReport,
    Heartbeat,
    Held,
    Interface,
    IpText,
    Join,
    MoreHeld,
    NameSettings,
    Posture,
    RequestAuthorization,
    Resource,
    ResourceRemoved,
    ResourceUpserted,
)
from runtime.actor import LATER, ActorError, ActorRef, Caller, Down, Timer, handles

OVERLOAD_RETRY_NS = 1 * 10**9


@attrs.frozen
class _Told:
    """An authorisation that the client was told of."""

    resource_id: UUID
    connection_id: UUID
    known: KnownConnection | None


@attrs.frozen
class _PostureDue:
    """What the device reports may be told to the account again."""


class SessionActor(AgentOwner):
    """See the module. `remote` is the validated path at the join."""

    def __init__(
        self,
        services: Services,
        channel: Channel,
        *,
        device: Client,
        token_id: UUID,
        join: Join,
        remote: IpText,
    ) -> None:
        super().__init__(
            services, channel, device=device, token_id=token_id, join=join, remote=remote
        )
        self._told: dict[UUID, _Told] = {}
        self._visible: dict[UUID, Resource] = {}
        self._config: tuple[Interface, NameSettings | None] | None = None
        self._pending: dict[ActorRef, UUID] = {}
        self._unasked: dict[UUID, RequestAuthorization] = {}
        """Requests that came while the account was being looked for."""
        self._posture: tuple[Fact, ...] | None = None
        self._posture_reported: tuple[Fact, ...] | None = None
        self._posture_pause: Timer | None = None
        self._doubts: list[tuple[Caller, IsAnswered]] = []
        """At most one of each request under way."""

    def started(self) -> None:
        super().started()
        limits, now_ns = self._services.limits, self.context.now()
        self._requests = Bucket(limits.requests_per_s, limits.requests_burst, now_ns)

    # --- the account's actor -------------------------------------------------------------------

    def _question(self, held: tuple[Held, ...]) -> AttachClient:
        return AttachClient(
            client_id=self._device.id,
            token_id=self._token_id,
            tunnel_key=self._tunnel_key,
            incarnation=self._incarnation,
            remote=self._remote,
            held=held,
            number=self._number,
            connections=self._known_connections(),
            asking=frozenset(self._pending.values()),
            version=self._version,
        )

    async def _introduce(self, truth: ClientTruth) -> None:
        self._auth_provider_id = truth.auth_provider_id
        self._visible = dict(list(truth.resources.items())[:MAX_RESOURCES])
        self._config = (truth.interface, truth.names)
        for each in truth.authorizations:
            self._told[each.authorization_id] = _Told(each.resource_id, each.connection_id, None)
        self.say(
            ClientInit(
                account_id=self._account_id,
                client_id=self._device.id,
                interface=truth.interface,
                resources=tuple(self._visible.values()),
                relays=await self.first_relays(),
                authorizations=truth.authorizations,
                names=truth.names,
            )
        )

    def _correct(self, truth: ClientTruth) -> None:
        """Tell the client in which points the truth differs from what it was told."""
        lives = {each.authorization_id: each for each in truth.authorizations}
        for id in [id for id in self._told if id not in lives]:
            self._on_revoked(
                AuthorizationRevoked(
                    authorization_id=id, resource_id=self._told[id].resource_id, reason="ended"
                )
            )
        self._say_renewed(truth.authorizations)
        if truth.names is not None:
            self._on_config(ConfigChanged(interface=truth.interface, names=truth.names))
        gone = tuple(id for id in self._visible if id not in truth.resources)
        self._on_view_changed(ViewChanged(tuple(truth.resources.values()), gone))

    def is_amid(self) -> bool:
        return bool(self._pending or self._unasked)

    def _held_now(self) -> tuple[Held, ...]:
        return tuple(
            Held(authorization_id=id, connection_id=told.connection_id)
            for id, told in self._told.items()
        )

    def _known_connections(self) -> tuple[KnownConnection, ...]:
        known = (told.known for told in self._told.values())
        return tuple({each.id: each for each in known if each is not None}.values())

    @handles(Down)
    def _on_down(self, message: Down) -> None:
        resource_id = self._pending.pop(message.ref, None)
        if resource_id is not None:  # a request that ended without a word
            self.say(AuthorizationDenied(resource_id=resource_id, reason="unavailable"))
        else:
            super()._on_down(message)

    # --- what the client says ------------------------------------------------------------------

    @handles(Received)
    def _on_received(self, message: Received) -> None:
        said = message.frame.message
        match said:
            case RequestAuthorization():
                self._request(said)
            case Candidates():
                self.pass_on(said)
            case Posture():
                by_name = {each.name: Fact(name=each.name, value=each.value) for each in said.facts}
                self._posture = tuple(by_name[name] for name in sorted(by_name))
                self._report_posture()
            case MoreHeld():
                self.take_held(said)
            case FlowReport():
                self.pass_on_flows(said)
            case Heartbeat():
                pass  # answered by the channel itself
            case _:
                self.refuse("protocol_error", "not in place after the join")

    def _request(self, request: RequestAuthorization) -> None:
        if (
            self._number is None
            or len(self._pending) + len(self._unasked) >= self._services.limits.pending_requests
            or not self._requests.take(self.context.now())
        ):
            self._counts["requests_shed"] += 1
            self._deny(request.resource_id, OVERLOAD_RETRY_NS)
            return
        if request.resource_id in self._pending.values():
            return  # its answer is on the way
        if self.is_attaching:
            self._unasked[request.resource_id] = request
        else:
            self._ask(request)

    def _report_posture(self) -> None:
        """Tell the account what the device says of itself, the latest, and not too often."""
        is_paused = self._posture_pause is not None and self._posture_pause.pending
        facts, number = self._posture, self._number
        if facts is None or facts == self._posture_reported or number is None or is_paused:
            return
        self._posture_reported = facts
        self.to_account(PostureReported(client_id=self._device.id, number=number, facts=facts))
        interval_ns = self._services.limits.posture_interval_ns
        self._posture_pause = self.send_after(interval_ns, _PostureDue())

    @handles(_PostureDue)
    def _on_posture_due(self, message: _PostureDue) -> None:
        self._report_posture()

    def attached(self) -> None:
        self._posture_reported = None  # the former owner may not have written it
        self._report_posture()
        doubts, self._doubts = self._doubts, []
        for caller, doubt in doubts:
            self.reply(caller, doubt.request not in self._pending)
        unasked, self._unasked = self._unasked, {}
        for request in unasked.values():
            self._ask(request)

    def _ask(self, request: RequestAuthorization) -> None:
        assert self._number is not None
        try:
            ref = self.spawn(
                AccessRequest(
                    self._services,
                    session=self.context.ref,
                    account_id=self._account_id,
                    client_id=self._device.id,
                    number=self._number,
                    request=request,
                ),
                label="request",
            )
        except ActorError:
            self._deny(request.resource_id, OVERLOAD_RETRY_NS)
            return
        self._pending[ref] = request.resource_id
        self.monitor(ref)

    def _deny(self, resource_id: UUID, retry_after_ns: int) -> None:
        self.say(
            AuthorizationDenied(
                resource_id=resource_id, reason="limits_exceeded", retry_after_ns=retry_after_ns
            )
        )

    # --- what the client is told ---------------------------------------------------------------

    @handles(Denial)
    def _on_denial(self, message: Denial) -> None:
        self._pending.pop(message.request, None)
        if message.answer is not None:
            self.say(message.answer)

    @handles(IsAnswered)
    def _on_is_answered(self, message: IsAnswered) -> object:
        caller = self.context.caller
        if self.is_attaching and caller is not None:  # the answer may be among what is held
            self._doubts.append((caller, message))
            return LATER
        return message.request not in self._pending

    @handles(AuthorizationCreated)
    def _on_created(self, message: AuthorizationCreated) -> None:
        known = KnownConnection(
            id=message.connection_id,
            gateway_id=message.gateway.id,
            gateway_key=message.gateway.public_key,
            ice=message.ice,
        )
        told = _Told(message.resource_id, message.connection_id, known)
        self._told[message.authorization_id] = told
        self.say(message)
        for ref, resource_id in list(self._pending.items()):
            if resource_id == message.resource_id:  # answered: the client may ask again from now on
                del self._pending[ref]

    @handles(AuthorizationRenewed)
    def _on_renewed(self, message: AuthorizationRenewed) -> None:
        if message.authorization_id in self._told:
            self.say(message)

    @handles(AuthorizationRevoked)
    def _on_revoked(self, message: AuthorizationRevoked) -> None:
        if self._told.pop(message.authorization_id, None) is not None:
            self.say(message)

    @handles(Candidates)
    def _on_candidates(self, message: Candidates) -> None:
        self.say(message)

    @handles(ConfigChanged)
    def _on_config(self, message: ConfigChanged) -> None:
        if self._config != (message.interface, message.names):
            self._config = (message.interface, message.names)
            self.say(message)

    @handles(ViewChanged)
    def _on_view_changed(self, message: ViewChanged) -> None:
        for id in message.removed:
            if self._visible.pop(id, None) is not None:
                self.say(ResourceRemoved(resource_id=id))
        for resource in message.upserted:
            is_full = len(self._visible) >= MAX_RESOURCES and resource.id not in self._visible
            if not is_full and self._visible.get(resource.id) != resource:
                self._visible[resource.id] = resource
                self.say(ResourceUpserted(resource=resource))
