"""A partition of one process from the network, by nftables rules that are removed in any case.

Where a process has a network namespace of its own, everything in it but loopback is dropped;
elsewhere what goes to and from the ports that its sockets have, which are looked up again and
again since agents open new ones. The table is named after the drill's own process, and removed by
that name alone.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from simulations.drill.processes import DrillError, Process

REFRESH_S: Final = 0.2
_TABLES: Final = {"tcp": ("tcp", "tcp6"), "udp": ("udp", "udp6")}


@contextlib.contextmanager
def partitioned(process: Process) -> Iterator[None]:
    """Within this block nothing comes through to the process, or from it. Raises DrillError."""
    table = f"hlw_drill_{os.getpid()}_{process.pid}"
    if process.has_own_network():
        _nft(process, _all_dropped(table))
        try:
            yield
        finally:
            _nft(process, f"delete table inet {table}\n")
        return
    _nft(process, _ports_dropped(table))
    over = threading.Event()
    follower = threading.Thread(target=_follow, args=(process, table, over), daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()
        _nft(process, f"delete table inet {table}\n")


def _all_dropped(table: str) -> str:
    return f"""
table inet {table} {{
  chain inward {{ type filter hook input priority -200; iifname != "lo" drop; }}
  chain outward {{ type filter hook output priority -200; oifname != "lo" drop; }}
}}
"""


def _ports_dropped(table: str) -> str:
    inward = "\n".join(f"    {each} dport @{each} drop" for each in _TABLES)
    outward = "\n".join(f"    {each} sport @{each} drop" for each in _TABLES)
    sets = "\n".join(f"  set {each} {{ type inet_service; }}" for each in _TABLES)
    return f"""
table inet {table} {{
{sets}
  chain inward {{
    type filter hook input priority -200;
{inward}
  }}
  chain outward {{
    type filter hook output priority -200;
{outward}
  }}
}}
"""


def _follow(process: Process, table: str, over: threading.Event) -> None:
    """Keep the sets of ports as the process's sockets are; what it had stays in them."""
    known: set[tuple[str, int]] = set()
    while True:
        fresh = ports_of(process.pid) - known
        if fresh:
            lines = (f"add element inet {table} {kind} {{ {port} }}\n" for kind, port in fresh)
            with contextlib.suppress(DrillError):
                _nft(process, "".join(sorted(lines)))
                known |= fresh
        if over.wait(REFRESH_S):
            return


def ports_of(pid: int) -> set[tuple[str, int]]:
    """The protocol and local port of each socket of a process."""
    inodes = set()
    with contextlib.suppress(OSError):
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(each)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    ports = set()
    for kind, names in _TABLES.items():
        for name in names:
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[9] in inodes:
                        ports.add((kind, int(fields[1].rpartition(":")[2], 16)))
    return ports


def _nft(process: Process, rules: str) -> None:
    command = [*process.enter(), "nft", "-f", "-"]
    try:
        done = subprocess.run(command, input=rules, capture_output=True, text=True)
    except OSError as error:
        raise DrillError(f"no partition of {process.name}: {error}") from None
    if done.returncode != 0:
        raise DrillError(f"no partition of {process.name}: {done.stderr.strip() or 'nft failed'}")
