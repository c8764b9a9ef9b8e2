"""Which transport an agent tries, and when it looks for the better one."""

from __future__ import annotations

from channel.transports import MAX_NETWORKS, ReturnTimes, TransportMemory, TransportOptions
from runtime.randomness import SeededRandomness

OPTIONS = TransportOptions()


def test_quic_has_a_head_start_that_depends_on_what_worked_on_that_network() -> None:
    memory = TransportMemory(OPTIONS)
    assert memory.websocket_after_ns("home") == OPTIONS.websocket_after_ns
    memory.worked("home", "quic")
    memory.worked("office", "websocket")
    assert memory.websocket_after_ns("home") == OPTIONS.websocket_after_known_quic_ns
    assert memory.websocket_after_ns("office") == 0
    memory.worked("office", "quic")
    assert memory.websocket_after_ns("office") == OPTIONS.websocket_after_known_quic_ns


def test_a_bounded_number_of_networks_is_remembered_the_latest_ones() -> None:
    memory = TransportMemory(OPTIONS)
    for number in range(MAX_NETWORKS + 1):
        memory.worked(str(number), "websocket")
        memory.worked("0", "websocket")
    assert memory.websocket_after_ns("0") == 0
    assert memory.websocket_after_ns("1") == OPTIONS.websocket_after_ns
    assert memory.websocket_after_ns(str(MAX_NETWORKS)) == 0


def test_looks_for_quic_become_rarer_up_to_a_bound_and_are_spread() -> None:
    firsts = set()
    for seed in range(20):
        times = ReturnTimes(OPTIONS, SeededRandomness(seed, "return"))
        waits = [times.next_ns() for _ in range(12)]
        bounds = [
            min(OPTIONS.return_interval_ns << n, OPTIONS.return_interval_cap_ns) for n in range(12)
        ]
        for wait, bound in zip(waits, bounds, strict=True):
            assert bound // 2 <= wait < bound * 3 // 2
        firsts.add(waits[0])
    assert len(firsts) == 20
