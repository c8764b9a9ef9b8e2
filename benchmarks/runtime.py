"""The actor runtime beside Erlang, pykka and asyncio: `python -m benchmarks.runtime [--quick]`.

Every round measures all of them in turn, with the same amounts of work: casts to one actor, calls
(plain handler, awaiting handler), spawns, memory per idle actor. Ratios are medians over the rounds
of Holloway's figure over the peer's of the same round. Erlang runs a small program that is written
to a temporary directory; each side runs in a process of its own.

What makes it fair: all are pinned to the same one core, and Erlang has one scheduler (`+S 1:1`),
since a Holloway node is one thread. That is no handicap: with two schedulers on two cores messages
go from core to core, and Erlang was slower at all of these. A rate is per second of CPU time (all
threads of the process, user and system), not of the wall's, so that others on the machine disturb
little. `cast` in Erlang is a bare process in a `receive` loop; `server_cast` is a
`gen_server`, which, as an actor does, dispatches and guards each message in a library.

Messages between two nodes are by the wall clock (`benchmarks.node_links`), and so is the time for
which a dead node's accounts are away (`benchmarks.node_death`). A figure that was not measured is
null. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import attrs
import trio
from rich.console import Console
from rich.table import Table

from runtime.actor import Actor, ActorRef, handles
from runtime.clock import SystemClock
from runtime.host import TrioHost, collect_rarely
from runtime.randomness import SystemRandomness
from runtime.scheduler import Scheduler

KEYS: Final = (
    "cast_per_s", "cast_vs_erlang", "cast_vs_gen_server", "cast_vs_pykka", "cast_vs_asyncio",
    "call_per_s", "call_vs_erlang", "mailbox_call_vs_erlang", "awaiting_call_vs_erlang",
    "spawn_per_s", "spawn_vs_erlang", "idle_actor_bytes", "idle_actor_bytes_vs_erlang",
    "idle_actors", "cross_node_msgs_per_s", "cross_node_msgs_per_s_one_core",
    "cross_node_round_trip_ms_p50", "node_death_to_service_s",
)  # fmt: skip
FIGURES: Final = (
    "cast", "server_cast", "call", "mailbox_call", "awaiting_call", "spawn", "idle_bytes",
    "msgs_per_s", "msgs_per_s_one_core", "round_trip_ms", "node_death_to_service_s",
)  # fmt: skip
SMALL: Final = ("round_trip_ms", "node_death_to_service_s")
BURST: Final = 500
"""Casts before the receiver gets to work, in every one of the systems."""

ERLANG: Final = r"""
-module(bench).
-behaviour(gen_server).
-export([main/1, sink/1, idle/0, init/1, handle_call/3, handle_cast/2]).

main([Casts, Calls, Spawns, Idle]) ->
    io:format("otp ~s~n", [erlang:system_info(otp_release)]),
    report("cast", list_to_integer(Casts), fun cast/1),
    report("server_cast", list_to_integer(Casts), fun server_casts/1),
    report("call", list_to_integer(Calls), fun call/1),
    report("spawn", list_to_integer(Spawns), fun spawns/1),
    memory(list_to_integer(Idle)),
    halt(0).

report(Name, Count, Function) ->
    Began = cpu_ns(),
    Function(Count),
    io:format("~s ~p~n", [Name, Count * 1.0e9 / (cpu_ns() - Began)]).

%% Of all threads, user and system: statistics(runtime) leaves the system out.
cpu_ns() ->
    {ok, Threads} = file:list_dir("/proc/self/task"),
    lists:sum([thread_ns(Thread) || Thread <- Threads]).

thread_ns(Thread) ->
    {ok, Text} = file:read_file("/proc/self/task/" ++ Thread ++ "/schedstat"),
    binary_to_integer(hd(binary:split(Text, <<" ">>))).

cast(Count) ->
    Sink = spawn(?MODULE, sink, [0]),
    burst(Sink, Count, 500).

burst(_, 0, _) -> ok;
burst(Sink, Left, 0) ->
    Sink ! {sync, self()}, receive done -> ok end,
    burst(Sink, Left, 500);
burst(Sink, Left, Burst) ->
    Sink ! {add, 1},
    burst(Sink, Left - 1, Burst - 1).

sink(Total) ->
    receive
        {add, Amount} -> sink(Total + Amount);
        {sync, From} -> From ! done, sink(Total)
    end.

server_casts(Count) ->
    {ok, Server} = gen_server:start(?MODULE, 0, []),
    server_burst(Server, Count, 500).

