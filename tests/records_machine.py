"""What a store remembers beside entities, on every store and on a naive reference: a part of the
store machine."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import attrs
from hypothesis import strategies as st
from hypothesis.stateful import rule

from actors.logs import (
    LOG_FILTERS,
    LOG_KINDS,
    LOG_RETENTION,
    FlowLog,
    Log,
    LogKind,
    RequestLog,
    Seen,
    SessionLog,
)
from actors.model import Account, Authorization, Change, Client, Entity, Gateway, Retention, Token
from actors.store.interface import ANSWER_KEPT, Answer, InvalidReference
from channel.messages import IpText
from tests.lease_machine import LeaseMachine

START = datetime(2026, 1, 1, tzinfo=UTC)
LOG_ACCOUNTS = [UUID(int=0xA00 + n) for n in range(2)]
"""Those of the store machine."""
SOME_IDS = [UUID(int=0xF00 + n) for n in range(2)]

moments = st.builds(
    lambda days, minutes: START + timedelta(days=days, minutes=minutes),
    st.sampled_from([0, 0, 0, 1, 40]),
    st.integers(0, 5),
)
expiries = st.builds(
    lambda days, minutes: START + timedelta(days=days, minutes=minutes),
    st.sampled_from([0, 1, 1, 2, 2, 41]),
    st.integers(0, 9),
)
ips = st.sampled_from([IpText("192.0.2.7"), IpText("2001:db8::7")])
some = st.sampled_from(SOME_IDS)
log_ids = st.integers(0, 9).map(lambda number: UUID(int=0xE00 + number))
log_kinds = st.sampled_from(list(LOG_KINDS))
written = {"id": log_ids, "account_id": st.sampled_from(LOG_ACCOUNTS), "at": moments}
log_rows: st.SearchStrategy[Log] = st.one_of(
    st.builds(
        SessionLog, **written, agent=st.sampled_from(["client", "gateway"]),
        event=st.sampled_from(["connected", "refused"]), device_id=st.none() | some, token_id=some,
        principal_id=st.none() | some, remote_ip=ips, reason=st.sampled_from(["", "ü"]),
    ),
    st.builds(
        FlowLog, **written, reporter=st.just("gateway"), authorization_id=some, client_id=some,
        gateway_id=some, resource_id=some, principal_id=st.none() | some,
        protocol=st.sampled_from(["tcp", "icmp"]), source=ips, destination=ips,
        destination_port=st.integers(0, 65_535), name=st.sampled_from(["", "db.corp.example"]),
        started_at=st.just(START), ended_at=moments, bytes_sent=st.integers(0, 2**63 - 1),
    ),
    st.builds(
        RequestLog, **written, token_id=st.none() | some, principal_id=st.none() | some,
        method=st.just("POST"), path=st.just("/v1/sites"), status=st.integers(100, 599),
        remote_ip=st.none() | ips, duration_us=st.integers(0, 10**9),
    ),
)  # fmt: skip


@attrs.define
class Records:
    """One half of the store machine's model."""

    entities: list[Entity] = attrs.Factory(list)
    changes: dict[UUID, list[Change]] = attrs.Factory(dict)
    pruned: dict[UUID, int] = attrs.Factory(dict)
    authorizations: dict[tuple[UUID, UUID], Authorization] = attrs.Factory(dict)
    installation_tokens: list[Token] = attrs.Factory(list)
    used_at: dict[UUID, datetime] = attrs.Factory(dict)
    seen: dict[tuple[UUID, UUID], Seen] = attrs.Factory(dict)
    answers: dict[tuple[UUID, str], Answer] = attrs.Factory(dict)
    logs: list[Log] = attrs.Factory(list)

    def retention(self, account_id: UUID) -> Retention | None:
        """None for an account that is not there."""
        for entity in self.entities:
            if isinstance(entity, Account) and entity.id == account_id:
                return entity.retention
        return None


