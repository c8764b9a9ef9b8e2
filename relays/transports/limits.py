"""What a connection between a client and a relay may take, over TCP, TLS and QUIC, at both ends."""

from __future__ import annotations

from typing import Final

QUEUED_DATA_BYTES: Final = 256 * 1024
"""Waiting to be sent; beyond, data (ChannelData, Send and Data indications) is dropped, as by a
full router: half a second at 4 Mbit/s, and later is as good as lost."""
QUEUED_BYTES: Final = 320 * 1024
"""With requests and answers; beyond, the connection ends."""
UNALLOCATED_FRAME_BYTES: Final = 4_096
"""The longest message of a client without an allocation: no request is as long."""
UNALLOCATED_S: Final = 30.0
"""For an allocation to begin, and for another one after it ended. One with an allocation is kept
for as long as that is refreshed (at most an hour at a time)."""
