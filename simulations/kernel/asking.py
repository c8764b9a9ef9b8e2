"""Questions and answers on the kernel: a small process on each client, and what it reports.

It sends numbered UDP datagrams to the echoes behind the resources, each at its time, and writes a
line for each question and each answer. They become the same `Pair` as in virtual time, so that
checks, gaps and recoveries are worked out by the same code. No two questions of a run are alike,
and all bear the run's mark, by which taps tell them (`watch.question` says how they look).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from simulations.kernel.lab import Host
from simulations.result import Outcome
from simulations.traffic import FAILED, PATHS, UNANSWERED, Pair, select

_ASKER: Final = """
import heapq, json, selectors, socket, struct, sys, time
plan = json.loads(sys.stdin.readline())
now = time.monotonic_ns
mark, base = bytes.fromhex(plan["mark"]), plan["base"]
waiting, sockets = selectors.DefaultSelector(), {}
due = []
for number, address, port, first, every, until, size in plan["pairs"]:
    s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    s.setblocking(False)
    waiting.register(s, selectors.EVENT_READ, number)
    words = (mark * (size // len(mark)))[:size - 16]
    sockets[number] = (s, (address, port), every, until, words)
    heapq.heappush(due, (first, number, base))
out = sys.stdout
until = max(each[5] for each in plan["pairs"])
while now() < until + plan["linger"]:
    while due and due[0][0] <= now():
        at, number, index = heapq.heappop(due)
        s, target, every, end, words = sockets[number]
        if at >= end:
            continue
        out.write(f"q {number} {index} {now()}\\n")
        try:
            s.sendto(mark + struct.pack("!II", number, index) + words, target)
        except OSError:
            pass
        heapq.heappush(due, (at + every, number, index + 1))
    out.flush()
    wait = (due[0][0] - now()) / 1e9 if due else 0.2
    for key, _ in waiting.select(max(0.0, min(wait, 0.2))):
        try:
            while True:
                data = key.fileobj.recv(2048)
                number, index = struct.unpack_from("!II", data, len(mark))
                out.write(f"a {number} {index} {now()}\\n")
        except (BlockingIOError, ConnectionError):
            pass
    out.flush()
"""
LINGER_NS: Final = 10**9
MAX_ASKED: Final = 1 << 20
"""Questions of one process to one resource that are told from those of the next process."""
WAY_NS: Final = 3 * 10**9
"""How far from an answer the client's word on its path may be."""


class Asked:
    """All pairs of a run, and who asks. `may` says what policy allows now. `known` is what clients
    said when of the resources that they have."""

    def __init__(self, may: Callable[[str, str], bool], mark: bytes) -> None:
        self._may = may
        self._mark = mark
        self._started = 0
        self.known: dict[str, list[tuple[int, frozenset[str]]]] = {}
        self._by_names: dict[tuple[str, str], Pair] = {}
        self._askers: list[tuple[subprocess.Popen[str], threading.Thread]] = []
        self._ways: dict[str, list[tuple[int, dict[str, tuple[str, Outcome]]]]] = {}
        self._lock = threading.Lock()
        self.pairs: list[Pair] = []
        self.strays = 0

    # --- pairs -----------------------------------------------------------------------------------

    def pair(self, client: str, resource: str, now: int) -> Pair:
        """The pair of these names; made when it is asked for first."""
        found = self._by_names.get((client, resource))
        if found is None:
            found = Pair(len(self.pairs), client, resource, b"")
            self.pairs.append(found)
            self._by_names[client, resource] = found
            found.allowed.append((now, self._may(client, resource)))
        return found

    def select(self, clients: Sequence[str], resources: Sequence[str]) -> list[Pair]:
        """All pairs that there are of these names; of all where none are given."""
        return select(self.pairs, clients, resources)

    def policy_changed(self, now: int) -> None:
        """Note who may what from now on."""
        for pair in self.pairs:
            may = self._may(pair.client, pair.resource)
            if pair.allowed[-1][1] != may:
                pair.allowed.append((now, may))

    # --- asking ----------------------------------------------------------------------------------

    def ask(
        self, host: Host, pairs: Sequence[Pair], targets: dict[str, tuple[str, int]],
        *, first: int, every: int, until: int, size: int,
    ) -> None:  # fmt: skip
        """Start a process on a client's host that asks all these pairs. Instants are of the
        machine's monotonic clock."""
        plan = {
            "pairs": [
                [pair.number, *targets[pair.resource], first, every, until, size] for pair in pairs
            ],
            "linger": LINGER_NS,
            "mark": self._mark.hex(),
            "base": self._started * MAX_ASKED,
        }
        self._started += 1
        process = subprocess.Popen(
            ["ip", "netns", "exec", host.name, sys.executable, "-I", "-S", "-c", _ASKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(plan) + "\n")
        process.stdin.close()
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        self._askers.append((process, reader))

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        indexes: dict[tuple[int, int], int] = {}
        for line in process.stdout:
            kind, number, question, at = line.split()
            with self._lock:
                self._note(kind, (int(number), int(question)), int(at), indexes)

    def _note(
        self, kind: str, key: tuple[int, int], at: int, indexes: dict[tuple[int, int], int]
    ) -> None:
        """`indexes`: where the questions of one process stand among all of their pairs."""
        pair = self.pairs[key[0]]
        if kind == "q":
            indexes[key] = len(pair.asked)
            pair.asked.append(at)
            pair.answered.append(UNANSWERED)
            pair.paths.append(FAILED)
            return
        index = indexes.get(key)
        if index is None:
            self.strays += 1
        elif pair.answered[index] == UNANSWERED:
            pair.answered[index] = at

    def finish(self, *, kill: bool = False) -> None:
        """Wait until everybody has asked all, or end them."""
        for process, reader in self._askers:
            if kill:
                process.kill()
            process.wait()
            reader.join()
        self._askers.clear()

    # --- paths -----------------------------------------------------------------------------------

    def saw(self, client: str, now: int, status: dict[str, Any]) -> None:
        """What a client said of its ways and resources."""
        names = frozenset(each["name"] for each in status.get("resources", []))
        self.known.setdefault(client, []).append((now, names))
        ways: dict[str, tuple[str, Outcome]] = {}
        for peer in status.get("peers", []):
            kind = (peer.get("path") or {}).get("kind")
            outcome: Outcome = (
                "direct" if kind == "direct" else "relayed" if kind else "failed"
            )  # fmt: skip
            for resource in peer.get("resources", []):
                ways[resource["name"]] = peer["name"], outcome
        self._ways.setdefault(client, []).append((now, ways))

    def note_paths(self) -> None:
        """Give every answer the path by which its client went when it was last, or next, asked."""
        for pair in self.pairs:
            known = [
                (at, *ways[pair.resource])
                for at, ways in self._ways.get(pair.client, [])
                if pair.resource in ways and ways[pair.resource][1] != "failed"
            ]
            if not known:
                continue
            pair.gateway = known[-1][1]
            for index, answered in enumerate(pair.answered):
                if answered == UNANSWERED:
                    continue
                at, _, outcome = min(known, key=lambda each: abs(each[0] - answered))
                if abs(at - answered) <= WAY_NS:
                    pair.paths[index] = PATHS.index(outcome)
