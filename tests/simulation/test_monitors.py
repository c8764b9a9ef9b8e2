"""What monitors are told of a run, and that the rules see what they are made for."""

from __future__ import annotations

from collections import Counter
from uuid import UUID

from actors.model import Authorization, Change
from runtime.net.address import Address
from simulations.checks.interface import Observer, Subject
from simulations.run import run

from .scenarios import scenario


class Everything(Observer):
    """Counts what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.heard_of: Counter[str] = Counter()
        self.payloads: list[bytes] = []
        self.sent: list[bytes] = []
        self.keys: set[tuple[str, bytes, int]] = set()

    def introduced(self, now: int, subject: Subject) -> None:
        self.heard_of[f"introduced {subject.kind}"] += 1

    def datagram(
        self, now: int, event: str, hop: str, source: Address, destination: Address, data: bytes
    ) -> None:
        self.heard_of[event] += 1
        if event == "sent":
            self.sent.append(data)

    def asked(self, now: int, client: str, resource: str, packet: bytes) -> None:
        self.heard_of["asked"] += 1
        self.payloads.append(packet[28:])

    def answered(self, now: int, client: str, packet: bytes) -> None:
        self.heard_of["answered"] += 1

    def forwarded(self, now: int, gateway: str, client: str, packet: bytes) -> None:
        assert client == "laptop"
        self.heard_of["forwarded"] += 1

    def returned(self, now: int, gateway: str, packet: bytes) -> None:
        self.heard_of["returned"] += 1

    def changed(self, now: int, changes: tuple[Change, ...]) -> None:
        self.heard_of["changed"] += 1

    def authorization_written(
        self, now: int, node: str, authorization: Authorization, epoch: int
    ) -> None:
        self.heard_of["written"] += 1

    def granted(
        self, now: int, gateway: str, client: str, authorization_id: UUID, resource_id: UUID
    ) -> None:
        self.heard_of["granted"] += 1

    def owner_claimed(
        self, now: int, node: str, incarnation: int, account_id: UUID, epoch: int
    ) -> None:
        self.heard_of["claimed"] += 1

    def sealed(self, now: int, host: str, key: bytes, counter: int, datagram: bytes) -> None:
        self.keys.add((host, key, counter))
        self.heard_of["sealed"] += 1


def test_a_monitor_hears_of_every_step_of_an_access_and_disturbs_nothing() -> None:
    monitor = Everything()
    result = run(scenario(), 1, monitors=(monitor,))
    assert result.trace == run(scenario(), 1).trace
    heard = monitor.heard_of
    for kind in ("client", "gateway", "resource", "policy", "user", "site", "account"):
        assert heard[f"introduced {kind}"]
    assert heard["sent"] >= heard["delivered"] > 0
    assert heard["translated"] > 0
    assert heard["claimed"] == heard["written"] == heard["granted"] == 1
    assert heard["asked"] == heard["forwarded"] == heard["returned"] == heard["answered"] == 20
    assert heard["sealed"] == len(monitor.keys) >= 40


def test_no_word_of_an_application_is_on_a_wire_that_a_monitor_sees() -> None:
    monitor = Everything()
    run(scenario(), 1, monitors=(monitor,))
    assert len(monitor.payloads) == 20
    assert not [data for data in monitor.sent for words in monitor.payloads if words in data]
