"""Which transport an agent tries, and when it looks for the better one."""

from __future__ import annotations

from channel.frames import encode_frame
from channel.messages import Challenge, Heartbeat
from channel.transports import (
    MAX_NETWORKS,
    Race,
    Return,
    ReturnTimes,
    TransportMemory,
    TransportOptions,
    is_left_behind,
)
from runtime.randomness import SeededRandomness

OPTIONS = TransportOptions()
CHALLENGE = encode_frame(Challenge(nonce=bytes(32), portal="portal.example"), limit=1 << 16)
S = 10**9


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


# --- the race ----------------------------------------------------------------------------------


def test_websocket_begins_when_quic_has_had_its_head_start() -> None:
    race = Race(2 * S, now=5)
    assert race.poll_timeout() == 5
    assert race.begin(5) == ("quic",)
    assert race.poll_timeout() == 5 + 2 * S
    assert race.begin(4 + 2 * S) == ()
    assert race.begin(5 + 2 * S) == ("websocket",)
    assert race.poll_timeout() is None
    assert not race.is_over


def test_without_a_head_start_both_begin_together() -> None:
    assert Race(0, now=0).begin(0) == ("quic", "websocket")


def test_who_is_first_is_taken_and_nobody_else() -> None:
    race = Race(0, now=0)
    race.begin(0)
    assert race.opened("websocket")
    assert not race.opened("quic")
    assert race.winner == "websocket"
    assert race.is_over


def test_who_is_first_within_the_head_start_leaves_no_second_one_to_begin() -> None:
    race = Race(S, now=0)
    race.begin(0)
    assert race.opened("quic")
    assert race.poll_timeout() is None
    assert race.begin(2 * S) == ()


def test_once_quic_has_failed_websocket_waits_no_longer() -> None:
    race = Race(3600 * S, now=0)
    race.begin(0)
    race.failed("quic", "the port is closed", 7)
    assert race.poll_timeout() == 7
    assert race.begin(7) == ("websocket",)
    assert not race.is_over
    race.failed("websocket", "so is that one", 9)
    assert race.is_over
    assert race.winner is None
    assert race.problems == ["quic: the port is closed", "websocket: so is that one"]


def test_what_never_began_or_comes_after_the_end_changes_nothing() -> None:
    race = Race(S, now=0)
    assert not race.opened("websocket")
    race.failed("websocket", "which was not asked", 0)
    assert race.begin(0) == ("quic",)
    assert race.opened("quic")
    race.failed("quic", "later", 1)
    assert race.winner == "quic"
    assert race.problems == []


# --- the way back --------------------------------------------------------------------------------


def waiting() -> tuple[Return, int]:
    """One that is due, and when."""
    back = Return(OPTIONS, SeededRandomness(1, "return"), 0)
    due = back.poll_timeout()
    assert due is not None
    return back, due


def test_the_way_back_is_asked_dialled_and_gone_once_the_portal_takes_us_in() -> None:
    back, due = waiting()
    assert not back.begin(due - 1)
    assert back.begin(due)
    assert not back.begin(due)
    assert back.poll_timeout() is None
    assert back.answered(True, due + 1)
    assert not back.began
    assert back.challenged(CHALLENGE, due + 2, older_stands=True)
    assert back.began
    back.failed(due + 3)
    assert back.began
    assert back.poll_timeout() is None


def test_a_question_without_an_answer_is_put_again_later() -> None:
    back, due = waiting()
    assert back.begin(due)
    assert not back.answered(False, due + S)
    again = back.poll_timeout()
    assert again is not None
    assert again >= due + S + OPTIONS.return_interval_ns


def test_a_connection_that_comes_to_nothing_leaves_the_older_one_alone() -> None:
    for first, stands in ((CHALLENGE, False), (encode_frame(Heartbeat(sent_ns=1), limit=99), True)):
        back, due = waiting()
        assert back.begin(due)
        assert back.answered(True, due)
        assert not back.challenged(first, due, older_stands=stands)
        assert not back.began
        assert back.poll_timeout() is not None
    back, due = waiting()
    assert back.begin(due)
    assert back.answered(True, due)
    back.failed(due)
    assert not back.began
    assert back.poll_timeout() is not None


def test_another_network_hastens_the_look_that_is_not_under_way() -> None:
    back, _ = waiting()
    back.hurry(3)
    assert back.poll_timeout() == 3
    assert back.begin(3)
    back.hurry(4)
    assert back.poll_timeout() is None


def test_what_the_step_does_not_wait_for_is_ignored() -> None:
    back, due = waiting()
    assert not back.answered(True, 1)
    assert not back.challenged(CHALLENGE, 1, older_stands=True)
    back.failed(1)
    assert back.poll_timeout() == due


def test_only_websocket_is_left_behind_where_the_own_address_is_another_one() -> None:
    assert is_left_behind("websocket", "192.0.2.1", "192.0.2.2")
    assert not is_left_behind("websocket", "192.0.2.1", "192.0.2.1")
    assert not is_left_behind("quic", "192.0.2.1", "192.0.2.2")
