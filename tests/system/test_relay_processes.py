"""A relay of several processes is one relay: for its portal, for its clients, for who watches it;
and one process that dies takes along only its own clients' allocations."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from channel.messages import Drain, RevokeUser
from relays.client import Allocated, Lost, Permitted, Received, TurnClient
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.net.udp import UdpSocket
from tests.ports import free_port, free_ports
from tests.system.test_relay_joins import Desk, client_with, event_of, portal, relay, until

pytestmark = pytest.mark.system

CLOCK = SystemClock()
PROCESSES = 3
CLIENTS = 12


@attrs.define
class Installation:
    desk: Desk
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    metrics_port: int

    @property
    def workers(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(one) for children in tasks for one in children.read_text().split()]

    def client(self, user: str | None = None) -> TurnClient:
        return client_with(self.desk.joins[0].stamp_secret, self.port, user)

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name.removeprefix("holloway_relay_"): float(value) for name, value in pairs}

    async def counts(self, name: str, wanted: int) -> None:
        """Wait until all processes have reported what makes this sum."""
        with trio.fail_after(60):
            while (await self.read_metrics())[name] != wanted:
                await trio.sleep(0.1)

    async def read_metrics(self) -> dict[str, float]:
        return await trio.to_thread.run_sync(self.metrics)


@asynccontextmanager
async def installation(folder: Path, *flags: str) -> AsyncIterator[Installation]:
    desk, port, metrics_port = Desk(), free_port(), free_port()
    first = free_ports(36)
    async with portal(desk) as portal_port:
        with relay(
            folder, portal_port, port, "--processes", str(PROCESSES), "--max-allocations", "36",
            "--relayed-ports", f"{first}-{first + 35}", *flags,
            observability=f"127.0.0.1:{metrics_port}",
        ) as process:  # fmt: skip
            await until(lambda: bool(desk.loads), "the relay reports its load")
            found = Installation(desk, process, port, folder / "relay.log", metrics_port)
            await found.counts("processes", PROCESSES)
            yield found


@attrs.define
class Agent:
    client: TurnClient
    socket: UdpSocket
    relayed: Address

    async def next(self) -> object:
        return await event_of(self.client, self.socket)

    def pump(self) -> list[object]:
        """What has come, without waiting."""
        for data, _ in self.socket.receive_batch():
            self.client.receive(data, CLOCK.monotonic_ns())
        self.client.handle_timeout(CLOCK.monotonic_ns())
        for datagram in self.client.drain_datagrams():
            self.socket.send(datagram, self.client.server)
        return list(self.client.drain_events())

    async def permit(self, peer: Address) -> None:
        self.client.permit(peer, CLOCK.monotonic_ns())
        assert isinstance(await self.next(), Permitted)

    def say(self, peer: Address, data: bytes) -> None:
        assert self.client.send(peer, data, CLOCK.monotonic_ns())
        for datagram in self.client.drain_datagrams():
            self.socket.send(datagram, self.client.server)

    async def hears(self, data: bytes) -> Received:
        while True:
            event = await self.next()
            if isinstance(event, Received) and bytes(event.data) == data:
                return event


@asynccontextmanager
async def agents(of: Installation, count: int = CLIENTS) -> AsyncIterator[list[Agent]]:
    async with AsyncExitStack() as stack:
        found = []
        for _ in range(count):
            opened = stack.enter_context(UdpSocket.bind(Address("127.0.0.1", 0)))
            client = of.client()
            event = await event_of(client, opened)
            assert isinstance(event, Allocated), event
            found.append(Agent(client, opened, event.relayed))
        yield found


def slice_of(agent: Agent, all_ports: list[int]) -> int:
    """Which third of the relayed ports the agent's is in, so which process serves it."""
    return (agent.relayed.port - all_ports[0]) * PROCESSES // len(all_ports)


async def test_clients_of_all_processes_reach_each_other_and_no_other_socket(
    tmp_path: Path,
) -> None:
    async with installation(tmp_path) as one, agents(one) as all_agents:
        await until(lambda: one.desk.loads[-1].allocations == CLIENTS, "the load is the sum")
        assert one.desk.loads[-1].load == pytest.approx(CLIENTS / 36)
        host = all_agents[0].relayed
        for agent in all_agents:
            await agent.permit(host)
        for at, agent in enumerate(all_agents):
            other = all_agents[(at + 1) % CLIENTS]
            for data in (b"one", b"two"):
                agent.say(other.relayed, data)
                event = await other.hears(data)
                assert event.peer == agent.relayed
        used = {agent.relayed.port for agent in all_agents}
        relayed = [int(part) for part in _flag(one, "--relayed-ports").split("-")]
        closed = next(port for port in range(relayed[1], relayed[0], -1) if port not in used)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as private:
            private.bind(("127.0.0.1", closed))
            private.setblocking(False)
            for agent in all_agents:
                agent.say(Address("127.0.0.1", closed), b"to a socket of the machine")
            await one.counts("dropped_packets_total", CLIENTS)
            with pytest.raises(BlockingIOError):
                private.recv(100)
        await one.counts("relayed_packets_total", 2 * CLIENTS)
        await one.counts("allocations", CLIENTS)


