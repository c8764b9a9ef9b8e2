"""Our relay beside coturn: `python -m benchmarks.relay [--quick] [--json]`. Needs root.

Three namespaces in a row (client, relay, peer) are made for the run. In each round coturn and our
relay, in userspace and with its XDP fast path where there is one, are started in turn on the same
core (the last of the machine; `--relay-cores`), and one generator on the first core does the same
to each:

- thin: 50 flows in turn, packets of 172 B (a voice codec's) and 1400 B, by ChannelData;
- bulk: one flow of 1400 B in trains (UDP_SEGMENT, received with UDP_GRO);
- both ways: from clients to peers, and from peers to clients.

A case is the most that is delivered. The generator has a bounded number of packets under way and
sends the next when one arrives, so a relay is always busy and never flooded. That is done with
several bounds, and what counts is the best run that lost less than 0.5 %: the same for both. Where
every run lost more, the one that lost least counts, and its loss is told.

Two figures say what a packet costs. `cpu_us` is user and system time of the relay's processes; on a
virtual link the kernel's work on a packet until it lies in a socket is its sender's, so the relay
pays for what it sends and not for what it receives, and for nothing of XDP. `added_us` is, at one
moderate rate, the time of relay, generator and the kernel's softirq threads together, less the same
when the packets end in the relay's place: all that the relay costs, wherever it is charged. That is
compared for XDP. `busy_us` in the last line is what all processors did, whatever for: on a machine
with nothing else to do the two tell the same. (Where the kernel keeps the time of interrupts apart,
CONFIG_IRQ_TIME_ACCOUNTING, only `busy_us` has all of it, and it is used.)

Wall-clock rates are disturbed by whoever else is on the relay's core: `core` in the table is the
share of it that the relay had. `..._per_cpu_s` are packets or allocations for each second of its
own CPU time. An XDP relay works in the sender's time, on the generator's core.

`holloway` is our relay in userspace, `holloway pure` the same without its compiled drain (keys with
`pure`; the same figures where there is no compiled drain), `holloway xdp` with `--fast-path auto`,
which is the generic mode on virtual links, and `holloway xdp driver` (not in the quick form) what
the driver of a real device would do, here with a copy that a real one does not make. `mode` is how
`holloway`, and `holloway xdp` if measured, say that they move data.

Added latency is half of (round trip through the relay less round trip through the namespace that
then forwards). An allocation is a 401 and a success, with the best digest that the relay offers our
client: SHA-256 with ours, MD5 and SHA-1 with coturn. A key that was not measured is null.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from rich.console import Console

from benchmarks import relay_core
from benchmarks.relay_load import Carried, Ends, Generator, GeneratorError
from benchmarks.relay_results import (
    COTURN,
    DIRECT,
    DRIVER,
    KEYS,
    OURS,
    PURE,
    WAYS,
    XDP,
    Figures,
    Taken,
    coturn_version,
    summary,
    table,
)
from benchmarks.relay_world import (
    Flow,
    Relay,
    World,
    WorldError,
    allocate_many,
    bulk,
    coturn,
    cpu_s,
    data_path,
    flows,
    holloway,
    proportional_bytes,
    thin,
    without_relay,
)
from relays.turn import channel_data
from runtime.descriptors import raise_file_limit
from simulations.kernel.lab import Lab, LabError, missing_requirements

FLOWS: Final = 50
SIZES: Final = (172, 1400)
BULK_BYTES: Final = 1400
MOST_LOSS: Final = 0.005
PACED_PER_S: Final = 40_000
PACED_BATCH: Final = 8
XDP_CPU_US: Final = 0.5
"""A relay that uses more for each packet has carried them in userspace, whatever it was told."""
LEAST_WAITING: Final = 0.1
"""A generator that waits for the relay in fewer of its turns is what limits the rate: then its own
time for a packet is told, `generator_us`, as it is of the generator alone."""


@attrs.frozen(kw_only=True)
class Amounts:
    rounds: int
    most_s: float
    """There is no further round that would probably end later than that."""
    measure_s: float
    paced_s: float
    thin_windows: tuple[int, ...]
    bulk_windows: tuple[int, ...]
    round_trips: int
    allocations: int


QUICK: Final = Amounts(
    rounds=2, most_s=50.0, measure_s=0.25, paced_s=0.3, thin_windows=(512,),
    bulk_windows=(90, 360), round_trips=500, allocations=500,
)  # fmt: skip
FULL: Final = Amounts(
    rounds=5, most_s=3600.0, measure_s=1.0, paced_s=3.0, thin_windows=(256, 1024),
    bulk_windows=(90, 360, 1440), round_trips=4000, allocations=2000,
)  # fmt: skip


def run(chosen: Chosen, console: Console) -> dict[str, Any]:
    """Measure; the object of the last line. Raises LabError, WorldError, GeneratorError."""
    taken: Taken = {}
    raise_file_limit(chosen.amounts.allocations * 2 + 1024)
    os.sched_setaffinity(0, {chosen.generator_core})
    with Lab(chosen.run_name or None) as lab:
        world = World.build(lab, chosen.relay_cores)
        generator = Generator.compile(lab.directory, chosen.generator_core)
        relays, notes = participants(chosen)
        for note in notes:
            console.print(note)
        bench = Bench(world, generator, chosen)
        begun = time.monotonic()
        for number in range(chosen.amounts.rounds):
            if number and (time.monotonic() - begun) * (1 + 1 / number) > chosen.amounts.most_s:
                console.print(f"no more rounds than {number}: they take too long here")
                break
            console.print(f"round {number + 1} of {chosen.amounts.rounds}", style="dim")
            taken.setdefault(DIRECT, []).append(bench.alone(all_cases=number == 0))
            for relay in list(relays):
                figures = bench.of(relay)
                if relay.needs_xdp and figures.get("thin 172 to peer cpu_us", 0.0) > XDP_CPU_US:
                    console.print(f"{relay.name}: its packets go through userspace; left out")
                    relays.remove(relay)
                else:
                    taken.setdefault(relay.name, []).append(figures)
    console.print(table(taken))
    console.print(versions(chosen, bench.modes))
    return summary(taken, bench.modes)


# --- what takes part -----------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Chosen:
    """What the command line asks for. Empty `relays` and `cases` are all of them."""

    amounts: Amounts
    relay_cores: str
    generator_core: int
    processes: int
    relays: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    all_modes: bool = False
    profile: str = ""
    run_name: str = ""
    also: tuple[Path, ...] = ()

    def wants(self, case: str) -> bool:
        return not self.cases or any(case.startswith(each) for each in self.cases)


def participants(chosen: Chosen) -> tuple[list[Relay], list[str]]:
    """The relays that can run here, in the order of a round, and what is missing."""
    notes: list[str] = []
    settings = relay_settings()
    several: tuple[str, ...] = ()
    if chosen.processes > 1:
        if "processes" in settings:
            several = ("--processes", str(chosen.processes))
        else:
            notes.append("our relay has no setting for several processes: it runs as one")
    # What stands between the brackets is what the setting can be, if it is there at all.
    ways = re.findall(
        r"\w+", settings.get("fast-path", "").partition("choices:")[2].partition("]")[0]
    )
    userspace = ("--fast-path", "off", *several) if "off" in ways else several
    found = []
    if shutil.which("turnserver"):
        found.append(coturn(coturn_threads(chosen)))
    else:
        notes.append("turnserver is missing (apt-get install coturn): no ratios")
    found.append(holloway(OURS, *userspace))
    if "no-compiled-drain" in settings:
        found.append(holloway(PURE, *userspace, "--no-compiled-drain", data_only=True))
    if "auto" not in ways:
        notes.append("our relay has no --fast-path: no figures of XDP")
    elif shutil.which("ethtool") is None:
        notes.append("ethtool is missing (apt-get install ethtool): no figures of XDP")
    else:
        found.append(holloway(XDP, "--fast-path", "auto", *several, needs_xdp=True))
        if chosen.all_modes and "driver" in ways:
            found.append(holloway(DRIVER, "--fast-path", "driver", *several, needs_xdp=True))
    found += [holloway(each.name, checkout=each) for each in chosen.also]
    return [each for each in found if not chosen.relays or each.name in chosen.relays], notes


def coturn_threads(chosen: Chosen) -> int:
    """0 has coturn do all in one thread: on one core that costs it 3 to 8 % less than 1 does."""
    return chosen.processes if chosen.processes > 1 else 0


def relay_settings() -> dict[str, str]:
    """What `holloway relay --help` lists: names of flags, and the text up to the next one."""
    done = subprocess.run(
        [sys.executable, "-m", OURS, "relay", "--help"],
        env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    parts = re.split(r"\s--([a-z][a-z0-9-]+)", done.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=False))


# --- one round of one relay ----------------------------------------------------------------------


@attrs.frozen
class Bench:
    world: World
    generator: Generator
    chosen: Chosen
    modes: dict[str, str] = attrs.field(factory=dict)
    """How each relay of ours that has run said it moves data."""

    def of(self, relay: Relay) -> Figures:
        figures: Figures = {}
        with relay.running(self.world) as pids, flows(self.world, FLOWS) as made:
            if relay.name != COTURN:
                self.modes[relay.name] = data_path(self.world, relay)
            with profiled(self.chosen.profile, pids):
                for to_peer in WAYS:
                    self._carry(figures, made, to_peer, pids, paced=not relay.data_only)
            if relay.data_only:
                return figures
            if self.chosen.wants("latency"):
                figures["round trip us"] = self._round_trip_us(
                    made[0], channel_data(made[0].channel, bytes(172))
                )
            if self.chosen.wants("allocations"):
                self._allocate(figures, pids)
        return figures

    def alone(self, *, all_cases: bool = True) -> Figures:
        """The same load, ended where a relay would receive it; and the way past the relay. Without
        `all_cases` only what is compared within a round."""
        figures: Figures = {}
        for to_peer in WAYS:
            with without_relay(self.world, FLOWS, to_peer) as made:
                if all_cases:
                    self._carry(figures, made, to_peer, ())
                elif self.chosen.wants("paced"):
                    with thin(self.world, made, SIZES[0], to_peer) as ends:
                        self._paced(figures, f"paced {SIZES[0]} {WAYS[to_peer]}", ends, ())
        with self.world.client_socket() as client, self.world.peer_socket() as peer:
            client.connect(peer.getsockname())
            peer.connect(client.getsockname())
            figures["round trip us"] = self._round_trip_us(Flow(client, peer, 0), bytes(172))
        return figures

    def _carry(
        self,
        figures: Figures,
        made: Sequence[Flow],
        to_peer: bool,
        pids: Sequence[int],
        *,
        paced: bool = True,
    ) -> None:
        amounts, way = self.chosen.amounts, WAYS[to_peer]
        for size in SIZES:
            with thin(self.world, made, size, to_peer) as ends:
                self._most(figures, f"thin {size} {way}", ends, amounts.thin_windows, pids)
                if paced and size == SIZES[0] and self.chosen.wants("paced"):
                    self._paced(figures, f"paced {size} {way}", ends, pids)
        with bulk(made[0], BULK_BYTES, to_peer) as ends:
            self._most(figures, f"bulk {BULK_BYTES} {way}", ends, amounts.bulk_windows, pids)

    def _most(
        self,
        figures: Figures,
        case: str,
        ends: Ends,
        windows: Sequence[int],
        pids: Sequence[int],
    ) -> None:
        """The most that arrives: the best of the runs with little loss."""
        if not self.chosen.wants(case):
            return
        seconds = self.chosen.amounts.measure_s
        runs = [
            self.generator.load(ends, measure_s=seconds, window=window, watched=pids)
            for window in windows
        ]
        best = max(runs, key=rank)
        figures[f"{case} per_s"] = best.per_s
        figures[f"{case} loss"] = best.loss
        if not pids or best.window_full < LEAST_WAITING:
            figures[f"{case} generator_us"] = best.own_us
        if best.cpu_us is not None and best.core_share is not None:
            figures[f"{case} cpu_us"] = best.cpu_us
            figures[f"{case} core"] = best.core_share

    def _paced(self, figures: Figures, case: str, ends: Ends, pids: Sequence[int]) -> None:
        carried = self.generator.load(
            ends, measure_s=self.chosen.amounts.paced_s, rate=PACED_PER_S, batch=PACED_BATCH,
            watched=pids,
        )  # fmt: skip
        figures[f"{case} loss"] = carried.loss
        figures[f"{case} used_us"] = carried.used_us
        figures[f"{case} busy_us"] = carried.busy_us
        if carried.cpu_us is not None:
            figures[f"{case} cpu_us"] = carried.cpu_us

    def _round_trip_us(self, flow: Flow, there: bytes) -> float:
        return self.generator.round_trip_us(
            flow.client, flow.peer, there, bytes(172), self.chosen.amounts.round_trips
        )

    def _allocate(self, figures: Figures, pids: Sequence[int]) -> None:
        def used() -> float:
            return cpu_s(pids)

        with contextlib.ExitStack() as stack:
            allocate_many(self.world, stack, 100, used)  # what is made once is made
            before = proportional_bytes(pids)
            done = allocate_many(self.world, stack, self.chosen.amounts.allocations, used)
            after = proportional_bytes(pids)
        figures["allocations per_s"] = done.count / done.answering_s
        figures["allocations per_cpu_s"] = done.count / done.cpu_s
        figures["allocation bytes"] = (after - before) / done.count


def rank(carried: Carried) -> tuple[bool, float]:
    """What is better: little loss, then the rate; and of much loss, less of it."""
    if carried.loss < MOST_LOSS:
        return True, carried.per_s
    return False, -carried.loss


@contextlib.contextmanager
def profiled(path: str, pids: Sequence[int]) -> Iterator[None]:
    """`perf record` of the relay's processes into `path`, for developers; nothing if empty."""
    if not path:
        yield
        return
    perf = subprocess.Popen(
        ["perf", "record", "-q", "-g", "-o", path, "-p", ",".join(map(str, pids))]
    )
    try:
        yield
    finally:
        perf.send_signal(2)
        perf.wait()