server_burst(_, 0, _) -> ok;
server_burst(Server, Left, 0) ->
    gen_server:call(Server, {add, 1}),
    server_burst(Server, Left, 500);
server_burst(Server, Left, Burst) ->
    gen_server:cast(Server, {add, 1}),
    server_burst(Server, Left - 1, Burst - 1).

init(Total) -> {ok, Total}.
handle_cast({add, Amount}, Total) -> {noreply, Total + Amount}.
handle_call({add, Amount}, _, Total) -> {reply, Total + Amount, Total + Amount}.

call(Count) ->
    {ok, Server} = gen_server:start(?MODULE, 0, []),
    call(Server, Count).

call(_, 0) -> ok;
call(Server, Left) -> gen_server:call(Server, {add, 1}), call(Server, Left - 1).

idle() -> receive stop -> ok end.

spawns(0) -> ok;
spawns(Left) -> spawn(?MODULE, idle, []), spawns(Left - 1).

memory(Count) ->
    Before = erlang:memory(processes_used),
    Pids = [spawn(?MODULE, idle, []) || _ <- lists:seq(1, Count)],
    After = erlang:memory(processes_used),
    io:format("idle_bytes ~p~n", [(After - Before) / length(Pids)]).
"""


@attrs.frozen
class Amounts:
    """How much work a measurement is."""

    casts: int
    calls: int
    spawns: int
    idle: int


FULL: Final = Amounts(2_000_000, 300_000, 200_000, 100_000)
QUICK: Final = Amounts(1_000_000, 60_000, 100_000, 100_000)


# --- Holloway ------------------------------------------------------------------------------------


@attrs.frozen
class Add:
    amount: int


@attrs.frozen
class AddAwaiting:
    amount: int


@attrs.frozen
class Go:
    """Make so many calls with this message; the reply is the CPU time in seconds."""

    count: int
    message: Any


@attrs.frozen
class Flood:
    """Cast so many times in bursts; the reply is the CPU time in seconds."""

    count: int


class Counter(Actor):
    def __init__(self) -> None:
        self.total = 0

    @handles(Add)
    def add(self, message: Add) -> int:
        self.total += message.amount
        return self.total

    @handles(AddAwaiting)
    async def add_awaiting(self, message: AddAwaiting) -> int:
        self.total += message.amount
        return self.total


class Driver(Actor):
    def __init__(self, counter: ActorRef) -> None:
        self.counter = counter

    @handles(Go)
    async def go(self, message: Go) -> float:
        began = time.process_time()
        for _ in range(message.count):
            await self.call(self.counter, message.message)
        return time.process_time() - began

    @handles(Flood)
    async def flood(self, message: Flood) -> float:
        add, counter, cast = Add(1), self.counter, self.cast
        began = time.process_time()
        for _ in range(message.count // BURST):
            for _ in range(BURST):
                cast(counter, add)
            await self.call(counter, add)
        return time.process_time() - began


def new_scheduler(**options: Any) -> Scheduler:
    return Scheduler(clock=SystemClock(), randomness=SystemRandomness(), **options)


async def on_trio(scheduler: Scheduler, message: object) -> float:
    """What a Driver says that `message` took, on a trio host."""
    counter = Counter()
    driver = scheduler.spawn(Driver(scheduler.spawn(counter)))
    host = TrioHost(scheduler)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        took: float = await host.call(driver, message, deadline_ns=600 * 10**9)
        nursery.cancel_scope.cancel()
    if counter.total < (message.count if isinstance(message, Flood | Go) else 0):
        raise RuntimeError("messages were lost")
    return took


def spawn_rate(count: int) -> float:
    scheduler = new_scheduler()
    began = time.process_time()
    for _ in range(count):
        scheduler.spawn(Counter())
    return count / (time.process_time() - began)


def idle_bytes(count: int) -> float:
    """Resident memory per actor that has come up and handled a message."""
    scheduler = new_scheduler()
    add = Add(1)
    for _ in range(100):
        scheduler.cast(scheduler.spawn(Counter()), add)
    scheduler.run()
    gc.collect()
    before = resident_bytes()
    for _ in range(count):
        scheduler.cast(scheduler.spawn(Counter()), add)
        scheduler.run()
    gc.collect()
    return (resident_bytes() - before) / count


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4_096


def measure_holloway(amounts: Amounts) -> dict[str, float]:
    collect_rarely()  # as a host does
    bytes_each = idle_bytes(amounts.idle)
    spawns = spawn_rate(amounts.spawns)
    gc.collect()
    calls = amounts.calls
    return {
        "cast": amounts.casts / trio.run(on_trio, new_scheduler(), Flood(amounts.casts)),
        "call": calls / trio.run(on_trio, new_scheduler(), Go(calls, Add(1))),
        "mailbox_call": calls
        / trio.run(on_trio, new_scheduler(calls_in_caller_per_turn=0), Go(calls, Add(1))),
        "awaiting_call": calls / trio.run(on_trio, new_scheduler(), Go(calls, AddAwaiting(1))),
        "spawn": spawns,
        "idle_bytes": bytes_each,
    }


# --- peers in Python -----------------------------------------------------------------------------


async def asyncio_casts(count: int) -> float:
    """A task that reads an asyncio.Queue."""
    queue: asyncio.Queue[int | asyncio.Future[None]] = asyncio.Queue()
    total = 0

    async def consume() -> None:
        nonlocal total
        while True:
            item = await queue.get()
            if isinstance(item, int):
                total += item
            else:
                item.set_result(None)

    consumer = asyncio.create_task(consume())
    began = time.process_time()
    for _ in range(count // BURST):
        for _ in range(BURST):
            queue.put_nowait(1)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.put_nowait(done)
        await done
    took = time.process_time() - began
    consumer.cancel()
    return count / took


def measure_asyncio(amounts: Amounts) -> dict[str, float]:
    return {"cast": asyncio.run(asyncio_casts(amounts.casts // 2))}


def measure_pykka(amounts: Amounts) -> dict[str, float]:
    import pykka  # type: ignore[import-not-found,unused-ignore]  # only where it is installed

    class PykkaCounter(pykka.ThreadingActor):  # type: ignore[misc,unused-ignore]  # as above
        def __init__(self) -> None:
            super().__init__()
            self.total = 0

        def on_receive(self, message: int) -> int:
            self.total += message
            return self.total

    casts, calls = amounts.casts // 20, amounts.calls // 20
    ref = PykkaCounter.start()
    began = time.process_time()
    for _ in range(casts // BURST):
        for _ in range(BURST):
            ref.tell(1)
        ref.ask(1)
    cast = casts / (time.process_time() - began)
    began = time.process_time()
    for _ in range(calls):
        ref.ask(1)
    call = calls / (time.process_time() - began)
    ref.stop()
    return {"cast": cast, "call": call}


MEASURES: Final[dict[str, Callable[[Amounts], dict[str, float]]]] = {
    "holloway": measure_holloway,
    "asyncio": measure_asyncio,
    "pykka": measure_pykka,
}


# --- rounds --------------------------------------------------------------------------------------


@contextmanager
def one_core() -> Iterator[None]:
    """Have what is started within run on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Erlang:
    """The peer program, compiled once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.release = "?"
        (directory / "bench.erl").write_text(ERLANG, encoding="utf-8")
        expression = 'case compile:file("bench.erl") of {ok, _} -> halt(0); _ -> halt(1) end.'
        self._run("-eval", expression)

    def measure(self, amounts: Amounts) -> dict[str, float]:
        arguments = [str(each) for each in attrs.astuple(amounts)]
        expression = f"bench:main({json.dumps(arguments)})."
        figures: dict[str, float] = {}
        for line in self._run("+S", "1:1", "+P", "2000000", "-eval", expression).splitlines():
            name, value = line.split()
            if name == "otp":
                self.release = value
            else:
                figures[name] = float(value)
        return figures

    def _run(self, *arguments: str) -> str:
        return subprocess.run(
            ["erl", "-noshell", "-noinput", *arguments],
            cwd=self.directory, capture_output=True, text=True, check=True, timeout=300,
        ).stdout  # fmt: skip


def in_own_process(peer: str, quick: bool) -> dict[str, float]:
    """The figures of one system in Python, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.runtime", "--measure", peer]
    output = subprocess.run(
        command + ["--quick"] * quick, capture_output=True, text=True, check=True, timeout=300
    ).stdout
    figures: dict[str, float] = json.loads(output)
    return figures


