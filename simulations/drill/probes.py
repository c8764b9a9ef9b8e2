"""What a drill looks at while things are broken: a probe asks, again and again, and notes when it
was answered.

    tcp://10.20.0.80:80        a connection is taken
    http://10.20.0.80/         an answer with a status below 500 comes (https: certificates are
                               not checked; it is looked at whether, not at what)
    ping://10.20.0.80          an echo reply comes

Before `@` may stand in whose network it is asked: `laptop@tcp://10.20.0.80:80`.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from itertools import pairwise
from typing import Final
from urllib.parse import urlsplit

import attrs

from simulations.drill.processes import DrillError, Process

EVERY_S: Final = 0.1
TIMEOUT_S: Final = 1.0
NS_PER_S: Final = 10**9

_CONNECT: Final = """
import http.client, socket, ssl, sys, time
kind, host, port, path, every_s, timeout_s = sys.argv[1:]
every_s, timeout_s = float(every_s), float(timeout_s)

def once():
    if kind == "tcp":
        socket.create_connection((host, int(port)), timeout_s).close()
        return True
    if kind == "https":
        context = ssl._create_unverified_context()
        options = {"timeout": timeout_s, "context": context}
        connection = http.client.HTTPSConnection(host, int(port), **options)
    else:
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status < 500
    finally:
        connection.close()

while True:
    begun = time.monotonic()
    try:
        held = once()
    except (OSError, http.client.HTTPException):
        held = False
    print(time.monotonic_ns(), int(held), flush=True)
    time.sleep(max(0.0, begun + every_s - time.monotonic()))
"""


@attrs.frozen
class Answer:
    """One try: when it ended (CLOCK_MONOTONIC, ns), and whether it was answered."""

    at_ns: int
    held: bool


@attrs.define
class Probe:
    """`text` as it was given. Started and stopped by `run_all` of the drill."""

    text: str
    argv: list[str]
    answers: list[Answer] = attrs.Factory(list)
    _child: subprocess.Popen[str] | None = None
    _reader: threading.Thread | None = None

    def start(self) -> None:
        self._child = subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        if self._reader is not None:
            self._reader.join()

    def wait_for_answer(self, timeout_s: float) -> bool:
        """Whether one came within that time."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if any(each.held for each in self.answers):
                return True
            time.sleep(0.05)
        return False

    def is_steady(self, since_ns: int) -> bool:
        """Whether every try since then was answered, and there were some."""
        recent = [each.held for each in self.answers if each.at_ns >= since_ns]
        return bool(recent) and all(recent)

    def recovery_ns(self, from_ns: int, until_ns: int) -> int | None:
        """How long after `from_ns` the last failure before `until_ns` was made good: 0 if none
        failed, None if it failed to the end."""
        within = [each for each in self.answers if from_ns <= each.at_ns <= until_ns]
        failed = [number for number, each in enumerate(within) if not each.held]
        if not failed:
            return 0 if within else None
        last = failed[-1]
        return within[last + 1].at_ns - from_ns if last + 1 < len(within) else None

    def longest_gap_ns(self) -> int:
        """The longest time between two answers."""
        held = [each.at_ns for each in self.answers if each.held]
        gaps = (after - before for before, after in pairwise(held))
        return max(gaps, default=0)

    def _read(self) -> None:
        assert self._child is not None
        assert self._child.stdout is not None
        for line in self._child.stdout:
            at_ns, held = line.split()
            self.answers.append(Answer(int(at_ns), held == "1"))


def probe_of(text: str, processes: dict[str, Process]) -> Probe:
    """Read a probe as it is written. Raises DrillError."""
    where, at, url = text.rpartition("@")
    if at and where not in processes:
        raise DrillError(f"{text}: there is no process {where!r}; there are {', '.join(processes)}")
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme not in ("tcp", "http", "https", "ping") or not host:
        raise DrillError(f"{text}: a probe is tcp://HOST:PORT, http(s)://HOST/PATH or ping://HOST")
    if parts.scheme == "tcp" and port is None:
        raise DrillError(f"{text}: which port?")
    enter = processes[where].enter() if at else []
    if parts.scheme == "ping":
        return Probe(
            text, [*enter, sys.executable, "-c", _PING, host, str(EVERY_S), str(TIMEOUT_S)]
        )
    port = port or (443 if parts.scheme == "https" else 80)
    asked = [parts.scheme, host, str(port), parts.path or "/", str(EVERY_S), str(TIMEOUT_S)]
    return Probe(text, [*enter, sys.executable, "-c", _CONNECT, *asked])


_PING: Final = """
import subprocess, sys, time
host, every_s, timeout_s = sys.argv[1], float(sys.argv[2]), sys.argv[3]
while True:
    begun = time.monotonic()
    done = subprocess.run(["ping", "-n", "-c1", "-W", timeout_s, "--", host], capture_output=True)
    print(time.monotonic_ns(), int(done.returncode == 0), flush=True)
    time.sleep(max(0.0, begun + every_s - time.monotonic()))
"""
