"""An installation with two relays, at which alone its laptop and its gateways can meet, and a
download that is watched for stalls."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from simulations.installation import LARGE_FILE, WEB, Component, Installation, wait_until
from simulations.kernel.lab import Lab

READ_BYTES = 16 * 1024
PACE_S = 0.01
"""1.6 MB/s: far below what a tunnel carries, so that the machine does not decide the figures."""
WINDOW_BYTES = 64 * 1024
"""What may wait in the kernel: 40 ms, by which a stall can look shorter than it is."""
FILE_BYTES = 384 << 20
GENEROUS_S = 15.0
"""No stall is longer, on however busy a machine."""


class Download:
    """One connection that reads the large file slowly until `close`, and looks at every byte."""

    def __init__(self, it: Installation) -> None:
        expected = (it.directory / "web" / LARGE_FILE).read_bytes()[: 1 << 20]
        self._expected = expected + expected  # the file is one block, again and again
        self.read_bytes = 0
        self.failure = ""
        self._longest_s = 0.0
        self._last = time.monotonic()
        self._over = threading.Event()
        with it.laptop.entered():
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW_BYTES)
        self._socket.settimeout(90)
        self._socket.connect((WEB, 80))
        self._socket.sendall(f"GET /{LARGE_FILE} HTTP/1.0\r\nHost: {WEB}\r\n\r\n".encode())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def longest_stall_s(self) -> float:
        """The longest time without a byte since the last such question, that of now included."""
        longest = max(self._longest_s, time.monotonic() - self._last)
        self._longest_s = 0.0
        return longest

    def goes_on(self, *, for_bytes: int = 3 << 20) -> None:
        """Wait until so much more has come. Raises AssertionError when the connection is lost."""
        wanted = self.read_bytes + for_bytes
        wait_until(
            lambda: self.failure or self.read_bytes >= wanted, what="it goes on", timeout_s=60
        )
        assert not self.failure

    def stalled_s(self, what: str) -> float:
        """Wait until it goes on, print the longest stall and return it."""
        self.goes_on()
        stall_s = self.longest_stall_s()
        print(f"{what}: longest stall {stall_s:.2f} s")
        return stall_s

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        try:
            head = b""
            while b"\r\n\r\n" not in head:
                head += self._read()
            self._take(head.partition(b"\r\n\r\n")[2])
            while not self._over.wait(PACE_S):
                self._take(self._read())
        except (OSError, EOFError, ValueError) as error:
            self.failure = repr(error)

    def _read(self) -> bytes:
        data = self._socket.recv(READ_BYTES)
        if not data:
            raise EOFError("the server ended it")
        now = time.monotonic()
        self._longest_s, self._last = max(self._longest_s, now - self._last), now
        return data

    def _take(self, data: bytes) -> None:
        at = self.read_bytes % (1 << 20)
        if data != self._expected[at : at + len(data)]:
            raise ValueError(f"other bytes than the file's after {self.read_bytes}")
        self.read_bytes += len(data)


def whole(*, blocked: bool) -> Iterator[Installation]:
    with Lab() as lab:
        it = Installation(lab, relays=2)
        it.set_nats("symmetric")
        if blocked:
            it.block_udp()
        try:
            it.start_everything(large_file_bytes=FILE_BYTES, timeout_s=90)
            it.allow()
            wait_until(it.fetch_page, what="the page arrives", timeout_s=60)
            yield it
        except BaseException:
            for log in sorted(it.directory.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
            raise


@contextmanager
def downloading(it: Installation) -> Iterator[Download]:
    """A download that runs, and has not stalled so far; it must not have broken at the end."""
    running = Download(it)
    try:
        running.goes_on()
        running.longest_stall_s()
        yield running
        assert not running.failure
    finally:
        running.close()


def relay_in_use(it: Installation) -> str:
    """The name of the relay through which the laptop's path goes; empty without one."""
    for peer in it.status()["peers"]:
        if path := peer.get("path"):
            assert path["kind"] == "relayed"
            address = path["relay"].rpartition(":")[0]
            return next(name for name, (_, its) in it.relay_hosts.items() if its == address)
    return ""


def other(it: Installation, name: str) -> str:
    return next(each for each in it.relay_hosts if each != name)


def ready_by(it: Installation) -> list[str | None]:
    """By what transport each relay is ready at the laptop."""
    return [relay["by"] for relay in it.status()["relays"]]


def come_back(it: Installation, relay: Component, by: str) -> None:
    relay.start()
    it.wait_until_online(60)
    wait_until(lambda: ready_by(it) == [by, by], what="both relays stand by", timeout_s=60)