def figures_of(part: str, quick: bool) -> dict[str, float]:
    """What a part of this benchmark measures by itself, on all cores that there are."""
    command = [sys.executable, "-m", f"benchmarks.{part}"]
    output = subprocess.run(
        command + ["--quick"] * quick, capture_output=True, text=True, check=True, timeout=300
    ).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def measure(rounds: int, quick: bool, console: Console) -> dict[str, list[dict[str, float]]]:
    """Figures of every system, round by round; {} where it is missing."""
    amounts = QUICK if quick else FULL
    taken: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="holloway-benchmark-") as name:
        erlang = Erlang(Path(name)) if shutil.which("erl") else None
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds}", style="dim")
            with one_core():
                now = {peer: in_own_process(peer, quick) for peer in installed()}
                if erlang is not None:
                    now["erlang"] = erlang.measure(amounts)
            now["holloway"] |= figures_of("node_links", quick)
            for peer, figures in now.items():
                taken.setdefault(peer, []).append(figures)
    taken["holloway"][-1] |= figures_of("node_death", quick)
    releases = {"erlang": "missing" if erlang is None else f"OTP {erlang.release}"}
    optimized = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    build = f"{platform.python_version()} ({'profiled' if optimized else 'plain'} build)"
    releases |= {"pykka": version_of("pykka"), "python": build}
    console.print(", ".join(f"{name} {release}" for name, release in releases.items()))
    return taken