def versions(chosen: Chosen, modes: dict[str, str]) -> str:
    gcc = subprocess.run(["gcc", "--version"], capture_output=True, text=True).stdout
    return (
        f"coturn {coturn_version() or 'missing'} (relay threads: {coturn_threads(chosen)}), Python "
        f"{platform.python_version()}, gcc {gcc.splitlines()[0].split()[-1]}, Linux "
        f"{platform.release()}, {os.cpu_count()} cores: relays on {chosen.relay_cores}, generator "
        f"on {chosen.generator_core}; "
        f"{', '.join(f'{name} moves data by {mode}' for name, mode in modes.items())}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure our relay beside coturn.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    parser.add_argument("--rounds", type=int, help="instead of what is usual")
    parser.add_argument("--relay", action="append", default=[], help="only this one (repeatable)")
    parser.add_argument(
        "--case", action="append", default=[],
        help="only cases that begin so: 'thin 172', 'bulk', 'paced', 'latency', 'allocations'",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=1, help="of our relay, and relay threads of coturn"
    )
    parser.add_argument("--relay-cores", help="as taskset has it; the last N of the machine")
    parser.add_argument("--profile", default="", help="perf record of the relay into this file")
    parser.add_argument(
        "--also", action="append", default=[], type=Path,
        help="measure the relay of this checkout too (repeatable)",
    )  # fmt: skip
    parser.add_argument("--run", default="", help="what the namespaces are named after")
    parser.add_argument(
        "--core-only", action="store_true", help="the server core alone, without sockets or root"
    )
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json, highlight=False, width=140)
    if arguments.core_only:
        print(json.dumps(relay_core.measure(10_000 if arguments.quick else 100_000)))
        return 0
    if missing := missing_requirements({"taskset": "util-linux", "gcc": "gcc libc6-dev"}):
        print(*missing, sep="\n", file=sys.stderr)
        print(json.dumps(dict.fromkeys(KEYS)))
        return 2
    cores = sorted(os.sched_getaffinity(0))
    amounts = QUICK if arguments.quick else FULL
    chosen = Chosen(
        amounts=attrs.evolve(amounts, rounds=arguments.rounds or amounts.rounds),
        relay_cores=arguments.relay_cores or ",".join(map(str, cores[-arguments.processes :])),
        generator_core=cores[0],
        processes=arguments.processes,
        relays=tuple(arguments.relay),
        cases=tuple(arguments.case),
        all_modes=not arguments.quick,
        profile=arguments.profile,
        run_name=arguments.run,
        also=tuple(each.resolve() for each in arguments.also),
    )
    begun = time.monotonic()
    try:
        figures = run(chosen, console)
    except (LabError, WorldError, GeneratorError) as error:
        print(f"benchmarks.relay: {error}", file=sys.stderr)
        print(json.dumps(dict.fromkeys(KEYS)))
        return 1
    console.print(f"{time.monotonic() - begun:.0f} s")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
