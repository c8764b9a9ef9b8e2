"""The simulator: `python -m benchmarks.simulator [--quick] [--hosts N ...]`.

    events_per_s           events of the bare world for each second of CPU time (`simulator_world`)
    sessions_per_cpu_s_N   complete sessions (signalled, punched, handshaken, one packet each way to
                           a service and back) for each second of CPU time, by N clients that have
                           joined; all that happens between the first question and the last answer
                           counts, the joins do not
    joins_per_cpu_s_N      clients that came online for each second of CPU time, the building of
                           world and account included
    simulated_over_real    virtual seconds for each second of CPU time, of the largest crowd
    bytes_per_host         growth of the resident set over the number of hosts, of the largest crowd

CPU time is that of this process. Each crowd has a process of its own, so none begins with the
memory of another. Goals: 200,000 events/s, 200 sessions for each second of CPU time, 5,000 hosts in
2 GB. `--quick` leaves the largest crowds out. The last line is one JSON object; a figure that was
not measured is null.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from typing import Any

from benchmarks.simulator_sessions import Crowd, measure
from benchmarks.simulator_world import measure as measure_world
from runtime.service import configure_logging

SIZES = (100, 1_000, 5_000)
QUICK_SIZES = (100,)


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the simulator.")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--hosts", type=int, nargs="*", help="clients of the crowds to measure")
    options = parser.parse_args()
    sizes = tuple(options.hosts or (QUICK_SIZES if options.quick else SIZES))
    load = os.getloadavg()[0]
    print(f"load at the start: {load:.1f} on {os.cpu_count()} CPUs")
    events_per_s = measure_world(quick=options.quick)["world_events_per_s"]
    print(f"bare world   {events_per_s:12,.0f} events/s")
    crowds = {size: in_a_process(size) for size in sizes}
    print(json.dumps(figures(crowds, events_per_s, load)))


def in_a_process(clients: int) -> Crowd:
    """Measure one crowd in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        crowd = pool.apply(_measure, (clients,))
    print(
        f"{clients:6,} clients {crowd.sessions_per_cpu_s:9.1f} sessions/CPU s"
        f" {clients / crowd.join_cpu_s:9.1f} joins/CPU s {crowd.bytes_per_host:9,} B/host"
        f" ({crowd.sessions:,} sessions, {crowd.direct:,} direct,"
        f" {crowd.events / clients:.0f} events each)",
        flush=True,
    )
    return crowd


def _measure(clients: int) -> Crowd:
    configure_logging("text", "error")
    return measure(clients)


def figures(crowds: dict[int, Crowd], events_per_s: float, load: float) -> dict[str, Any]:
    """What the last line says."""
    told: dict[str, Any] = {"events_per_s": round(events_per_s), "load": round(load, 1)}
    for size in sorted({*SIZES, *crowds}):
        crowd = crowds.get(size)
        told[f"sessions_per_cpu_s_{size}"] = (
            None if crowd is None else round(crowd.sessions_per_cpu_s, 1)
        )
        told[f"joins_per_cpu_s_{size}"] = (
            None if crowd is None else round(size / crowd.join_cpu_s, 1)
        )
    largest = crowds[max(crowds)]
    cpu_s = largest.join_cpu_s + largest.session_cpu_s
    told["simulated_over_real"] = round(largest.virtual_s / cpu_s, 3)
    told["bytes_per_host"] = largest.bytes_per_host
    told["hosts"] = largest.hosts
    return told


if __name__ == "__main__":
    main()