def installed() -> list[str]:
    return [peer for peer in MEASURES if peer != "pykka" or find_spec("pykka") is not None]


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def median(taken: dict[str, list[dict[str, float]]], peer: str, figure: str) -> float | None:
    values = [each[figure] for each in taken.get(peer, []) if figure in each]
    return statistics.median(values) if values else None


def ratio(
    taken: dict[str, list[dict[str, float]]], figure: str, peer: str, theirs: str | None = None
) -> float | None:
    """The median over the rounds of ours over theirs."""
    pairs = zip(taken["holloway"], taken.get(peer, []), strict=False)
    ratios = [ours[figure] / other[theirs or figure] for ours, other in pairs]
    return round(statistics.median(ratios), 3) if ratios else None


def summary(taken: dict[str, list[dict[str, float]]], idle: int) -> dict[str, Any]:
    """The JSON object of the last line."""
    figures: dict[str, Any] = dict.fromkeys(KEYS)
    for key, figure in (
        ("cast_per_s", "cast"),
        ("call_per_s", "call"),
        ("spawn_per_s", "spawn"),
        ("idle_actor_bytes", "idle_bytes"),
        ("cross_node_msgs_per_s", "msgs_per_s"),
        ("cross_node_msgs_per_s_one_core", "msgs_per_s_one_core"),
    ):
        value = median(taken, "holloway", figure)
        figures[key] = None if value is None else round(value)
    round_trip_ms = median(taken, "holloway", "round_trip_ms")
    figures["cross_node_round_trip_ms_p50"] = round_trip_ms and round(round_trip_ms, 3)
    death_s = median(taken, "holloway", "node_death_to_service_s")
    figures["node_death_to_service_s"] = death_s and round(death_s, 2)
    figures["cast_vs_erlang"] = ratio(taken, "cast", "erlang")
    figures["cast_vs_gen_server"] = ratio(taken, "cast", "erlang", "server_cast")
    figures["cast_vs_pykka"] = ratio(taken, "cast", "pykka")
    figures["cast_vs_asyncio"] = ratio(taken, "cast", "asyncio")
    figures["call_vs_erlang"] = ratio(taken, "call", "erlang")
    figures["mailbox_call_vs_erlang"] = ratio(taken, "mailbox_call", "erlang", "call")
    figures["awaiting_call_vs_erlang"] = ratio(taken, "awaiting_call", "erlang", "call")
    figures["spawn_vs_erlang"] = ratio(taken, "spawn", "erlang")
    figures["idle_actor_bytes_vs_erlang"] = ratio(taken, "idle_bytes", "erlang")
    figures["idle_actors"] = idle
    return figures


def table(taken: dict[str, list[dict[str, float]]]) -> Table:
    """Medians, with the least and the most of all rounds."""
    result = Table(
        title="per CPU second on one core (messages between nodes: per second); bytes for "
        "idle_bytes; median (least - most)"
    )
    result.add_column("")
    for peer in taken:
        result.add_column(peer, justify="right")
    for figure in FIGURES:
        cells = []
        for rounds in taken.values():
            values = [each[figure] for each in rounds if figure in each]
            form = ",.2f" if figure in SMALL else ",.0f"
            least, middle, most = (
                f"{each(values):{form}}" if values else "" for each in (min, statistics.median, max)
            )
            cells.append(f"{middle} ({least} - {most})" if values else "-")
        result.add_row(figure, *cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller amounts, 3 rounds")
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    parser.add_argument("--measure", choices=sorted(MEASURES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    amounts = QUICK if arguments.quick else FULL
    if arguments.measure:
        print(json.dumps(MEASURES[arguments.measure](amounts)))
        return
    console = Console(quiet=arguments.json)
    taken = measure(3 if arguments.quick else 5, arguments.quick, console)
    console.print(table(taken))
    print(json.dumps(summary(taken, amounts.idle)))


if __name__ == "__main__":
    main()
