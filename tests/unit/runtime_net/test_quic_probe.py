"""A question of a datagram, and what counts as its answer."""

from __future__ import annotations

from aioquic.buffer import Buffer
from aioquic.quic.packet import encode_quic_version_negotiation, pull_quic_header
from hypothesis import given
from hypothesis import strategies as st

from runtime.net.quic_probe import PROBE_BYTES, is_answer, probe_datagram

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