async def test_a_process_that_is_killed_takes_along_its_own_clients_alone(tmp_path: Path) -> None:
    async with installation(tmp_path) as one, agents(one) as all_agents:
        first, last = (int(part) for part in _flag(one, "--relayed-ports").split("-"))
        ports = list(range(first, last + 1))
        by_process: dict[int, list[Agent]] = {}
        for agent in all_agents:
            by_process.setdefault(slice_of(agent, ports), []).append(agent)
        assert len(by_process) > 1, "the kernel gave all clients to one process"
        peer = UdpSocket.bind(Address("127.0.0.2", 0))
        for agent in all_agents:
            await agent.permit(peer.local_address)
        killed = min(by_process)
        pid = _worker_of(one, killed)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: "process_ended" in one.log.read_text(), "it is noticed")
        for process, served in by_process.items():
            for agent in served if process != killed else []:
                agent.say(peer.local_address, b"still here")
                with trio.fail_after(10):
                    await peer.wait_readable()
                [(data, source)] = peer.receive_batch()
                assert (data, source) == (b"still here", agent.relayed)
        await one.counts("processes", PROCESSES)
        assert pid not in one.workers
        for agent in by_process[killed]:
            agent.client.probe(CLOCK.monotonic_ns())
            assert isinstance(await _until_lost(agent), Lost)
            heir = one.client()
            event = await event_of(heir, agent.socket)
            assert isinstance(event, Allocated), event
            assert slice_of(Agent(heir, agent.socket, event.relayed), ports) == killed
        assert (await one.read_metrics())["process_restarts_total"] == 1
        peer.close()


async def test_a_process_that_hangs_is_replaced(tmp_path: Path) -> None:
    async with installation(tmp_path) as one:
        hanging = _worker_of(one, 1)
        os.kill(hanging, signal.SIGSTOP)
        with trio.fail_after(90):
            while "process_ended" not in one.log.read_text():
                await trio.sleep(0.2)
        await one.counts("processes", PROCESSES)
        assert hanging not in one.workers


async def test_a_user_is_revoked_in_all_processes_and_those_that_start_later(
    tmp_path: Path,
) -> None:
    async with installation(tmp_path) as one:
        user = "A" * 16
        sockets = [UdpSocket.bind(Address("127.0.0.1", 0)) for _ in range(6)]
        clients = [one.client(user) for _ in sockets]
        for client, opened in zip(clients, sockets, strict=True):
            assert isinstance(await event_of(client, opened), Allocated)
        assert one.desk.channel is not None
        one.desk.channel.send(RevokeUser(user=user, expires_in_ns=3600 * 10**9), epoch=1)
        await until(lambda: "user_revoked" in one.log.read_text(), "revoked")
        for client, opened in zip(clients, sockets, strict=True):
            client.probe(CLOCK.monotonic_ns())
            assert isinstance(await event_of(client, opened), Lost)
        for pid in one.workers:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: one.log.read_text().count("process_ended") == PROCESSES, "all ended")
        await one.counts("processes", PROCESSES)
        for opened in sockets:
            lost = await event_of(one.client(user), opened)
            assert isinstance(lost, Lost)
            assert lost.code == 401
        for opened in sockets:
            assert isinstance(await event_of(one.client(), opened), Allocated)
            opened.close()


async def test_all_processes_drain_and_end_with_the_last_client(tmp_path: Path) -> None:
    async with installation(tmp_path) as one, agents(one, 6) as all_agents:
        assert one.desk.channel is not None
        one.desk.channel.send(Drain(), epoch=1)
        await until(lambda: "draining" in one.log.read_text(), "draining")
        for _ in range(6):
            with UdpSocket.bind(Address("127.0.0.1", 0)) as opened:
                lost = await event_of(one.client(), opened)
                assert isinstance(lost, Lost)
                assert lost.code == 508
        workers = one.workers
        one.process.send_signal(signal.SIGTERM)
        await until(lambda: bool(one.desk.closed_reasons), "the channel is closed first")
        assert one.process.poll() is None
        for agent in all_agents:
            agent.client.close(CLOCK.monotonic_ns())
            agent.pump()
        await until(lambda: one.process.poll() == 0, "it ends with the last client")
        assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []


async def test_no_process_outlives_its_parent(tmp_path: Path) -> None:
    async with installation(tmp_path) as one:
        workers = one.workers
        for pid in workers:
            os.kill(pid, signal.SIGTERM)  # as a service manager does, to all processes at once
        one.process.kill()
        await until(
            lambda: not any(_is_alive(pid) for pid in workers), "workers end with their parent"
        )


async def test_no_secret_is_on_a_command_line_or_in_the_log(tmp_path: Path) -> None:
    async with installation(tmp_path) as one:
        stamp = one.desk.joins[0].stamp_secret
        for pid in one.workers:
            shown = Path(f"/proc/{pid}/cmdline").read_bytes()
            shown += Path(f"/proc/{pid}/environ").read_bytes()
            assert stamp not in shown
            assert stamp.hex().encode() not in shown
            assert b"hlw_relay_" not in shown
        assert "hlw_relay_" not in one.log.read_text()


async def _until_lost(agent: Agent) -> object:
    while True:
        event = await agent.next()
        if isinstance(event, Lost):
            return event


def _flag(one: Installation, name: str) -> str:
    arguments = one.process.args
    assert isinstance(arguments, list)
    return str(arguments[arguments.index(name) + 1])


def _worker_of(one: Installation, index: int) -> int:
    """The process id, from the log."""
    started = re.findall(r"process_started .* pid=(\d+) process=(\d+)", one.log.read_text())
    return next(int(pid) for pid, at in started if int(at) == index)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