class RecordsMachine(LeaseMachine):
    """The rules of answers, uses, devices seen, logs and their end."""

    model: Records

    @rule(id=st.integers(0, 4), account=st.integers(0, 1), at=moments)
    def note_used(self, id: int, account: int, at: datetime) -> None:
        tokens = [each for each in self.model.entities if isinstance(each, Token)]
        known = sorted({each.id for each in (*tokens, *self.model.installation_tokens)})
        token_id = known[id % len(known)] if known else UUID(int=1)
        assert self.ask(lambda store: store.note_used(token_id, at=at)) == ("done", None)
        if known:
            self.model.used_at[token_id] = max(at, self.model.used_at.get(token_id, at))
        owners = [LOG_ACCOUNTS[account], None]
        for owner in owners:
            mine = [
                each.id
                for each in (*tokens, *self.model.installation_tokens)
                if each.account_id == owner
            ]
            expected = {i: self.model.used_at[i] for i in mine if i in self.model.used_at}
            given = self.ask(lambda store, owner=owner: store.last_used(owner, known))
            assert given == ("done", expected)

    @rule(
        numbers=st.lists(st.integers(0, 5), min_size=1, max_size=4),
        account=st.integers(0, 1),
        at=moments,
        ip=ips,
    )
    def note_seen(self, numbers: list[int], account: int, at: datetime, ip: IpText) -> None:
        account_id = LOG_ACCOUNTS[account]
        devices = sorted(
            each.id
            for each in self.model.entities
            if isinstance(each, Client | Gateway) and each.account_id == account_id
        )
        seen = [
            Seen(
                device_id=devices[number % len(devices)] if devices and number else UUID(int=1),
                at=at + timedelta(minutes=number),
                version=f"1.{number}",
                remote_ip=ip,
            )
            for number in numbers
        ]
        each_once = list({each.device_id: each for each in seen}.values())
        assert self.ask(lambda store: store.note_seen(account_id, each_once)) == ("done", None)
        for each in each_once:
            known = self.model.seen.get((account_id, each.device_id))
            if each.device_id in devices and (known is None or known.at < each.at):
                self.model.seen[account_id, each.device_id] = each
        expected = {
            id: each for (owner, id), each in self.model.seen.items() if owner == account_id
        }
        given = self.ask(lambda store: store.seen(account_id, [*devices, UUID(int=1)]))
        assert given == ("done", expected)

    @rule(rows=st.lists(log_rows, min_size=1, max_size=6))
    def write_logs(self, rows: list[Log]) -> None:
        given = self.ask_each(lambda store: store.write_logs(rows))
        strangers = [row for row in rows if row.account_id not in self.model.changes]
        if strangers:
            for kind, (refusal, _, field) in given:
                assert (kind, refusal, field) == ("refused", InvalidReference, "account_id")
            return
        assert all(outcome == ("done", None) for outcome in given)
        for row in rows:
            if not any(
                (type(each), each.account_id, each.id, each.at)
                == (type(row), row.account_id, row.id, row.at)
                for each in self.model.logs
            ):
                self.model.logs.append(row)

    @rule(data=st.data(), account_id=st.sampled_from(LOG_ACCOUNTS), kind=log_kinds)
    def read_logs(self, data: st.DataObject, account_id: UUID, kind: LogKind) -> None:
        question: dict[str, Any] = {
            "since": data.draw(st.none() | moments),
            "until": data.draw(st.none() | moments),
            "before": data.draw(st.none() | log_ids),
            "limit": data.draw(st.integers(1, 5)),
            "equals": data.draw(
                st.dictionaries(st.sampled_from(LOG_FILTERS[kind]), some, max_size=2)
            ),
        }
        expected = [
            row
            for row in self.model.logs
            if isinstance(row, LOG_KINDS[kind])
            and row.account_id == account_id
            and (question["since"] is None or question["since"] <= row.at)
            and (question["until"] is None or row.at < question["until"])
            and (question["before"] is None or row.id < question["before"])
            and all(getattr(row, name) == id for name, id in question["equals"].items())
        ]
        expected.sort(key=lambda row: (row.id, row.at), reverse=True)
        given = self.ask(lambda store: store.logs(account_id, kind, **question))
        assert given == ("done", tuple(expected[: question["limit"]]))

    @rule(at=expiries)
    def expire(self, at: datetime) -> None:
        figures = self.ask_each(lambda store: store.expire(at))
        model = self.model
        pruned = {id: self.old_changes(id, at) for id in model.changes}
        ended = [key for key, each in model.authorizations.items() if self.is_old(each, at)]
        answers = [key for key, each in model.answers.items() if each.at <= at - ANSWER_KEPT]
        for _, expired in figures:
            assert expired.changes == sum(pruned.values())
            assert expired.authorizations == len(ended)
            assert expired.answers == len(answers)
        for id, count in pruned.items():
            model.pruned[id] = model.pruned.get(id, 0) + count
        for key in ended:
            del model.authorizations[key]
        for token_and_key in answers:
            del model.answers[token_and_key]
        model.logs = [row for row in model.logs if not self.is_old_log(row, at)]
        for kind in LOG_KINDS:
            self.check_logs(kind)

    @rule(
        row=log_rows,
        days=st.sampled_from([1, 1, 2, 400]),
        late=st.sampled_from([timedelta(), timedelta(microseconds=1)]),
    )
    def expire_just_in_time(self, row: Log, days: int, late: timedelta) -> None:
        self.write_logs([row])
        self.expire(row.at + timedelta(days=days) + late)

    def check_logs(self, kind: LogKind) -> None:
        for account_id in LOG_ACCOUNTS:
            rows = [r for r in self.model.logs if isinstance(r, LOG_KINDS[kind])]
            expected = [row for row in rows if row.account_id == account_id]
            expected.sort(key=lambda row: (row.id, row.at), reverse=True)
            given = self.ask(lambda store, id=account_id: store.logs(id, kind))
            assert given == ("done", tuple(expected[:100]))

    def old_changes(self, account_id: UUID, at: datetime) -> int:
        """How many changes at the beginning are not kept any more."""
        days = (self.model.retention(account_id) or Retention()).changes_days
        rest = self.model.changes[account_id][self.model.pruned.get(account_id, 0) :]
        young = [n for n, each in enumerate(rest) if each.at >= at - timedelta(days=days)]
        return young[0] if young else len(rest)

    def is_old(self, authorization: Authorization, at: datetime) -> bool:
        retention = self.model.retention(authorization.account_id) or Retention()
        end = authorization.ended_at or authorization.expires_at
        return end < at - timedelta(days=retention.authorizations_days)

    def is_old_log(self, row: Log, at: datetime) -> bool:
        retention = self.model.retention(row.account_id)
        if retention is None:
            return True
        (kind,) = [kind for kind, each in LOG_KINDS.items() if isinstance(row, each)]
        return row.at < at - timedelta(days=getattr(retention, LOG_RETENTION[kind]))
