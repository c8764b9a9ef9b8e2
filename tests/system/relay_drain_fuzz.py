"""Feeds the compiled drain what nobody should send, for so many seconds; run by
`test_relay_drain_sanitized.py` with an extension that was built under the sanitizers.

    python -m tests.system.relay_drain_fuzz EXTENSION SECONDS SEED
"""

from __future__ import annotations

import contextlib
import select
import sys
import time
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

from relays.turn import channel_data
from runtime.randomness import SeededRandomness
from tests.system.relay_paths import RELAY, End, RealBench
from tests.unit.relays.bench import LIFETIME_0, Caller

HOSTS = ["127.0.0.1", "192.0.2.1", "::1", "fe80::1", "fe80::1%lo", "", "x" * 300, "2001:db8::7"]


def load(path: str) -> ModuleType:
    spec = spec_from_file_location("_drain", path, loader=ExtensionFileLoader("_drain", path))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Luck(SeededRandomness):
    def one_of(self, choices: list[Any]) -> Any:
        return choices[self.integer(len(choices))]


def call_at_random(extension: ModuleType, luck: Luck) -> None:
    """Every method with arguments that make no sense, and sockets that are there or not."""
    drain = extension.Drain(luck.integer(1 << 62))
    ends = [End.at(host) for host in (RELAY, RELAY, "::1", "::1")]
    numbers = [-1, 0, 1, 2, 3, 1 << 31, (1 << 32) - 1, 70_000, 1 << 20]
    descriptors = [*(end.socket.fileno() for end in ends), -1, 0, 1_000_000, 1 << 30]
    with select.epoll() as epoll:
        for end in ends:
            epoll.register(end.socket, select.EPOLLIN)
        for _ in range(300):
            route = (
                luck.one_of(descriptors), (luck.one_of(HOSTS), luck.one_of(numbers)),
                luck.one_of([0x4000, 0x4001, 0x7FFF, 0, 0x3FFF, 0x8000, *numbers]),
                luck.one_of(descriptors), (luck.one_of(HOSTS), luck.integer(66_000)),
                luck.one_of([0, 1, 5, 1 << 62]),
            )  # fmt: skip
            data = luck.bytes(luck.integer(40)) + channel_data(0x4000, luck.bytes(luck.integer(9)))
            with contextlib.suppress(ValueError, TypeError, OverflowError, OSError):
                match luck.integer(8):
                    case 0:
                        drain.watch(luck.one_of(descriptors), luck.one_of(numbers), luck.integer(2))
                    case 1:
                        drain.forget(luck.one_of(descriptors))
                    case 2 | 3:
                        drain.put(*route)
                    case 4:
                        drain.drop(*route)
                    case 5:
                        drain.turn(luck.one_of([-1, epoll.fileno(), 0]), luck.one_of(numbers))
                    case 6:
                        drain.turn(epoll.fileno(), 2)
                    case _:
                        end = luck.one_of(ends[luck.integer(2) * 2 :][:2])
                        end.send(data, luck.one_of(ends).address)
    for end in ends:
        end.socket.close()


def relay_at_random(extension: ModuleType, luck: Luck, seed: int) -> int:
    """A whole relay whose clients and peers send trains of anything; how much it relayed."""
    bench = RealBench("compiled", seed=seed, extension=extension)
    callers = [Caller(bench, bench.end("127.0.0.4").address) for _ in range(3)]  # type: ignore[arg-type]
    peers = [bench.end(f"127.0.0.{host}") for host in (2, 2, 3)]
    relayed = [caller.allocate() for caller in callers]
    for _ in range(120):
        at = luck.integer(3)
        caller, peer = callers[at], luck.one_of(peers)
        size = luck.one_of([0, 1, 3, 4, 5, 100, 1020, 1400, luck.integer(9000), 60_000])
        count = 1 + luck.integer(min(64, max(1, 60_000 // (size + 4))))
        payload = luck.bytes(luck.integer(20)) * size
        frame = channel_data(luck.one_of([0x4000, 0x4000, 0x4001]), payload[:size])
        match luck.integer(10):
            # Requests and answers may be lost among all that.
            case 0:
                with contextlib.suppress(AssertionError):
                    caller.bind(luck.one_of([0x4000, 0x4001]), peer.address)
            case 1:
                bench.advance(luck.one_of([1, 100, 400]), tell=bool(luck.integer(2)))
                with contextlib.suppress(AssertionError):
                    caller.learn_nonce()
            case 2 if luck.integer(10) == 0:
                with contextlib.suppress(AssertionError):
                    caller.refresh(LIFETIME_0)
                    relayed[at] = caller.allocate()
            case 3:
                damaged = bytearray(frame * count)
                for _ in range(luck.integer(9)):
                    damaged[luck.integer(len(damaged))] = luck.integer(256)
                end = bench.end_by_source[caller.source]
                end.send(bytes(damaged), bench.listener, len(frame))
            case 4 | 5:
                end = bench.end_by_source[caller.source]
                end.send(frame * count, bench.listener, luck.one_of([len(frame), 0]))
            case _:
                peer.send(bytes(size) * count, relayed[at], size if count > 1 else 0)
        if luck.integer(3):
            bench.settle()
            for end in bench.end_by_source.values():
                end.received()
    packets = bench.server.statistics()["relayed_packets"]
    bench.close()
    return packets


def main() -> None:
    extension = load(sys.argv[1])
    until, seed, relayed = time.monotonic() + float(sys.argv[2]), int(sys.argv[3]), 0
    while time.monotonic() < until:
        luck = Luck(seed, "fuzz")
        call_at_random(extension, luck)
        relayed += relay_at_random(extension, luck, seed)
        seed += 1
    print("relayed", relayed, "last seed", seed - 1)


if __name__ == "__main__":
    main()
