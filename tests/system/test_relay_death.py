"""Two relays of different failure domains, and a laptop and its gateway that can meet only at one
of them: real processes behind symmetric NATs. A long download goes on while relays die, come back
and drain.

The stalls that are printed are what a person would notice; only bounds that no busy machine exceeds
are asserted.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from simulations.installation import Installation, wait_until
from tests.system.two_relays import (
    GENEROUS_S,
    Download,
    come_back,
    downloading,
    other,
    relay_in_use,
    whole,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def it() -> Iterator[Installation]:
    yield from whole(blocked=False)


@pytest.fixture
def download(it: Installation) -> Iterator[Download]:
    with downloading(it) as running:
        yield running


def test_a_download_outlives_the_relay_that_carries_it(
    it: Installation, download: Download
) -> None:
    used = relay_in_use(it)
    it.components[used].kill()
    assert download.stalled_s("the relay in use was killed") < GENEROUS_S
    assert relay_in_use(it) == other(it, used)
    come_back(it, it.components[used], "udp")


def test_a_path_that_has_stood_for_long_moves_as_quickly(
    it: Installation, download: Download
) -> None:
    """By then pairs that nobody needs are no longer checked."""
    download.goes_on(for_bytes=60 << 20)
    download.longest_stall_s()
    used = relay_in_use(it)
    it.components[used].kill()
    assert download.stalled_s("the relay of an old path was killed") < GENEROUS_S
    assert relay_in_use(it) == other(it, used)
    come_back(it, it.components[used], "udp")


def test_a_relay_that_drains_is_left_and_ends(it: Installation, download: Download) -> None:
    used = relay_in_use(it)
    relay = it.components[used]
    relay.signal(signal.SIGTERM)
    wait_until(lambda: not relay.alive(), what="the drained relay ends", timeout_s=50)
    assert download.stalled_s("the relay in use drained") < GENEROUS_S
    assert relay_in_use(it) == other(it, used)
    come_back(it, relay, "udp")
