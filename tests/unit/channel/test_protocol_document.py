"""docs/protocol.md names what the code speaks: every event, field, reason and error code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import attrs
import pytest

from channel.agent_session import DialerOptions
from channel.credentials import TOKEN_KINDS
from channel.frames import AGENT_FRAME_LIMIT, CLOSE_CODES, PORTAL_FRAME_LIMIT, ErrorCode
from channel.listener import ChannelLimits
from channel.messages import (
    FROM_CLIENT,
    FROM_GATEWAY,
    FROM_RELAY,
    TO_CLIENT,
    TO_GATEWAY,
    TO_RELAY,
)
from channel.transports import PATH, SUBPROTOCOL
from runtime.clock import NS_PER_S

DOCUMENT = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
TABLES = (FROM_CLIENT, FROM_GATEWAY, FROM_RELAY, TO_CLIENT, TO_GATEWAY, TO_RELAY)
MESSAGES = sorted({(event, one) for table in TABLES for event, one in table.items()}, key=str)


@pytest.mark.parametrize(
    ("event", "message"), MESSAGES, ids=lambda one: getattr(one, "__name__", one)
)
def test_every_message_stands_there_with_all_its_fields(event: str, message: type) -> None:
    rows = [line for line in DOCUMENT.splitlines() if line.startswith(f"| `{event}` |")]
    wanted = {field.name for field in attrs.fields(message)}
    assert any(wanted <= set(re.findall(r"`(\w+)\??`", row)) for row in rows), wanted


def test_every_reason_has_its_code_there() -> None:
    for reason, code in CLOSE_CODES.items():
        assert f"| {code} | `{reason}` |" in DOCUMENT


def test_every_error_code_of_a_frame_stands_there() -> None:
    for code in get_args(ErrorCode):
        assert f"| `{code}` |" in DOCUMENT


def test_limits_and_kinds_stand_there() -> None:
    assert f"{AGENT_FRAME_LIMIT:,} from an agent" in DOCUMENT
    assert f"{PORTAL_FRAME_LIMIT:,} from the portal" in DOCUMENT
    for kind in TOKEN_KINDS:
        assert f"`{kind}`" in DOCUMENT


def test_what_a_websocket_is_asked_for_and_its_limits_stand_there() -> None:
    portal, agent = ChannelLimits().websocket, DialerOptions()
    assert f"`GET {PATH}`" in DOCUMENT
    assert f"`{SUBPROTOCOL}`" in DOCUMENT
    assert portal.message_bytes == agent.websocket.message_bytes
    assert f"**{portal.message_bytes:,} B**" in DOCUMENT
    assert f"{portal.max_handshakes:,}, and {portal.max_handshakes_per_source:,} for" in DOCUMENT
    assert f"there are {portal.max_connections:,} (" in DOCUMENT
    assert f"{portal.max_connections_per_source:,} for each source" in DOCUMENT
    assert "4 s over WebSocket" in DOCUMENT
    assert agent.websocket.handshake_timeout_ns == 4 * NS_PER_S
    assert f"over WebSocket {agent.transports.websocket_after_ns / NS_PER_S} s later" in DOCUMENT
