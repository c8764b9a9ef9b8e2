"""The JSON API over real HTTPS: the life of every noun, its log and its description."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import trio

from actors.model import Relay
from actors.store.postgres import Logins
from channel.credentials import decode_token
from channel.messages import SocketAddress
from portal.api.application import NOUNS
from tests.system.portal_support import (
    installation,
    made,
    two_nodes,
    world,
)

pytestmark = pytest.mark.system

PAST = "2020-01-01T00:00:00Z"
SOON = (datetime.now(UTC) + timedelta(days=1)).isoformat()


CREATED_BY_ADMINS = {
    "principals": ({"name": "Eva", "email": "eva@example.org"}, {"disabled": True, "email": None}),
    "groups": ({"name": "Guests"}, {"name": "Visitors"}),
    "sites": ({"name": "Paris"}, {"name": "Lyon"}),
}


@pytest.mark.parametrize("noun", CREATED_BY_ADMINS)
async def test_a_simple_noun_is_made_read_listed_changed_and_deleted(
    tmp_path: Path, noun: str
) -> None:
    fields, changes = CREATED_BY_ADMINS[noun]
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            new = await made(client, noun, **fields)
            assert UUID(new["id"]).version == 7
            assert new["account_id"] == account_id
            assert fields.items() <= new.items()
            path = f"/v1/{noun}/{new['id']}"
            assert (await client.get(path)).json() == new
            assert new in (await client.get(f"/v1/{noun}")).json()["items"]
            changed = await client.patch(path, json=changes)
            assert changed.status_code == 200
            assert changed.json() == new | changes
            assert (await client.get(path)).json() == new | changes
            assert (await client.patch(path, json={})).json() == new | changes
            assert (await client.delete(path)).status_code == 204
            assert (await client.get(path)).status_code == 404
            assert (await client.delete(path)).status_code == 404


async def test_accounts_are_for_operators_and_begin_with_the_group_everyone(
    tmp_path: Path,
) -> None:
    async with installation(tmp_path) as here, here.client(here.operator_token) as operator:
        account = await made(operator, "accounts", name="Acme", slug="acme")
        path = f"/v1/accounts/{account['id']}"
        on_account = {"holloway-account": account["id"]}
        groups = (await operator.get("/v1/groups", headers=on_account)).json()["items"]
        assert [(group["kind"], group["name"]) for group in groups] == [("everyone", "Everyone")]
        assert (await operator.get("/v1/accounts")).json()["items"] == [account]
        changed = await operator.patch(path, json={"name": "Acme 2", "disabled": True})
        assert changed.json() == account | {"name": "Acme 2", "disabled": True}
        again = await operator.post("/v1/accounts", json={"name": "Other", "slug": "acme"})
        assert again.status_code == 409
        assert [error["field"] for error in again.json()["errors"]] == ["slug"]
        assert (await operator.delete(path)).status_code == 204
        assert (await operator.get(path)).status_code == 404


async def test_an_admin_sees_and_names_its_own_account_only(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        account_id, admin = await here.admin_of("acme")
        other_id, _ = await here.admin_of("other")
        async with here.client(admin) as client:
            listed = (await client.get("/v1/accounts")).json()["items"]
            assert [account["id"] for account in listed] == [account_id]
            own = f"/v1/accounts/{account_id}"
            assert (await client.patch(own, json={"name": "New"})).json()["name"] == "New"
            assert (await client.patch(own, json={"disabled": True})).status_code == 403
            assert (await client.delete(own)).status_code == 403
            new = await client.post("/v1/accounts", json={"name": "x", "slug": "x"})
            assert new.status_code == 403
            assert (await client.get(f"/v1/accounts/{other_id}")).status_code == 404
            assert (await client.delete(f"/v1/accounts/{other_id}")).status_code == 404
            assert (await client.get("/v1/relays")).status_code == 403


async def test_tunnel_ranges_are_checked(tmp_path: Path) -> None:
    async with installation(tmp_path) as here, here.client(here.operator_token) as operator:
        ranges = {"range_ipv4": "10.99.0.0/16", "range_ipv6": "fd01::/64"}
        good = await made(operator, "accounts", name="a", slug="a", **ranges)
        assert ranges.items() <= good.items()
        for field, value in [
            ("range_ipv4", "10.99.0.1/16"),
            ("range_ipv4", "fd01::/64"),
            ("range_ipv4", "10.0.0.0/30"),
            ("range_ipv4", "100.64.0.0/10"),
            ("range_ipv4", "127.0.0.0/8"),
            ("range_ipv6", "fe80::/64"),
            ("range_ipv6", "10.0.0.0/8"),
            ("range_ipv6", "x"),
        ]:
            answer = await operator.post(
                "/v1/accounts", json={"name": "b", "slug": "b", field: value}
            )
            assert answer.status_code == 422, (field, value)
            assert {error["field"] for error in answer.json()["errors"]} == {field}


async def test_the_managed_group_stays_as_it_is(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            everyone = (await client.get("/v1/groups")).json()["items"][0]
            user = await made(client, "principals", name="Uwe")
            path = f"/v1/groups/{everyone['id']}"
            for answer in [
                await client.patch(path, json={"name": "All"}),
                await client.delete(path),
                await client.post(
                    "/v1/memberships",
                    json={"group_id": everyone["id"], "principal_id": user["id"]},
                ),
            ]:
                assert answer.status_code == 409
                assert answer.json()["code"] == "managed_group"


async def test_memberships_join_what_exists_once(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            body = {"group_id": ids["groups"], "principal_id": ids["principals"]}
            again = await client.post("/v1/memberships", json=body)
            assert (again.status_code, again.json()["code"]) == (409, "conflict")
            (error,) = again.json()["errors"]
            assert error["message"] == "another membership has this group and principal already"
            for field in body:
                bad = body | {field: str(uuid4())}
                answer = await client.post("/v1/memberships", json=bad)
                assert answer.status_code == 404
                assert [error["field"] for error in answer.json()["errors"]] == [field]
            path = f"/v1/memberships/{ids['memberships']}"
            assert (await client.get(path)).json()["group_id"] == ids["groups"]
            assert (await client.patch(path, json={})).status_code == 405
            assert (await client.delete(path)).status_code == 204


async def test_resources_are_canonical_and_never_what_is_nobodys(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            site = await made(client, "sites", name="Berlin")
            common = {"site_ids": [site["id"]], "name": "r", "kind": "cidr"}
            new = await made(
                client,
                "resources",
                **common,
                address="2001:DB8::/48",
                filters=[{"protocol": "tcp", "port_start": 80, "port_end": 443}],
            )
            assert new["address"] == "2001:db8::/48"
            path = f"/v1/resources/{new['id']}"
            changed = await client.patch(path, json={"kind": "ip", "address": "10.0.0.1/32"})
            assert (changed.json()["kind"], changed.json()["address"]) == ("ip", "10.0.0.1")
            filters = [{"protocol": "icmp", "port_start": 0, "port_end": 65535}]
            assert (await client.patch(path, json={"filters": filters})).json()[
                "filters"
            ] == filters
            assert (await client.patch(path, json={"kind": "cidr"})).json()[
                "address"
            ] == "10.0.0.1/32"
            for address in ("10.0.0.1/8", "0.0.0.0/0", "127.0.0.1", "100.64.1.0/24", "nonsense"):
                answer = await client.post("/v1/resources", json=common | {"address": address})
                assert answer.status_code == 422, address
                assert answer.json()["errors"][0]["field"] == "address"
            for bad in (
                {"protocol": "tcp", "port_start": 2, "port_end": 1},
                {"protocol": "icmp", "port_start": 1},
            ):
                answer = await client.patch(path, json={"filters": [bad]})
                assert answer.status_code == 422
            assert (await client.delete(path)).status_code == 204


async def test_policies_are_made_changed_and_explained(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            path = f"/v1/policies/{ids['policies']}"
            question = {"client_id": ids["clients"], "resource_id": ids["resources"]}
            explained = (await client.post("/v1/policies/explain", json=question)).json()
            assert explained["allowed"] is True
            assert explained["policy_id"] == ids["policies"]
            allowed = f"allowed by policy {ids['policies']} for Staff until "
            assert explained["sentence"].startswith(allowed)
            kinds = [hop["kind"] for hop in explained["path"]]
            assert kinds == ["client", "principal", "group", "policy", "resource"]
            (gateway,) = explained["gateways"]
            assert (gateway["gateway_id"], gateway["site_name"]) == (ids["gateways"], "Berlin")
            assert gateway["online"] is False
            past = question | {"at": SOON}
            then = (await client.post("/v1/policies/explain", json=past)).json()
            assert then["gateways"][0]["online"] is None
            conditions = {
                "remote_ip": {"operator": "is_in", "values": ["192.0.2.0/24"]},
                "current_time": {
                    "zone": "Europe/Berlin",
                    "windows": [{"day": 0, "ranges": [{"start": "09:00:00", "end": "17:00:00"}]}],
                },
            }
            changed = await client.patch(
                path, json={"conditions": conditions, "expires_at": SOON, "lease_s": 60}
            )
            assert changed.status_code == 200, changed.text
            assert changed.json()["conditions"]["remote_ip"]["values"] == ["192.0.2.0/24"]
            monday = {"at": "2027-01-04T09:00:00Z", "remote_ip": "192.0.2.9"}
            answers = [
                (await client.post("/v1/policies/explain", json=question | more)).json()
                for more in (
                    monday | {"at": "2026-11-23T09:00:00Z"},
                    monday,
                    monday | {"at": "2026-11-23T09:00:00Z", "remote_ip": "198.51.100.1"},
                    monday | {"at": "2026-11-24T09:00:00Z"},
                    {"at": "2026-11-23T09:00:00Z"},
                )
            ]
            assert [answer["allowed"] for answer in answers] == [True, False, False, False, False]
            assert [answer["violated"] for answer in answers[1:]] == [
                ["policy_expired"],
                ["remote_ip"],
                ["current_time"],
                ["remote_ip"],
            ]
            by_principal = {"principal_id": ids["principals"], "resource_id": ids["resources"]}
            assert (await client.post("/v1/policies/explain", json=by_principal)).status_code == 200
            assert (await client.delete(path)).status_code == 204
            denied = (await client.post("/v1/policies/explain", json=question)).json()
            assert (denied["allowed"], denied["policy_id"]) == (False, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("conditions.remote_ip.values[0]", {"remote_ip": {"operator": "is_in", "values": ["x"]}}),
        ("conditions.remote_ip.values", {"remote_ip": {"operator": "is_in", "values": []}}),
        ("conditions.remote_ip.operator", {"remote_ip": {"operator": "in", "values": ["::/0"]}}),
        (
            "conditions.current_time.zone",
            {"current_time": {"zone": "../../etc/passwd", "windows": [{"day": 0}]}},
        ),
        (
            "conditions.current_time.windows",
            {"current_time": {"zone": "UTC", "windows": [{"day": 0}, {"day": 0}]}},
        ),
        (
            "conditions.current_time.windows[0].ranges[0].end",
            {
                "current_time": {
                    "zone": "UTC",
                    "windows": [{"day": 0, "ranges": [{"start": "09:00:00", "end": "08:00:00"}]}],
                }
            },
        ),
        ("conditions.colour", {"colour": "blue"}),
    ],
)
async def test_bad_conditions_are_named(tmp_path: Path, field: str, value: Any) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            body = {"group_id": str(uuid4()), "resource_id": str(uuid4()), "conditions": value}
            answer = await client.post("/v1/policies", json=body)
            assert answer.status_code == 422
            assert [error["field"] for error in answer.json()["errors"]] == [field]


async def test_a_condition_names_providers_of_its_own_account(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        _, other = await here.admin_of("other")
        async with here.client(admin) as client, here.client(other) as stranger:
            ids, theirs = await world(here, client), await world(here, stranger)
            path = f"/v1/policies/{ids['policies']}"
            body = {"group_id": ids["groups"], "resource_id": ids["resources"]}

            def conditions(*values: str) -> dict[str, Any]:
                return {"auth_provider": {"operator": "is_not_in", "values": values}}

            own = ids["auth_providers"]
            for unknown in (str(uuid4()), theirs["auth_providers"], ids["groups"]):
                for method, where, fields in [("POST", "/v1/policies", body), ("PATCH", path, {})]:
                    refused = await client.request(
                        method, where, json=fields | {"conditions": conditions(own, unknown)}
                    )
                    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
                    (error,) = refused.json()["errors"]
                    assert error["field"] == "conditions.auth_provider.values[1]"
            kept = await client.patch(path, json={"conditions": conditions(own)})
            assert kept.json()["conditions"]["auth_provider"]["values"] == [own]


async def test_a_token_is_shown_once_and_works(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            site = await made(client, "sites", name="Berlin")
            new = await made(
                client,
                "tokens",
                kind="gateway",
                name="gw",
                site_id=site["id"],
                max_uses=2,
                expires_at=SOON,
                allowed_sources=["192.0.2.0/24"],
                approves_devices=False,
            )
            decoded = decode_token(new.pop("token"))
            assert (decoded.kind, str(decoded.id)) == ("gateway", new["id"])
            assert (decoded.portal, decoded.pin) == (here.office.portal, here.office.pin)
            stored = await here.store.find_token(decoded.id)
            assert stored is not None
            assert stored.hash == decoded.hash
            path = f"/v1/tokens/{new['id']}"
            assert (await client.get(path)).json() == new
            everything = (await client.get("/v1/changes")).text + (
                await client.get("/v1/tokens")
            ).text
            assert "hash" not in everything
            assert "hlw_" not in everything
            assert (await client.delete(path)).status_code == 204
            assert (await client.get(path)).status_code == 404


async def test_each_kind_of_token_wants_its_own_fields(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            member = await made(client, "principals", name="Uwe")
            site = await made(client, "sites", name="Berlin")
            member_id, site_id = {"principal_id": member["id"]}, {"site_id": site["id"]}
            for body, fields in [
                ({"kind": "client"}, ["principal_id"]),
                ({"kind": "client", **site_id}, ["principal_id", "site_id"]),
                ({"kind": "client", **member_id, "max_uses": 1}, ["max_uses"]),
                ({"kind": "client", **member_id, "approves_devices": False}, ["approves_devices"]),
                ({"kind": "gateway", **member_id}, ["principal_id", "site_id"]),
                ({"kind": "api", **member_id}, ["principal_id"]),
                (
                    {"kind": "gateway", **site_id, "allowed_sources": ["10.0.0.1/8"]},
                    ["allowed_sources[0]"],
                ),
                (
                    {"kind": "gateway", **site_id, "expires_at": "2020-01-01T00:00:00Z"},
                    ["expires_at"],
                ),
                ({"kind": "client", **member_id, "scopes": ["*:read"]}, ["scopes"]),
                ({"kind": "api", **member_id, "scopes": ["sites"]}, ["scopes[0]"]),
                ({"kind": "api", **member_id, "scopes": []}, ["scopes"]),
                ({"kind": "api", **member_id, "scopes": ["site:write"]}, ["scopes"]),
            ]:
                answer = await client.post("/v1/tokens", json={"name": "t", **body})
                assert answer.status_code == 422, body
                assert sorted(error["field"] for error in answer.json()["errors"]) == fields, body
            for kind in ("relay", "operator"):
                refused = await client.post("/v1/tokens", json={"kind": kind, "name": "r"})
                assert (refused.status_code, refused.json()["code"]) == (403, "operators_only")


async def test_operators_make_relay_tokens_and_see_relays(tmp_path: Path) -> None:
    async with installation(tmp_path) as here, here.client(here.operator_token) as operator:
        token = await made(operator, "tokens", kind="relay", name="relays")
        assert decode_token(token["token"]).kind == "relay"
        assert token["account_id"] is None
        shown = await operator.get(f"/v1/tokens/{token['id']}")
        assert shown.json() == {name: token[name] for name in token if name != "token"}
        relay = Relay(
            id=here.office.new_id(),
            token_id=UUID(token["id"]),
            name="frankfurt",
            failure_domain="rack-7",
            addresses=(
                SocketAddress(address="192.0.2.1", port=3478),
                SocketAddress(address="192.0.2.1", port=5349, transport="tls"),
            ),
            last_seen_at=here.office.clock.utc_now(),
        )
        await here.store.put_relay(relay)
        listed = (await operator.get("/v1/relays")).json()["items"]
        assert [each["failure_domain"] for each in listed] == ["rack-7"]
        assert [each["transport"] for each in listed[0]["addresses"]] == ["udp", "tls"]
        assert [(each["name"], each["online"]) for each in listed] == [("frankfurt", False)]
        assert (await operator.get(f"/v1/relays/{relay.id}")).json() == listed[0]
        assert (await operator.get(f"/v1/relays/{uuid4()}")).status_code == 404
        needs = await operator.post("/v1/tokens", json={"kind": "client", "name": "c"})
        assert (needs.status_code, needs.json()["code"]) == (400, "account_required")


async def test_operators_list_and_delete_the_tokens_of_the_installation(tmp_path: Path) -> None:
    async with installation(tmp_path) as here, here.client(here.operator_token) as operator:
        account_id, admin = await here.admin_of("acme")
        own = str(decode_token(here.operator_token).id)
        relays = await made(operator, "tokens", kind="relay", name="relays")
        await here.store.put_relay(
            Relay(
                id=here.office.new_id(),
                token_id=UUID(relays["id"]),
                name="frankfurt",
                addresses=(SocketAddress(address="192.0.2.1", port=3478),),
                last_seen_at=here.office.clock.utc_now(),
            )
        )
        listed = (await operator.get("/v1/tokens")).json()["items"]
        assert {each["id"]: each["kind"] for each in listed} == {
            own: "operator",
            relays["id"]: "relay",
        }
        first = (await operator.get("/v1/tokens", params={"limit": 1})).json()
        rest = await operator.get("/v1/tokens", params={"cursor": first["next_cursor"]})
        assert first["items"] + rest.json()["items"] == listed
        on_account = {"holloway-account": account_id}
        of_account = (await operator.get("/v1/tokens", headers=on_account)).json()["items"]
        assert [each["kind"] for each in of_account] == ["api"]

        async with here.client(admin) as client:  # who has no part in them sees nothing of them
            seen = (await client.get("/v1/tokens")).json()["items"]
            assert [each["id"] for each in seen] == [each["id"] for each in of_account]
            assert (await client.get(f"/v1/tokens/{relays['id']}")).status_code == 404
            assert (await client.delete(f"/v1/tokens/{relays['id']}")).status_code == 404

        assert (await operator.delete(f"/v1/tokens/{relays['id']}")).status_code == 204
        assert (await operator.get(f"/v1/tokens/{relays['id']}")).status_code == 400
        assert (await operator.get("/v1/relays")).json()["items"] == []

        last = await operator.delete(f"/v1/tokens/{own}")
        assert (last.status_code, last.json()["code"]) == (409, "last_operator_token")
        soon = here.office.clock.utc_now() + timedelta(seconds=1)
        await here.insert_token("operator", expires_at=soon - timedelta(hours=1))
        assert (await operator.delete(f"/v1/tokens/{own}")).status_code == 409
        async with here.client(await here.insert_token("operator")) as successor:
            assert (await operator.delete(f"/v1/tokens/{own}")).status_code == 204
            assert (await operator.get("/v1/accounts")).status_code == 401
            kinds = [each["kind"] for each in (await successor.get("/v1/tokens")).json()["items"]]
            assert kinds == ["operator", "operator"]


async def test_devices_are_seen_approved_renamed_and_removed(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            gateway = f"/v1/gateways/{ids['gateways']}"
            assert (await client.get(gateway)).json()["approved"] is False
            changed = await client.patch(gateway, json={"approved": True, "name": "gw-2"})
            assert (changed.json()["approved"], changed.json()["name"]) == (True, "gw-2")
            device = f"/v1/clients/{ids['clients']}"
            assert (await client.patch(device, json={"verified": True})).json()["verified"] is True
            for path, noun in ((gateway, "gateways"), (device, "clients")):
                shown = (await client.get(path)).json()
                assert shown["online"] is False
                assert (await client.get(f"/v1/{noun}")).json()["items"] == [shown]
                assert (await client.post(f"/v1/{noun}", json={})).status_code == 405
                assert (await client.delete(path)).status_code == 204
                assert (await client.get(path)).status_code == 404


async def test_what_refers_to_a_removed_thing_goes_with_it_and_changes_tell_so(
    tmp_path: Path,
) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            ids = await world(here, client)
            assert (await client.delete(f"/v1/sites/{ids['sites']}")).status_code == 204
            for noun in ("resources", "policies", "gateways"):
                assert (await client.get(f"/v1/{noun}/{ids[noun]}")).status_code == 404
            changes = (await client.get("/v1/changes?limit=1000")).json()["items"]
            assert [change["number"] for change in changes] == list(range(1, len(changes) + 1))
            gone = {change["kind"] for change in changes if change["after"] is None}
            assert gone == {"site", "resource", "policy", "policy_test", "gateway", "token"}
            token_id = str(decode_token(admin).id)
            assert all(token_id in change["who"] for change in changes[-5:])


async def test_lists_come_in_pages(tmp_path: Path) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            (internet,) = (await client.get("/v1/sites")).json()["items"]
            made_ids = [internet["id"]]
            made_ids += [(await made(client, "sites", name=f"s{i}"))["id"] for i in range(6)]
            for noun, expected in (("sites", made_ids), ("changes", None)):
                found: list[Any] = []
                cursor: str | None = ""
                while cursor is not None:
                    more = f"&cursor={cursor}" if cursor else ""
                    page = (await client.get(f"/v1/{noun}?limit=3{more}")).json()
                    assert len(page["items"]) <= 3
                    found += page["items"]
                    cursor = page["next_cursor"]
                if expected is not None:
                    assert [each["id"] for each in found] == expected
                else:
                    assert [each["number"] for each in found] == list(range(1, len(found) + 1))
            for query in ("limit=0", "limit=1001", "limit=x", "limit=-1", "cursor=!", "order=name"):
                answer = await client.get(f"/v1/sites?{query}")
                assert answer.status_code == 422, query
                assert answer.json()["errors"][0]["field"] == query.partition("=")[0]
            assert (await client.get("/v1/authorizations?live=true")).json()["items"] == []
            assert (await client.get("/v1/authorizations?live=yes")).status_code == 422


async def test_the_log_has_a_line_per_call_and_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with installation(tmp_path) as here:
        _, admin = await here.admin_of("acme")
        async with here.client(admin) as client:
            answer = await client.post("/v1/sites", json={"name": "a very private name"})
            await client.get("/v1/sites/hlw_api_misplaced-token?token=hlw_api_query")
    output = "".join(capsys.readouterr())
    line = next(
        each for each in output.splitlines() if answer.headers["holloway-request-id"] in each
    )
    for expected in ("POST", "/v1/sites", "201", "duration_ms", str(decode_token(admin).id)):
        assert expected in line
    assert "hlw_" not in output
    assert "private" not in output


async def test_the_openapi_document_is_complete_and_holds_together(tmp_path: Path) -> None:
    async with installation(tmp_path) as here, here.client(here.operator_token) as client:
        document = (await client.get("/v1/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        nouns = {path.split("/")[2] for path in document["paths"] if path.startswith("/v1/")}
        assert nouns == {noun.router.path.removeprefix("/v1/") for noun in NOUNS}
        described = {
            (method.upper(), path) for path, item in document["paths"].items() for method in item
        }
        for path in document["paths"]:
            concrete = path.replace("{id}", str(uuid4())).replace("{account_id}", str(uuid4()))
            concrete = concrete.replace("{number}", "1").replace("{name}", "a")
            allowed = (await client.options(concrete)).headers["allow"].split(", ")
            for method in allowed:
                assert method == "OPTIONS" or (method, path) in described
        operations = [each for item in document["paths"].values() for each in item.values()]
        names = [each["operationId"] for each in operations]
        assert len(set(names)) == len(names) == len(described) >= 80
        for path, item in document["paths"].items():
            for each in item.values():
                in_path = [p["name"] for p in each["parameters"] if p["in"] == "path"]
                assert in_path == [part[1:-1] for part in path.split("/") if part[:1] == "{"]
                assert each["responses"]
                assert each["summary"]
        for reference in references_in(document):
            found: Any = document
            for part in reference.removeprefix("#/").split("/"):
                found = found[part]
            assert found


def references_in(value: Any) -> list[str]:
    if isinstance(value, list):
        return [each for item in value for each in references_in(item)]
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [each for item in value.values() for each in references_in(item)]
    return []


async def test_the_documentation_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    async with installation(tmp_path) as here, here.client() as client:
        page = await client.get("/v1/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "//" not in page.text.replace("</", "").partition("<body>")[0]
        assert "http" not in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]


async def test_nodes_that_change_one_entity_at_once_take_nothing_back(
    tmp_path: Path, database: Logins
) -> None:
    async with two_nodes(tmp_path, database) as nodes, AsyncExitStack() as stack:
        _, admin = await nodes[0].admin_of("acme")
        one, other = [await stack.enter_async_context(node.client(admin)) for node in nodes]
        user = await made(one, "principals", name="Uwe")
        path = f"/v1/principals/{user['id']}"

        async def change(client: httpx.AsyncClient, **fields: Any) -> None:
            answer = await client.patch(path, json=fields)
            assert answer.status_code == 200, answer.text

        for number in range(20):
            fields = {"name": f"Uwe {number}", "email": f"uwe-{number}@example.org"}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(change, one, name=fields["name"]))
                nursery.start_soon(partial(change, other, email=fields["email"]))
            now = (await one.get(path)).json()
            assert fields.items() <= now.items()
