"""Faults of the kernel twin that are of no network: a database that is slow, users that vanish."""

from __future__ import annotations

import time
from collections.abc import Iterator

import attrs
import psycopg
import pytest

from simulations.installation import wait_until
from simulations.kernel.database import LabDatabase
from simulations.kernel.lab import Lab, LabError
from simulations.kernel.obstacles import liberties, obstacles
from simulations.scenario.load import ready
from simulations.scenario.schema import Check, Client, Fault, User
from tests.system.both_worlds import hastened, in_both_worlds

pytestmark = pytest.mark.system

MS = 10**6


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


def test_a_slow_database_answers_late_and_is_as_before_then(lab: Lab) -> None:
    database = LabDatabase(lab.directory / "one", lab.router("one"), may_be_slow=True)
    database.start()
    try:
        with psycopg.connect(database.url_file.read_text(), autocommit=True) as connection:

            def took_s() -> float:
                began = time.monotonic()
                assert connection.execute("SELECT 1").fetchone() == (1,)
                return time.monotonic() - began

            took_s()
            assert took_s() < 0.2
            database.answer_after(300 * MS)
            wait_until(lambda: took_s() >= 0.3, what="it is slow")
            database.pause()
            database.resume()
            assert took_s() >= 0.3
            large = connection.execute("SELECT repeat('x', 1000000)").fetchone()
            assert large is not None
            assert len(large[0]) == 1_000_000
            database.answer_after(0)
            wait_until(lambda: took_s() < 0.2, what="it is as before")
    finally:
        database.stop()
    database.stop()


def test_a_database_that_was_not_made_to_be_slow_says_so(lab: Lab) -> None:
    database = LabDatabase(lab.directory / "two", lab.router("two"))
    with pytest.raises(LabError, match="not made to be slow"):
        database.answer_after(1)


def test_a_slow_database_delays_a_policy_in_both_worlds_and_nothing_else() -> None:
    scenario = hastened(ready("home-office"), 3)
    slow = Fault(at="3s", kind="database", slow="150ms", duration="8s")
    added = Fault(at="5s", kind="change", change="add_policy", subject=("contractors-wiki",))
    scenario = attrs.evolve(
        scenario,
        faults=(slow, added),
        checks=(
            Check(kind="reach", source=("desktop",), to=("wiki",), within="4s"),
            Check(kind="uninterrupted", source=("laptop",), at="1s", within="2s"),
            Check(kind="denied", source=("tablet",), to=("wiki",)),
        ),
    )
    assert obstacles(scenario) == []
    assert any("round trip" in each for each in liberties(scenario))
    _, kernel = in_both_worlds(scenario)
    outcomes = {pair.client: pair.outcome for pair in kernel.pairs}
    assert outcomes == {"laptop": "direct", "tablet": "denied", "desktop": "direct"}
    assert [fault.text.startswith("nothing") for fault in kernel.faults] == [False, False]


def test_the_same_users_vanish_in_both_worlds() -> None:
    scenario = hastened(ready("home-office"), 3)
    users = tuple(User(name=f"user-{n}", groups=("engineers",)) for n in range(4))
    scenario = attrs.evolve(
        scenario,
        account=attrs.evolve(scenario.account, users=users, policies=scenario.account.policies[:1]),
        clients=tuple(
            Client(name=f"client-{n}", network="home", user=f"user-{n}") for n in range(4)
        ),
        faults=(Fault(at="6s", kind="shrink_directory", share="50%"),),
        checks=(),
    )
    _, kernel = in_both_worlds(scenario)
    outcomes = sorted(pair.outcome for pair in kernel.pairs)
    assert outcomes == ["denied", "denied", "direct", "direct"]
