"""What is asked for, how often, and what is remembered of the answers."""

from __future__ import annotations

from uuid import UUID

from clients.requests import (
    ANSWER_WITHIN_NS,
    ASK_BURST,
    MAX_REQUESTS,
    SECOND_NS,
    Denial,
    Requests,
)
from tunnel.preshared import KemKey

KEY = KemKey(bytes(64))
WEB = UUID(int=1)


def ask(requests: Requests, now: int) -> int:
    due = requests.due(now)
    for resource_id in due:
        requests.asked(resource_id, KEY, now)
    return len(due)


def test_many_resources_are_asked_for_at_a_bounded_rate() -> None:
    requests = Requests(0)
    for number in range(ASK_BURST + 20):
        requests.want(UUID(int=number), b"packet", 0)
    assert ask(requests, 0) == ASK_BURST
    assert ask(requests, 0) == 0
    at = requests.poll_timeout(True)
    assert at is not None
    assert 0 < at <= SECOND_NS // 10
    assert ask(requests, at) == 1
    assert ask(requests, at + SECOND_NS) == 10


def test_requests_have_a_limit() -> None:
    requests = Requests(0)
    for number in range(MAX_REQUESTS + 10):
        requests.want(UUID(int=number), None, 0)
    assert len(requests.waiting()) == MAX_REQUESTS


def test_while_the_channel_is_away_only_the_end_of_patience_is_waited_for() -> None:
    requests = Requests(0)
    requests.want(WEB, b"packet", 5)
    assert requests.poll_timeout(False) == 5 + ANSWER_WITHIN_NS
    assert requests.take_stale(4 + ANSWER_WITHIN_NS) == []
    assert requests.take_stale(5 + ANSWER_WITHIN_NS) == [b"packet"]
    assert requests.poll_timeout(True) is None


def test_what_was_not_answered_is_asked_again_with_the_same_key() -> None:
    requests = Requests(0)
    requests.want(WEB, b"packet", 0)
    assert requests.key_of(WEB) is None
    ask(requests, 0)
    requests.take_stale(ANSWER_WITHIN_NS)  # nobody waits any more, but an answer may still come
    requests.want(WEB, b"packet", ANSWER_WITHIN_NS)
    assert requests.key_of(WEB) is KEY
    ask(requests, ANSWER_WITHIN_NS)
    assert requests.answered(WEB) is not None
    assert requests.key_of(WEB) is None


def test_a_denial_and_an_answer_of_no_use_end_a_key() -> None:
    for end in ("denied", "of no use"):
        requests = Requests(0)
        requests.want(WEB, b"packet", 0)
        ask(requests, 0)
        if end == "denied":
            requests.deny(
                WEB, Denial(at_ns=1, reason="forbidden", violated=(), retry_after_ns=0), 1
            )
        else:
            request = requests.answered(WEB)
            assert request is not None
            requests.retry(request, 1)
        assert requests.key_of(WEB) is None


def test_keys_that_wait_for_an_answer_have_a_limit() -> None:
    requests = Requests(0)
    for number in range(MAX_REQUESTS + 10):
        requests.want(UUID(int=number), None, 0)
        requests.asked(UUID(int=number), KEY, 0)
        requests.take_stale(ANSWER_WITHIN_NS)
    kept = sum(requests.key_of(UUID(int=number)) is KEY for number in range(MAX_REQUESTS + 10))
    assert kept == MAX_REQUESTS


def test_a_lost_channel_makes_everything_due_again() -> None:
    requests = Requests(0)
    requests.want(WEB, b"packet", 0)
    assert ask(requests, 0) == 1
    requests.channel_lost(1)
    assert ask(requests, 1) == 1


def test_a_path_that_came_back_needs_no_question_that_was_not_put_yet() -> None:
    requests = Requests(0)
    requests.want(WEB, b"one", 0)
    assert requests.take_packets(WEB) == [b"one"]
    assert requests.waiting() == []
    requests.want(WEB, b"two", 0)
    assert ask(requests, 0) == 1
    assert requests.take_packets(WEB) == [b"two"]
    assert requests.waiting() == [WEB]  # the answer is on its way, and needs the key
    answered = requests.answered(WEB)
    assert answered is not None
    assert answered.key is KEY


def test_denials_are_shown_for_ten_minutes_and_no_longer() -> None:
    requests = Requests(0)
    denial = Denial(reason="forbidden", violated=("policy",), at_ns=0, retry_after_ns=0)
    requests.deny(WEB, denial, 0)
    assert requests.denied(WEB, SECOND_NS)
    assert not requests.denied(WEB, 2 * SECOND_NS)
    later = 601 * SECOND_NS
    other = Denial(reason="offline", violated=(), at_ns=later, retry_after_ns=0)
    requests.deny(UUID(int=2), other, later)
    assert [resource_id for resource_id, _ in requests.denials()] == [UUID(int=2)]
