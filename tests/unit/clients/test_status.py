"""`holloway status` on a terminal of 80 columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from clients.status import render

RELAYED: dict[str, Any] = {
    "name": "gateway-1.office.example",
    "path": {
        "kind": "relayed",
        "local": "203.0.113.106:65535",
        "remote": "203.0.113.106:49152",
        "relay": "203.0.113.106:3478",
        "rtt_ns": 123_456_789,
    },
    "bytes_in": 1023 << 20,
    "bytes_out": 5,
    "resources": [{"name": "Intranet"}, {"name": "Databases"}],
}


def shown(**status: Any) -> str:
    text = io.StringIO()
    whole = {"kind": "client", "name": "laptop", "connected_to_portal": True, **status}
    render(whole, Console(file=text, width=80, highlight=False))
    return text.getvalue()


def test_whole_addresses_fit_into_eighty_columns() -> None:
    text = shown(peers=[RELAYED])
    for whole in ("203.0.113.106:65535", "203.0.113.106:49152", "203.0.113.106:3478", "Databases"):
        assert whole in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(("by", "word"), [("tls", "TLS"), ("quic", "QUIC"), ("tcp", "TCP")])
def test_a_path_through_a_relay_that_udp_does_not_reach_is_told_in_words(
    by: str, word: str
) -> None:
    path = {**RELAYED["path"], "relay": "203.0.113.106:5349", "by": by}
    relays = [{"by": by}, {"by": None}]
    lines = shown(peers=[{**RELAYED, "path": path}], relays=relays).splitlines()
    assert f"relays: reached by {word} (UDP seems to be blocked)" in lines
    assert f"gateway-1.office.example: relayed by {word}, round trip 123.5 ms" in lines
    assert any(line.endswith(" at 203.0.113.106:5349") for line in lines)
    assert max(map(len, lines)) <= 80


def test_of_relays_that_udp_reaches_nothing_is_said() -> None:
    path = {**RELAYED["path"], "by": "udp"}
    text = shown(peers=[{**RELAYED, "path": path}], relays=[{"by": "udp"}, {"by": "udp"}])
    assert "reached by" not in text
    assert "relayed by 203.0.113.106:3478" in text


def test_denials_and_what_is_waited_for_are_told_in_words() -> None:
    denial = {
        "resource": "Intranet",
        "resource_id": "",
        "reason": "forbidden",
        "violated": ["policy"],
        "age_ns": 3 * 10**9,
    }
    text = shown(peers=[], denials=[denial], waiting=["Databases"])
    assert "no tunnels at present" in text
    assert "denied: Intranet: forbidden (policy), 3 s ago" in text
    assert "waiting for an answer: Databases" in text


def test_names_are_no_markup() -> None:
    text = shown(peers=[{**RELAYED, "name": "[red]gateway[/blue]", "resources": [{"name": "[/]"}]}])
    assert "[red]gateway[/blue]" in text
    assert "[/]" in text


def test_the_transport_to_the_portal_is_named_while_it_stands() -> None:
    def line(**channel: object) -> str:
        return shown(channel=channel).splitlines()[0]

    assert line(connected=True, transport="quic").endswith("connected to the portal (QUIC)")
    assert line(connected=True, transport="websocket").endswith(
        "connected to the portal (WebSocket: UDP seems to be blocked)"
    )
    assert line(connected=False, transport="websocket").endswith("connected to the portal")
