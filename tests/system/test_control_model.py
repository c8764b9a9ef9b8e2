"""Random accounts and random changes through the API of a real portal, and four that have to agree
at every step on who may reach what:

- the live system, which explains every principal and resource, and answers a real client;
- a cold reload: the account read anew from the store, and decided by the engine;
- a slow, direct reading of the tables (`table_reading`);
- what `diff` predicted before the change, and `at` says of each instant afterwards.

Each run says the seed of each history. HOLLOWAY_MODEL_HISTORIES has so many of them (`make soak`),
HOLLOWAY_MODEL_SEED is that of the first: the same seed does the same again.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import attrs
import httpx
import psycopg
import pytest
import trio

from actors.model import Fact
from actors.policy.engine import Allowed, Denied, Request, Snapshot, decide
from actors.store.embedded import EmbeddedPostgres
from actors.store.postgres import PostgresStore
from channel.messages import AuthorizationCreated, IpText
from tests.system.light_agents import LightClient, LightGateway
from tests.system.table_reading import Facts, Pair, Tables, every
from tests.system.test_portal_node import Portal, account_of, all_of, portal, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]

HISTORIES: Final = int(os.environ.get("HOLLOWAY_MODEL_HISTORIES", "3"))
FIRST_SEED: Final = int(os.environ.get("HOLLOWAY_MODEL_SEED", "1"))
STEPS: Final = 20

ADDRESSES: Final = [None, "203.0.113.7", "198.51.100.200", "2001:db8::1", "127.0.0.1"]
NETWORKS: Final = ["203.0.113.0/24", "198.51.100.128/25", "2001:db8::/64", "127.0.0.0/8"]
REGIONS: Final = [None, "DE", "FR", "US"]
"""Of these, and of providers, no policy names the last: there is always another one."""
VERSIONS: Final = [None, "14.2", "14.10"]
ZONES: Final = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"]
OF_THE_CLIENT: Final = Facts(remote_ip="127.0.0.1", client_verified=False)
SEEN: Final = ("gained", "lost", "allowed", "denied", "granted", "refused", "reachable then")
"""What has to come about in a run, or it has shown nothing."""
PARTICIPANTS: Final = 2
"""Principals, resources and groups, besides those that are made on the way."""
POLICIES: Final = 5
MOST: Final = {"policies": 12, "memberships": 6, "principals": 4, "groups": 3, "resources": 3}


@attrs.frozen
class Call:
    """A change as the API takes it. `id` is that which a creation proposes."""

    action: str
    noun: str
    id: str
    fields: dict[str, Any]


@attrs.frozen
class Moment:
    """What the tables said at an instant, which no change was made at."""

    instant: datetime
    tables: Tables


class History:
    """One account, its random changes, and what they have to agree on."""

    def __init__(
        self,
        seed: int,
        http: httpx.AsyncClient,
        store: PostgresStore,
        tables: psycopg.Connection,
        account_id: UUID,
    ) -> None:
        self._random = random.Random(seed)
        self._http = http
        self._store = store
        self._connection = tables
        self._account_id = account_id
        self._ids: dict[str, list[str]] = {}
        self._all_facts: list[Facts] = []
        self._providers: list[str] = []
        self._client: LightClient
        self._user = ""
        self.moments: list[Moment] = []
        self.calls: list[Call] = []
        self.seen: Counter[str] = Counter()
        """How often each of SEEN came about."""
        self._names = 0

    # --- beginning ---

    async def begin(self, nursery: trio.Nursery) -> None:
        site = await self._create("sites", name="Berlin")
        self._site_id = site["id"]
        for number in range(3):
            provider = await self._create(
                "auth_providers", kind="oidc", name=f"p{number}", client_id="holloway",
                issuer=f"https://id{number}.example.org",
            )  # fmt: skip
            self._providers.append(provider["id"])
        groups = await all_of(self._http, "groups")
        self._ids = {
            "groups": [each["id"] for each in groups],
            **{noun: [] for noun in ("principals", "resources", "memberships", "policies")},
        }
        for noun in ("principals", "resources", "groups"):
            for _ in range(PARTICIPANTS):
                made = await self._create(noun, **self._fields(noun))
                self._ids[noun].append(made["id"])
        self._user = (await self._create("principals", name="Uwe"))["id"]
        self._ids["principals"].append(self._user)
        for noun, count in ("memberships", PARTICIPANTS), ("policies", POLICIES):
            for _ in range(count):
                await self._http.post(f"/v1/{noun}", json=self._fields(noun))
        await self._look()
        for kind, owner in ("gateway", {"site_id": site["id"]}), (
            "client", {"principal_id": self._user},
        ):  # fmt: skip
            token = await self._create("tokens", kind=kind, name=kind, **owner)
            agent: Any = (LightGateway if kind == "gateway" else LightClient)(token["token"], kind)
            nursery.start_soon(agent.dialer.run)

            async def is_in(agent: Any = agent) -> bool:
                return bool(agent.joins)

            await until(is_in)
            if kind == "client":
                self._client = agent
        self._all_facts = every(
            remote_ip=ADDRESSES,
            region=REGIONS,
            auth_provider_id=[None, *self._providers],
            client_verified=[None, True, False],
            os_version=VERSIONS,
        )
        self._remember()

    async def _create(self, noun: str, **fields: Any) -> dict[str, Any]:
        answer = await self._http.post(f"/v1/{noun}", json=fields)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    # --- a change ---

    async def step(self) -> None:
        call = self._draw()
        self.calls.append(call)
        before = self.moments[-1].tables
        predicted = await self._predict(call)
        id = await self._make(call)
        self._remember()
        after = self.moments[-1].tables
        self._check_prediction(predicted, {call.id: id}, before, after)
        await self._check_live_and_cold(after)
        await self._check_client(after)
        if self._random.random() < 0.3:
            await self.check_past(self._random.choice(self.moments))

    def _draw(self) -> Call:
        draw = self._random
        noun = draw.choices(
            ["policies", "memberships", "principals", "groups", "resources"], [8, 5, 3, 1, 2]
        )[0]
        known = [id for id in self._ids[noun] if id not in self._kept]
        actions = {"create": 3 if len(self._ids[noun]) < MOST[noun] else 0}
        if known:
            actions["delete"] = noun not in ("groups", "resources") or len(known) > 1
            if noun in ("policies", "principals"):
                actions["update"] = 4
        if not any(actions.values()):
            actions["create"] = 1
        action = draw.choices(list(actions), list(actions.values()))[0]
        if action == "create":
            return Call(action, noun, str(UUID(int=draw.getrandbits(128))), self._fields(noun))
        id = draw.choice(known)
        if action == "delete":
            return Call(action, noun, id, {})
        fields = (
            {"disabled": draw.random() < 0.5}
            if noun == "principals" or draw.random() < 0.3
            else {"conditions": self._conditions(), "expires_at": self._expiry()}
        )
        return Call(action, noun, id, fields)

    @property
    def _kept(self) -> set[str]:
        """What is not changed: the principal of the client, and the group of everyone."""
        return {self._user, self._ids["groups"][0]}

    def _fields(self, noun: str) -> dict[str, Any]:
        draw = self._random
        self._names += 1
        name = {"name": f"{noun} {self._names}"}
        match noun:
            case "principals":
                return name | {"kind": draw.choice(["user", "user", "service_account"])}
            case "groups":
                return name
            case "resources":
                address = f"10.{self._names}.0.0/16"
                return name | {"kind": "cidr", "address": address, "site_ids": [self._site_id]}
            case "memberships":
                return {
                    "group_id": draw.choice(self._ids["groups"][1:]),
                    "principal_id": draw.choice([*self._ids["principals"], self._user]),
                }
        return {
            "group_id": draw.choice(self._ids["groups"]),
            "resource_id": draw.choice(self._ids["resources"]),
            "conditions": self._conditions(),
            "expires_at": self._expiry(),
            "lease_s": draw.choice([60, 600, 3600]),
        }

    def _expiry(self) -> str | None:
        if self._random.random() < 0.7:
            return None
        hours = self._random.choice([1, 24, 24 * 30])
        return (_minute(datetime.now(UTC)) + timedelta(hours=hours)).isoformat()

    def _conditions(self) -> dict[str, Any]:
        draw = self._random

        def some(values: list[Any]) -> dict[str, Any]:
            chosen = draw.sample(values, draw.randint(1, 2))
            return {"operator": draw.choice(["is_in", "is_not_in"]), "values": chosen}

        def hours() -> dict[str, Any]:
            days = draw.sample(range(7), draw.randint(1, 7))
            windows = [{"day": day, "ranges": ranges()} for day in days]
            return {"zone": draw.choice(ZONES), "windows": windows}

        def ranges() -> list[dict[str, str]]:
            if draw.random() < 0.4:
                return []
            start, end = sorted(draw.sample(range(48), 2))
            return [{"start": _clock(start), "end": draw.choice([_clock(end), "00:00:00"])}]

        every_kind = {
            "remote_ip": lambda: some(NETWORKS),
            "remote_ip_location_region": lambda: some(REGIONS[1:-1]),
            "auth_provider": lambda: some(self._providers[:-1]),
            "client_verified": lambda: {"value": draw.random() < 0.5},
            "client_posture": lambda: {
                "facts": [
                    {
                        "name": "os_version",
                        "operator": draw.choice(["is", "at_least", "at_most"]),
                        "value": draw.choice(["14.2", "14.10"]),
                    }
                ]
            },
            "current_time": hours,
        }
        return {name: make() for name, make in every_kind.items() if draw.random() < 0.15}

    async def _make(self, call: Call) -> str:
        """Carry it out; the id of what is made, or was changed."""
        path = f"/v1/{call.noun}" + ("" if call.action == "create" else f"/{call.id}")
        method = {"create": "POST", "update": "PATCH", "delete": "DELETE"}[call.action]
        answer = await self._http.request(
            method, path, json=None if call.action == "delete" else call.fields
        )
        assert answer.status_code in (200, 201, 204, 409), answer.text
        await self._look()
        return str(answer.json()["id"]) if answer.status_code == 201 else call.id

    async def _look(self) -> None:
        """See what is there; the group of everyone comes first."""
        for noun in self._ids:
            found = await all_of(self._http, noun)
            found.sort(key=lambda each: each.get("kind") != "everyone")
            self._ids[noun] = [each["id"] for each in found]

    def _remember(self) -> None:
        """What is so from now on. No change has this instant: the next one comes later."""
        tables = Tables.read(self._connection, self._account_id)
        self.moments.append(Moment(datetime.now(UTC), tables))

    # --- what has to agree ---

    async def _predict(self, call: Call) -> dict[str, Any]:
        """What `diff` says of it."""
        proposed: dict[str, Any] = {"action": call.action, "noun": call.noun, "id": call.id}
        if call.action != "delete":
            proposed["fields"] = call.fields
        answer = await self._http.post("/v1/policies/diff", json={"mutations": [proposed]})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def _check_prediction(
        self, predicted: dict[str, Any], names: dict[str, str], before: Tables, after: Tables
    ) -> None:
        assert predicted["complete"]
        assert predicted["exact"]
        told: dict[str, set[Pair]] = {"gained": set(), "lost": set()}
        for what, (denied, allowed) in {"gained": (before, after), "lost": (after, before)}.items():
            for each in predicted[what]:
                ids = (each["principal_id"], each["resource_id"])
                pair = (UUID(names.get(ids[0], ids[0])), UUID(names.get(ids[1], ids[1])))
                told[what].add(pair)
                self.seen[what] += 1
                facts, instant = _facts_of(each["example"])
                assert allowed.allows(pair, facts, instant), (what, each)
                assert not denied.allows(pair, facts, instant), (what, each)
        now = datetime.now(UTC)
        instants = [now, *(now + timedelta(hours=self._random.randint(1, 400)) for _ in range(2))]
        for pair in before.policies.keys() | after.policies.keys():
            if before.policies.get(pair, []) == after.policies.get(pair, []):
                continue
            for instant in instants:
                for facts in self._all_facts:
                    was, becomes = (each.allows(pair, facts, instant) for each in (before, after))
                    assert was or not becomes or pair in told["gained"], (pair, facts, instant)
                    assert becomes or not was or pair in told["lost"], (pair, facts, instant)

    async def _check_live_and_cold(self, tables: Tables) -> None:
        cold = Snapshot.of(await self._store.contents(self._account_id))
        for pair in tables.policies:
            instant = self._instant()
            facts = self._random.choice(self._interesting(tables, pair, instant))
            principal_id, resource_id = pair
            question = {
                "principal_id": str(principal_id),
                "resource_id": str(resource_id),
                "at": instant.isoformat(),
                **{k: v for k, v in attrs.asdict(facts).items() if v and k != "os_version"},
            }
            posture: tuple[Fact, ...] = ()
            if facts.os_version is not None:
                question["posture"] = [{"name": "os_version", "value": facts.os_version}]
                posture = (Fact(name="os_version", value=facts.os_version),)
            if facts.client_verified is not None:
                question["client_verified"] = facts.client_verified
            live = await self._ask(question)
            request = Request(
                principal_id=principal_id,
                resource_id=resource_id,
                remote_ip=None if facts.remote_ip is None else IpText(facts.remote_ip),
                region=facts.region,
                auth_provider_id=facts.auth_provider_id and UUID(facts.auth_provider_id),
                client_verified=facts.client_verified,
                posture=posture,
            )
            decision = decide(cold, request, instant)
            said = (facts, instant, live, decision)
            self.seen["allowed" if live["allowed"] else "denied"] += 1
            match decision:
                case Allowed():
                    assert live["allowed"], said
                    assert datetime.fromisoformat(live["expires_at"]) == decision.expires_at, said
                    assert UUID(live["policy_id"]) == decision.policy_id, said
                    assert tables.until(pair, facts, instant) == decision.expires_at, said
                case Denied():
                    assert not live["allowed"], said
                    assert tuple(live["violated"]) == decision.violated, said
                    assert tables.until(pair, facts, instant) is None, said

    def _interesting(self, tables: Tables, pair: Pair, instant: datetime) -> list[Facts]:
        """As often as not such circumstances as are allowed, which are few."""
        allowed = [each for each in self._all_facts if tables.allows(pair, each, instant)]
        return allowed if allowed and self._random.random() < 0.5 else self._all_facts

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        answer = await self._http.post("/v1/policies/explain", json=question)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def _instant(self) -> datetime:
        """Now, soon, or around a change of the clocks."""
        around = [
            datetime.now(UTC) + timedelta(minutes=self._random.randint(0, 20_000)),
            datetime(2027, 3, 28, 0, 0, tzinfo=UTC),
            datetime(2027, 10, 31, 0, 0, tzinfo=UTC),
            datetime(2027, 4, 3, 14, 0, tzinfo=UTC),
        ]
        chosen = self._random.choice(around) + timedelta(minutes=self._random.randint(0, 180))
        return _minute(chosen)

    async def _check_client(self, tables: Tables) -> None:
        """A real client gets what the tables say, as soon as its account's actor has heard of the
        change, and keeps nothing else."""

        async def agrees() -> bool:
            now = datetime.now(UTC)
            for principal_id, resource_id in tables.policies:
                if principal_id != UUID(self._user):
                    continue
                allowed = tables.allows((principal_id, resource_id), OF_THE_CLIENT, now)
                answer = await self._client.ask(resource_id)
                if isinstance(answer, AuthorizationCreated) != allowed:
                    return False
                self.seen["granted" if allowed else "refused"] += 1
            return True

        await until(agrees)

    async def check_past(self, moment: Moment) -> None:
        """What the tables said then is what `at` says now."""
        answer = await self._http.post("/v1/policies/at", json={"at": moment.instant.isoformat()})
        assert answer.status_code == 200, answer.text
        said = {
            (UUID(each["principal_id"]), UUID(each["resource_id"])): each["certain"]
            for each in answer.json()["reachable"]
        }
        expected: dict[Pair, bool] = {}
        for pair in moment.tables.policies:
            outcomes = {
                moment.tables.allows(pair, facts, moment.instant) for facts in self._all_facts
            }
            if True in outcomes:
                expected[pair] = outcomes == {True}
        assert said == expected
        self.seen["reachable then"] += len(said)


def _minute(instant: datetime) -> datetime:
    return instant.replace(second=0, microsecond=0)


def _clock(half_hours: int) -> str:
    return f"{half_hours // 2:02}:{half_hours % 2 * 30:02}:00"


def _facts_of(example: dict[str, Any]) -> tuple[Facts, datetime]:
    """The circumstances that `diff` names."""
    posture = {each["name"]: each["value"] for each in example["posture"]}
    facts = Facts(
        remote_ip=example["remote_ip"],
        region=example["region"],
        auth_provider_id=example["auth_provider_id"],
        client_verified=example["client_verified"],
        os_version=posture.get("os_version"),
    )
    return facts, datetime.fromisoformat(example["instant"])


@asynccontextmanager
async def history(seed: int, here: Portal, store: PostgresStore) -> AsyncIterator[History]:
    """An account of its own with agents on their channels."""
    logins = EmbeddedPostgres(here.state / "database").logins()
    with psycopg.connect(logins.application) as connection:
        async with here.client() as http, trio.open_nursery() as nursery:
            account_id = UUID(await account_of(http, f"history-{seed}"))
            it = History(seed, http, store, connection, account_id)
            await it.begin(nursery)
            yield it
            nursery.cancel_scope.cancel()


async def test_live_decisions_a_cold_reload_the_tables_diff_and_the_past_agree() -> None:
    async with portal() as here:
        logins = EmbeddedPostgres(here.state / "database").logins()
        async with PostgresStore.open(logins, migrated=True) as store:
            seen: Counter[str] = Counter()
            for seed in range(FIRST_SEED, FIRST_SEED + HISTORIES):
                print(f"\nseed {seed}")
                async with history(seed, here, store) as it:
                    try:
                        for _ in range(STEPS):
                            await it.step()
                        for moment in it.moments:
                            await it.check_past(moment)
                    except BaseException:
                        print(*it.calls, sep="\n")
                        raise
                seen += it.seen
            print(dict(seen))
            assert min(seen[each] for each in SEEN) > 0
