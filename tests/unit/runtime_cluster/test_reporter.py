"""A node answers what it is asked, from whatever node."""

from typing import Any

import msgspec
import pytest

from runtime.actor import NamedRef, NodeLost, Refused
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.cluster.envelopes import make_codec
from runtime.cluster.reporter import (
    MAX_ANSWER_BYTES,
    REPORTER,
    AskNode,
    NodeAnswer,
    Reporter,
)
from runtime.cluster.testing import HeapCluster
from runtime.randomness import SeededRandomness


@pytest.fixture
def cluster() -> HeapCluster:
    cluster = HeapCluster(make_codec({}), SeededRandomness(1, "cluster"))
    cluster.add("a")
    asked: list[str] = []
    answers: dict[str, Any] = {
        "status": lambda: {"node": "b", "times": len(asked)},
        "much": lambda: "x" * MAX_ANSWER_BYTES,
        "just enough": lambda: "x" * (MAX_ANSWER_BYTES - 2),
        "again": lambda: asked.append("again"),
    }
    cluster.add("b").scheduler.spawn(Reporter(answers), name=REPORTER)
    cluster.run_for(NS_PER_MS)
    return cluster


def ask(cluster: HeapCluster, question: str, node: str = "a") -> Any:
    answer = cluster.call(node, NamedRef(REPORTER, "b"), AskNode(question))
    assert isinstance(answer, NodeAnswer)
    return msgspec.json.decode(answer.json)


def test_each_question_is_answered_as_things_are_then(cluster: HeapCluster) -> None:
    for node in "ab":
        assert ask(cluster, "status", node)["node"] == "b"
    assert ask(cluster, "again") is None
    assert ask(cluster, "status") == {"node": "b", "times": 1}


def test_what_nobody_knows_is_refused_here_and_there(cluster: HeapCluster) -> None:
    with pytest.raises(Refused, match=r"LookupError.*nobody knows of 'age'"):
        ask(cluster, "age")
    with pytest.raises(LookupError, match="nobody knows of 'age'"):
        ask(cluster, "age", node="b")


def test_an_answer_has_a_limit(cluster: HeapCluster) -> None:
    assert len(ask(cluster, "just enough")) == MAX_ANSWER_BYTES - 2
    with pytest.raises(Refused, match="ValueError"):
        ask(cluster, "much")
    assert ask(cluster, "status")["node"] == "b"


def test_a_question_too_long_ends_the_link_and_reaches_nobody(cluster: HeapCluster) -> None:
    with pytest.raises(NodeLost):
        ask(cluster, "x" * 101)
    assert len(cluster.protocol_errors) == 1
    cluster.run_for(NS_PER_S)
    assert ask(cluster, "status")["node"] == "b"
