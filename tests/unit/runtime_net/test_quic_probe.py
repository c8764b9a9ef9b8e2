"""A question of a datagram, and what counts as its answer."""

from __future__ import annotations

from aioquic.buffer import Buffer
from aioquic.quic.packet import encode_quic_version_negotiation, pull_quic_header
from hypothesis import given
from hypothesis import strategies as st

from runtime.net.quic_probe import (
    INTERVAL_NS,
    PROBE_BYTES,
    TRIES,
    QuicProbe,
    is_answer,
    negotiation,
    probe_datagram,
)
from runtime.randomness import SeededRandomness

THERE, HERE = b"t" * 8, b"h" * 8


def test_the_question_is_a_first_flight_of_a_version_that_nobody_speaks() -> None:
    question = probe_datagram(THERE, HERE)
    assert len(question) == PROBE_BYTES
    header = pull_quic_header(Buffer(data=question), host_cid_length=8)
    assert (header.destination_cid, header.source_cid) == (THERE, HERE)
    assert header.version is not None
    assert header.version & 0x0F0F0F0F == 0x0A0A0A0A


def test_only_what_repeats_both_ids_is_an_answer() -> None:
    answer = encode_quic_version_negotiation(
        source_cid=THERE, destination_cid=HERE, supported_versions=[1]
    )
    assert is_answer(answer, THERE, HERE)
    assert not is_answer(answer, HERE, THERE)
    assert not is_answer(answer, THERE, b"x" * 8)
    assert not is_answer(probe_datagram(THERE, HERE), THERE, HERE)


@given(st.binary(max_size=100))
def test_other_bytes_are_none(data: bytes) -> None:
    assert not is_answer(data, THERE, HERE)


def answer_to(question: bytes) -> bytes:
    header = pull_quic_header(Buffer(data=question), host_cid_length=8)
    return encode_quic_version_negotiation(
        source_cid=header.destination_cid,
        destination_cid=header.source_cid,
        supported_versions=[1],
    )


def test_it_asks_a_few_times_and_takes_the_silence_for_no() -> None:
    probe = QuicProbe(SeededRandomness(1, "probe").bytes, 5)
    sent_at = []
    while (due := probe.poll_timeout()) is not None:
        assert probe.handle_timeout(due - 1) is None
        if probe.handle_timeout(due) is not None:
            sent_at.append(due)
    assert probe.outcome is False
    assert sent_at == [5 + n * INTERVAL_NS for n in range(TRIES)]


def test_the_answer_to_any_of_its_questions_ends_it() -> None:
    probe = QuicProbe(SeededRandomness(1, "probe").bytes, 0)
    question = probe.handle_timeout(0)
    assert question is not None
    assert probe.handle_timeout(INTERVAL_NS) == question
    probe.receive(question)
    assert probe.outcome is None
    probe.receive(answer_to(question))
    assert probe.outcome is True
    assert probe.poll_timeout() is None
    assert probe.handle_timeout(2 * INTERVAL_NS) is None


@given(st.binary(max_size=40))
def test_what_a_server_in_virtual_time_answers_is_what_a_real_one_does(rest: bytes) -> None:
    question = probe_datagram(THERE, HERE)
    answer = negotiation(question)
    assert answer is not None
    assert answer[1:] == answer_to(question)[1:]
    assert answer[0] & 0x80
    assert negotiation(question[:-1]) is None
    assert negotiation(rest) is None
