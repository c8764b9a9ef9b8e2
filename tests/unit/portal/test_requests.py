"""What comes in: strict bodies, canonical networks, networks that are no resource."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.model import Account, Conditions
from portal.api.conditions import ConditionsBody, conditions_of
from portal.api.pagination import PageRequest, _decode, _encode
from portal.api.policies import PolicyCreate, PolicyUpdate
from portal.api.problems import Problem
from portal.api.requests import Checks, changes_of, decode_body
from portal.api.resources import ResourceCreate
from portal.api.sites import SiteCreate, SiteUpdate

NOW = datetime(2026, 11, 23, tzinfo=UTC)
TUNNEL = {
    "tunnel": (
        Account.__attrs_attrs__.range_ipv4.default,  # type: ignore[attr-defined]  # attrs adds it
        Account.__attrs_attrs__.range_ipv6.default,  # type: ignore[attr-defined]
    )
}
SITE = "01a20a28-2cd1-787e-b012-023ea85ce247"


def problem_of(content: bytes, body_type: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        decode_body(content, body_type)
    return caught.value


def test_a_good_body_is_decoded() -> None:
    assert decode_body(b'{"name": "Berlin"}', SiteCreate) == SiteCreate(name="Berlin")


def test_the_conditions_of_the_guide_are_taken() -> None:
    guide = (Path(__file__).resolve().parents[3] / "docs" / "policy.md").read_text()
    written = guide.partition("```json\n")[2].partition("```")[0]
    checks = Checks()
    conditions = conditions_of(checks, decode_body(written.encode(), ConditionsBody))
    checks.finish()
    assert all(getattr(conditions, each.name) for each in attrs.fields(Conditions))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"nul", b'{"name": "\xff"}'])
def test_what_is_no_json_is_400(content: bytes) -> None:
    problem = problem_of(content, SiteCreate)
    assert (problem.status, problem.code) == (400, "malformed_json")


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (b"[]", ""),
        (b"null", ""),
        (b'"name"', ""),
        (b"{}", "name"),
        (b'{"name": 1}', "name"),
        (b'{"name": null}', "name"),
        (b'{"name": ""}', "name"),
        (b'{"name": "a\\u0000b"}', "name"),
        (b'{"name": "a", "nmae": "b"}', "nmae"),
    ],
)
def test_what_does_not_fit_is_422_and_names_the_field(content: bytes, field: str) -> None:
    problem = problem_of(content, SiteCreate)
    assert (problem.status, problem.code) == (422, "invalid_fields")
    assert [error.field for error in problem.errors] == [field]


def test_a_field_deep_inside_is_named_by_its_path() -> None:
    body = (
        b'{"site_ids": ["%s"], "name": "a", "kind": "cidr", "address": "10.0.0.0/8",'
        b' "filters": [{"protocol": "tcp"}, {"protocol": "tcp", "port_start": "1"}]}'
    ) % SITE.encode()
    assert problem_of(body, ResourceCreate).errors[0].field == "filters[1].port_start"
    body = body.replace(b'"port_start": "1"', b'"port": 1')
    assert problem_of(body, ResourceCreate).errors[0].field == "filters[1].port"


def test_nothing_is_coerced() -> None:
    ids = b'"group_id": "%s", "resource_id": "%s"' % (SITE.encode(), SITE.encode())
    assert decode_body(b"{%s}" % ids, PolicyCreate).lease_s == 86_400
    for extra in (b'"lease_s": "60"', b'"lease_s": 60.5', b'"disabled": 1', b'"lease_s": true'):
        assert problem_of(b"{%s, %s}" % (ids, extra), PolicyCreate).status == 422


def test_an_instant_needs_its_offset() -> None:
    body = b'{"expires_at": "2027-01-01T00:00:00"}'
    assert problem_of(body, PolicyUpdate).errors[0].field == "expires_at"


def test_an_update_changes_only_what_it_names() -> None:
    assert changes_of(decode_body(b"{}", SiteUpdate)) == {}
    assert changes_of(decode_body(b'{"name": "b"}', SiteUpdate)) == {"name": "b"}
    assert changes_of(decode_body(b'{"expires_at": null}', PolicyUpdate)) == {"expires_at": None}


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_problem(content: bytes) -> None:
    try:
        decode_body(content, PolicyCreate)
    except Problem as problem:
        assert problem.status in (400, 422)  # noqa: PT017  # a success is as good


def test_deep_nesting_is_a_problem_not_a_crash() -> None:
    assert problem_of(b"[" * 500_000, PolicyCreate).status in (400, 422)
    deep = b'{"conditions":' * 100_000
    assert problem_of(deep, PolicyCreate).status in (400, 422)


def refused(check: str, *arguments: Any) -> list[str]:
    checks = Checks()
    getattr(checks, check)("field", *arguments)
    try:
        checks.finish()
    except Problem as problem:
        return [error.message for error in problem.errors]
    return []


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.1.0.0/16", "10.1.0.0/16"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("2001:db8:0:0::7", "2001:db8::7/128"),
    ],
)
def test_networks_become_canonical(text: str, canonical: str) -> None:
    assert Checks().network("field", text) == canonical


def test_host_bits_are_refused_with_the_network_that_was_meant() -> None:
    assert refused("network", "10.1.2.3/16") == [
        "10.1.2.3/16 has bits set below its prefix; did you mean 10.1.0.0/16?"
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "10", "10.0.0.0/33", "10.0.0.0/255.0.0.0", "a.example", "10.0.0.0/ 8", "::/129"),
        *("fe80::1%eth0", "10.0.0.0/-1", "010.0.0.0/8", "10.0.0.0/٨"),
    ],
)
def test_what_is_no_network_is_refused(text: str) -> None:
    assert len(refused("network", text)) == 1


def test_an_address_is_one_address() -> None:
    assert Checks().address("field", "10.0.0.1") == "10.0.0.1"
    assert Checks().address("field", "10.0.0.1/32") == "10.0.0.1"
    assert len(refused("address", "10.0.0.0/24")) == 1


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0/0",
        "::/0",
        "0.0.0.0/1",
        "127.0.0.1/32",
        "127.0.0.0/8",
        "126.0.0.0/7",
        "::1/128",
        "169.254.169.254",
        "fe80::/64",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
        "::/96",
        "100.64.0.0/24",
        "100.64.0.0/10",
        "100.96.0.0/16",
        "100.100.111.1",
        "fd48:4c57:5900::1",
        "fd48:4c57:5901::/64",
        "fd00::/8",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "64:ff9b:1::/48",
        "2002::/16",
        "240.0.0.0/4",
        "100.100.100.200",
        "168.63.129.16",
        "fd00:ec2::254",
        "128.0.0.0/1",
    ],
)
def test_what_no_resource_may_touch_is_refused(address: str) -> None:
    assert len(refused("resource_address", address, TUNNEL)) == 1


@pytest.mark.parametrize("address", ["10.0.0.0/8", "192.0.2.1", "100.128.0.0/16", "2001:db8::/32"])
def test_other_networks_are_resources(address: str) -> None:
    assert refused("resource_address", address, TUNNEL) == []


@given(st.ip_addresses(), st.integers(0, 128))
def test_whatever_is_accepted_is_canonical(address: Any, length: int) -> None:
    checks = Checks()
    text = checks.network("field", f"{address}/{length}")
    try:
        checks.finish()
    except Problem:
        return
    assert str(ip_network(text)) == text


def test_an_end_lies_in_the_future() -> None:
    checks = Checks()
    assert checks.future("field", None, NOW) is None
    later = (NOW + timedelta(hours=1)).astimezone(timezone(timedelta(hours=5)))
    end = checks.future("field", later, NOW)
    assert end == later
    assert end is not None
    assert end.tzinfo is UTC
    checks.finish()
    assert len(refused("future", NOW, NOW)) == 1
    assert len(refused("future", datetime.max.replace(tzinfo=timezone(timedelta(hours=-9))), NOW))


def test_all_wrong_fields_are_told_at_once() -> None:
    checks = Checks()
    checks.networks("values", ["x", "10.0.0.0/8", "y"])
    with pytest.raises(Problem) as caught:
        checks.finish()
    assert [error.field for error in caught.value.errors] == ["values[0]", "values[2]"]


@given(st.uuids() | st.integers(0, 2**63 - 1))
def test_a_cursor_survives_the_journey(last: Any) -> None:
    page = PageRequest(cursor=_decode(_encode(last)))
    assert last == (page.after_number() if isinstance(last, int) else page.after_id())


@pytest.mark.parametrize("text", ["a", "ä", "a" * 65, "AAAA"])
def test_a_cursor_of_ones_own_making_is_refused(text: str) -> None:
    with pytest.raises(Problem):
        PageRequest(cursor=_decode(text)).after_id()
    with pytest.raises(Problem):
        PageRequest(cursor=_decode(text)).after_number()
