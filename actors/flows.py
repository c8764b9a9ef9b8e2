"""Flows that agents report: the part of the account actor that says whose they are.

Each side of a tunnel counts for itself, and nobody checks the figures: a row says who reported it.
But a flow counts only if an authorisation of the sender carried it, one that is live, or ended a
little while ago. Whose it was (client, gateway, resource, principal) is taken from there.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from actors import logs
from actors.messages import CLERK, FlowsFrom, LogRows
from actors.model import Authorization
from actors.requests import RequestsOfAccount
from channel.messages import ReportedFlow
from runtime.actor import handles
from runtime.randomness import uuid7


class FlowsOfAccount(RequestsOfAccount):
    """See the module."""

    @handles(FlowsFrom)
    def _on_flows(self, message: FlowsFrom) -> None:
        senders = self._clients if message.sender == "client" else self._gateways
        is_current = senders.current(message.sender_id, message.number) is not None
        now_ns, at = self.context.now(), self.context.utc_now()
        rows = []
        for flow in message.flows:
            authorization = self._ledger.recent(flow.authorization_id, now_ns)
            if is_current and authorization is not None and _is_of(authorization, message):
                rows.append(self._row(flow, authorization, message, at))
        self._counts["flows_refused"] += len(message.flows) - len(rows)
        clerk = self.context.registry.whereis(CLERK)
        if rows and clerk is not None and self.cast(clerk, LogRows(tuple(rows))):
            self._counts["flows_logged"] += len(rows)

    def _row(
        self,
        flow: ReportedFlow,
        authorization: Authorization,
        message: FlowsFrom,
        at: datetime,
    ) -> logs.FlowLog:
        client = self._snapshot.clients.get(authorization.client_id)
        ended_at = at - _microseconds(flow.ended_ns_ago)
        return logs.FlowLog(
            id=uuid7(self._services.clock, self._services.randomness),
            account_id=self._account_id,
            at=at,
            reporter=message.sender,
            authorization_id=authorization.id,
            client_id=authorization.client_id,
            gateway_id=authorization.gateway_id,
            resource_id=authorization.resource_id,
            principal_id=None if client is None else client.principal_id,
            protocol=flow.protocol,
            source=flow.source,
            source_port=flow.source_port,
            destination=flow.destination,
            destination_port=flow.destination_port,
            name=flow.name,
            started_at=min(at - _microseconds(flow.began_ns_ago), ended_at),
            ended_at=ended_at,
            packets_sent=flow.packets_sent,
            packets_received=flow.packets_received,
            bytes_sent=flow.bytes_sent,
            bytes_received=flow.bytes_received,
            ending=flow.ending,
            flows=flow.flows,
        )


def _is_of(authorization: Authorization, message: FlowsFrom) -> bool:
    if message.sender == "client":
        return authorization.client_id == message.sender_id
    return authorization.gateway_id == message.sender_id


def _microseconds(duration_ns: int) -> timedelta:
    return timedelta(microseconds=duration_ns // 1_000)
