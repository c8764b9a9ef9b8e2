"""What the account actor is asked by others than agents: it answers from what it knows."""

from __future__ import annotations

from uuid import UUID

from actors.flows import FlowsOfAccount
from actors.messages import (
    AccountStatistics,
    AccountStatisticsRequest,
    AskExposure,
    AwayGateway,
    Explain,
    ExplainAnswer,
    Exposures,
    ListLive,
    ListPresence,
    OnlineClient,
    OnlineGateway,
    Presence,
    ResourceExposure,
)
from actors.policy.engine import Request
from actors.policy.explain import explain
from runtime.actor import handles


class QuestionsOfAccount(FlowsOfAccount):
    """The part of the account actor that answers the API. Plain handlers: nothing here waits."""

    @handles(Explain)
    def _on_explain(self, ask: Explain) -> ExplainAnswer:
        online = None if ask.client_id is None else self._clients.get(ask.client_id)
        client = None if ask.client_id is None else self._snapshot.clients.get(ask.client_id)
        token_id = None if client is None else client.token_id
        remote_ip = ask.remote_ip
        if online is not None:
            token_id, remote_ip = online.token_id, remote_ip or online.remote
        request = Request(
            client_id=ask.client_id,
            principal_id=ask.principal_id if ask.client_id is None else None,
            resource_id=ask.resource_id,
            remote_ip=remote_ip,
            token_id=token_id,
        )
        resource = self._snapshot.resources.get(ask.resource_id)
        gateways = () if resource is None else self._snapshot.gateways_of(resource)
        return ExplainAnswer(
            explanation=explain(self._snapshot, request, ask.at or self.context.utc_now()),
            online_gateway_ids=tuple(
                id for id in sorted(gateways) if self._gateways.get(id) is not None
            ),
        )

    @handles(ListPresence)
    def _on_list_presence(self, message: ListPresence) -> Presence:
        return Presence(
            clients=tuple(
                OnlineClient(
                    client_id=each.id,
                    remote=each.remote,
                    number=each.number,
                    since=each.since,
                    tunnel_key=each.tunnel_key,
                )
                for each in self._clients
            ),
            gateways=tuple(
                OnlineGateway(
                    gateway_id=each.id,
                    remote=each.remote,
                    number=each.number,
                    since=each.since,
                    tunnel_key=each.tunnel_key,
                    connections=self._connections.count(each.id),
                )
                for each in self._gateways
            ),
        )

    @handles(AskExposure)
    def _on_ask_exposure(self, ask: AskExposure) -> Exposures:
        exposures = (self._exposure(id) for id in ask.resource_ids)
        return Exposures(tuple(each for each in exposures if each.connected or each.away))

    def _exposure(self, resource_id: UUID) -> ResourceExposure:
        connected, now_ns = 0, self.context.now()
        left_by_gateway: dict[UUID, list[int]] = {}
        for live in self._ledger.of_resource(resource_id):
            gateway_id = live.authorization.gateway_id
            if self._gateways.get(gateway_id) is None:
                left_by_gateway.setdefault(gateway_id, []).append(live.remaining_ns(now_ns))
            else:
                connected += 1
        return ResourceExposure(
            resource_id=resource_id,
            connected=connected,
            away=tuple(
                AwayGateway(gateway_id=id, authorizations=len(left), longest_ns=max(left))
                for id, left in sorted(left_by_gateway.items())
            ),
        )

    @handles(ListLive)
    def _on_list_live(self, message: ListLive) -> frozenset[UUID]:
        return frozenset(live.id for live in self._ledger)

    @handles(AccountStatisticsRequest)
    def _on_statistics(self, message: AccountStatisticsRequest) -> AccountStatistics:
        return AccountStatistics(
            epoch=self.epoch,
            change_number=self._snapshot.number,
            clients=len(self._clients),
            gateways=len(self._gateways),
            live_authorizations=len(self._ledger),
            connections=len(self._connections),
            granted=self._counts["granted"],
            denied=self._counts["denied"],
            renewed=self._counts["renewed"],
            ended=self._counts["ended"],
            given_up=self._counts["given_up"],
            candidates_relayed=self._counts["candidates_relayed"],
            candidates_refused=self._counts["candidates_refused"],
        )
