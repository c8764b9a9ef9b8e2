"""Where nodes run: one contract for nodes as tasks and for nodes on Ray, and what only Ray does.

Ray is real: one private head and three raylets, started once for this file by our own code.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.hosting.interface import (
    Cluster,
    ClusterUnavailable,
    DrainTimedOut,
    NodeExists,
    NodeFailed,
    NodeStatus,
    NodeUnavailable,
    NoSuchNode,
    NoSuchQuestion,
    RestartPause,
)
from runtime.hosting.local_cluster import open_local_cluster
from runtime.hosting.ray_cluster import RayCluster, open_ray_cluster
from runtime.hosting.ray_machine import MachineSettings, RayMachine, session_processes
from runtime.hosting.ray_settings import RayAccess, RayTls, make_token
from tests.ports import free_port

pytestmark = pytest.mark.system

QUICK = RestartPause(young_ns=NS_PER_S, pause_ns=20 * NS_PER_MS)
PATIENT = RestartPause(young_ns=600 * NS_PER_S, pause_ns=600 * NS_PER_S)
PLAIN = "tests.system.node_bodies:plain"

Open = Callable[..., AbstractAsyncContextManager[Cluster]]


class PrivateRay:
    """A head and raylets of this test run alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[RayMachine] = []
        settings = MachineSettings(directory=directory / "h")
        self.head = self.keep(RayMachine.head(settings, port=free_port()))
        self.address = self.head.ready()
        self.raylets = [self.join() for _ in range(3)]
        self.stranger = self.join_with_another_token()
        for raylet in self.raylets:
            raylet.ready()

    def keep(self, machine: RayMachine) -> RayMachine:
        self.started.append(machine)
        return machine

    def join(self) -> RayMachine:
        directory = self.directory / f"r{len(self.started)}"
        settings = MachineSettings(directory=directory, access=self.head.access, slots=8)
        return self.keep(RayMachine.join(settings, self.address))

    def join_with_another_token(self) -> RayMachine:
        """Begun along with the others, since Ray takes 20 s to give up."""
        wrong = RayAccess(token_file=self.directory / "wrong")
        make_token(wrong.token_file)
        settings = MachineSettings(directory=self.directory / "w", access=wrong)
        return self.keep(RayMachine.join(settings, self.address))

    def head_returns(self) -> None:
        port = int(self.address.rpartition(":")[2])
        self.head = self.keep(RayMachine.head(self.head.settings, port=port))
        assert self.head.ready() == self.address

    def cluster(
        self, body: str, settings: Mapping[str, Any] | None = None, **options: Any
    ) -> AbstractAsyncContextManager[RayCluster]:
        """As an operator would open it, through the first raylet."""
        access, through = self.head.access, self.raylets[0].settings.directory
        return open_ray_cluster(self.address, access, body, settings, through=through, **options)

    def end(self) -> None:
        for machine in reversed(self.started):
            machine.end()


@pytest.fixture(scope="module")
def private_ray() -> Iterator[PrivateRay]:
    directory = Path(tempfile.mkdtemp(prefix="hr"))
    ray = PrivateRay.__new__(PrivateRay)
    ray.started = []
    try:
        ray.__init__(directory)  # type: ignore[misc]
        yield ray
    finally:
        ray.end()
        left = [pid for machine in ray.started for pid in machine.processes()]
        shutil.rmtree(directory, ignore_errors=True)
    assert left == []
    assert not any(machine.running() for machine in ray.started)


@pytest.fixture(params=["tasks", "ray"])
def opened(request: pytest.FixtureRequest) -> Open:
    """Opens a cluster of nodes of a body."""
    if request.param == "tasks":
        return open_local_cluster
    ray: PrivateRay = request.getfixturevalue("private_ray")
    return ray.cluster


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 60) -> Any:
    """What `condition` gives as soon as it is true; a node that cannot answer yet is waited for."""
    with trio.fail_after(seconds):
        while True:
            with suppress(NodeUnavailable):
                if found := await condition():
                    return found
            await trio.sleep(0.05)


async def status_of(cluster: Cluster, name: str) -> NodeStatus:
    return next(status for status in await cluster.nodes() if status.name == name)


async def pid_of(cluster: Cluster, name: str) -> int:
    return (await cluster.ask(name, "status"))["pid"]


async def drain_all(cluster: Cluster) -> None:
    for status in await cluster.nodes():
        await cluster.drain(status.name)


@asynccontextmanager
async def emptied(cluster: Cluster) -> AsyncIterator[None]:
    """Nodes on Ray outlive a test that failed, unless they are drained."""
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await drain_all(cluster)


# --- the contract ------------------------------------------------------------------------------


async def test_nodes_are_started_asked_and_drained(opened: Open):
    async with opened(PLAIN, {"colour": "red", "number": 1}) as cluster, emptied(cluster):
        assert await cluster.nodes() == ()
        status = await cluster.start("n1", {"number": 2})
        assert (status.name, status.state, status.restarts) == ("n1", "running", 0)
        assert status.reason is None
        await cluster.start("n2")
        assert [node.name for node in await cluster.nodes()] == ["n1", "n2"]
        assert (await status_of(cluster, "n1")).pid == await pid_of(cluster, "n1")
        assert await cluster.ask("n1", "settings") == {"colour": "red", "number": 2}
        assert await cluster.ask("n2", "settings") == {"colour": "red", "number": 1}
        assert [await cluster.ask("n1", "count") for _ in range(3)] == [1, 2, 3]

        with pytest.raises(NodeExists):
            await cluster.start("n1")
        with pytest.raises(ValueError, match="not the name of a node"):
            await cluster.start("N 1")
        with pytest.raises(ValueError, match="plain values"):
            await cluster.start("n3", {"secret": object()})
        with pytest.raises(NoSuchQuestion, match="'nobody knows'"):
            await cluster.ask("n1", "nobody knows")
        with pytest.raises(NodeFailed, match="'fail': LookupError: no such thing"):
            await cluster.ask("n1", "fail")
        with pytest.raises(NodeFailed, match="'unspeakable'"):
            await cluster.ask("n1", "unspeakable")
        assert await cluster.ask("n1", "count") == 4, "it goes on"

        await cluster.drain("n1")
        assert [node.name for node in await cluster.nodes()] == ["n2"]
        with pytest.raises(NoSuchNode):
            await cluster.ask("n1", "status")
        with pytest.raises(NoSuchNode):
            await cluster.drain("n1")
        await cluster.start("n1")
        assert await cluster.ask("n1", "count") == 1, "another life"


async def test_a_node_that_crashes_is_restarted_under_its_name(opened: Open):
    async with opened(PLAIN, pause=QUICK) as cluster, emptied(cluster):
        begun = (await cluster.start("n1", {"kept": True})).since
        assert [await cluster.ask("n1", "count") for _ in range(2)] == [1, 2]
        await cluster.ask("n1", "crash")

        async def restarted() -> NodeStatus | None:
            status = await status_of(cluster, "n1")
            return status if (status.restarts, status.state) == (1, "running") else None

        status = await until(restarted)
        assert status.since > begun
        assert await until(lambda: cluster.ask("n1", "count")) == 1
        assert await cluster.ask("n1", "settings") == {"kept": True}


async def test_a_body_that_cannot_start_says_why_and_leaves_nothing(opened: Open):
    async with opened("tests.system.node_bodies:broken") as cluster, emptied(cluster):
        with pytest.raises(NodeFailed) as caught:
            await cluster.start("n1")
        assert caught.value.reason == "ValueError: n1 has no database"
        assert await cluster.nodes() == ()
    async with opened("tests.system.node_bodies:not_there") as cluster, emptied(cluster):
        with pytest.raises(NodeFailed, match="not an async function"):
            await cluster.start("n1")
    async with opened("tests.system.node_bodies:mute") as cluster, emptied(cluster):
        with pytest.raises(NodeUnavailable, match="not up by the deadline"):
            await cluster.start("n1", deadline_ns=50 * NS_PER_MS)
        assert await cluster.nodes() == ()


async def test_a_drain_ends_in_time_whatever_the_node_does(opened: Open):
    async with opened(PLAIN) as cluster, emptied(cluster):
        await cluster.start("slow", {"drain_s": 600})
        await cluster.start("clumsy", {"drain": "fail"})
        with pytest.raises(DrainTimedOut):
            await cluster.drain("slow", deadline_ns=100 * NS_PER_MS)
        with pytest.raises(NodeFailed, match="OSError: could not let go"):
            await cluster.drain("clumsy")
        assert await cluster.nodes() == ()


async def test_a_node_that_waits_to_be_restarted_says_why_and_can_be_drained(opened: Open):
    async with opened(PLAIN, pause=PATIENT) as cluster, emptied(cluster):
        await cluster.start("n1")
        await cluster.ask("n1", "crash")

        async def waiting() -> NodeStatus | None:
            status = await status_of(cluster, "n1")
            return status if status.state == "restarting" else None

        assert (await until(waiting)).reason == "RuntimeError: told to crash"
        with pytest.raises(NodeUnavailable):
            await cluster.ask("n1", "count")
        await cluster.drain("n1")
        assert await cluster.nodes() == ()


# --- what only Ray does --------------------------------------------------------------------------


async def greeting(port: int) -> str:
    """What a node says by its own TCP door, without Ray."""
    with trio.fail_after(10):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            return bytes(await stream.receive_some(100)).decode()


async def restarted_elsewhere(cluster: Cluster, name: str, old: int) -> int:
    async def other() -> int | None:
        pid = await pid_of(cluster, name)
        return pid if pid != old else None

    pid: int = await until(other)
    return pid


def raylet_of(ray: PrivateRay, pid: int) -> RayMachine:
    return next(raylet for raylet in ray.raylets if pid in raylet.processes())


async def test_a_node_whose_process_is_killed_comes_back_under_its_name(private_ray: PrivateRay):
    async with private_ray.cluster(PLAIN) as cluster, emptied(cluster):
        await cluster.start("n1")
        old = await pid_of(cluster, "n1")
        assert old != os.getpid()
        os.kill(old, signal.SIGKILL)
        begun = time.monotonic()
        new = await restarted_elsewhere(cluster, "n1", old)
        print(f"node killed: answers again after {time.monotonic() - begun:.1f} s")
        status = await status_of(cluster, "n1")
        assert (status.restarts, status.pid, status.state) == (1, new, "running")
        os.kill(new, signal.SIGKILL)
        await restarted_elsewhere(cluster, "n1", new)
        assert (await status_of(cluster, "n1")).restarts == 2


async def test_nodes_go_on_when_the_cluster_is_closed(private_ray: PrivateRay):
    async with private_ray.cluster(PLAIN) as cluster:
        await cluster.start("n1")
        door = await cluster.ask("n1", "status")
    assert await greeting(door["port"]) == f"n1 {door['pid']}"
    async with private_ray.cluster(PLAIN) as cluster, emptied(cluster):
        assert await cluster.ask("n1", "status") == door
        with pytest.raises(NodeExists):
            await cluster.start("n1")
        with pytest.raises(ClusterUnavailable, match="a Ray already"):
            async with private_ray.cluster(PLAIN, namespace="another"):
                pass
        assert await cluster.ask("n1", "status") == door, "and has it still"


async def test_nodes_of_a_raylet_that_is_killed_come_back_on_the_others(private_ray: PrivateRay):
    async with private_ray.cluster(PLAIN) as cluster, emptied(cluster):
        names = [f"n{number}" for number in range(4)]
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(cluster.start, name)
        pids = {name: await pid_of(cluster, name) for name in names}
        homes = {name: raylet_of(private_ray, pid) for name, pid in pids.items()}
        victim = next(raylet for raylet in homes.values() if raylet is not private_ray.raylets[0])
        lost = [name for name in names if homes[name] is victim]
        os.killpg(victim.pid, signal.SIGKILL)  # the raylet, its agents, and who watches them
        begun = time.monotonic()
        for name in lost:
            new = await restarted_elsewhere(cluster, name, pids[name])
            assert raylet_of(private_ray, new) is not victim
            print(f"raylet killed: {name} answers again after {time.monotonic() - begun:.1f} s")
        for name in names:
            assert (await status_of(cluster, name)).restarts == (1 if name in lost else 0)

        def replaced() -> None:
            victim.end()
            private_ray.raylets.remove(victim)
            private_ray.raylets.append(private_ray.join())
            private_ray.raylets[-1].ready()

        await trio.to_thread.run_sync(replaced)


async def test_nodes_go_on_without_ray_s_head_and_are_found_again_by_it(private_ray: PrivateRay):
    async with private_ray.cluster(PLAIN) as cluster, emptied(cluster):
        await cluster.start("n1")
        await cluster.start("n2")
        doors = {name: await cluster.ask(name, "status") for name in ("n1", "n2")}

        os.killpg(private_ray.head.pid, signal.SIGKILL)
        await trio.to_thread.run_sync(private_ray.head.end)
        for name, door in doors.items():
            assert await greeting(door["port"]) == f"{name} {door['pid']}"
            assert await cluster.ask(name, "status") == door, "without the head too"
        with pytest.raises(ClusterUnavailable):
            await cluster.nodes()
        with pytest.raises(ClusterUnavailable):
            await cluster.start("n3")
        assert [raylet.running() for raylet in private_ray.raylets] == [True] * 3

        begun = time.monotonic()
        await trio.to_thread.run_sync(private_ray.head_returns)
        print(f"head returned after {time.monotonic() - begun:.1f} s")
        for name, door in doors.items():
            assert await greeting(door["port"]) == f"{name} {door['pid']}", "the same process"
        statuses = [(status.name, status.pid, status.restarts) for status in await cluster.nodes()]
        assert statuses == [(name, door["pid"], 0) for name, door in doors.items()]
        os.kill(doors["n1"]["pid"], signal.SIGKILL)
        await restarted_elsewhere(cluster, "n1", doors["n1"]["pid"])
        await cluster.start("n4")
        assert len(await cluster.nodes()) == 3


# --- who may reach it ----------------------------------------------------------------------------


def test_ray_listens_on_loopback_alone_and_its_token_is_in_no_argument(private_ray: PrivateRay):
    token = private_ray.head.access.token_file.read_text()
    assert private_ray.head.access.token_file.stat().st_mode & 0o777 == 0o600
    pids = {pid for machine in private_ray.started for pid in (machine.pid, *machine.processes())}
    sockets = set()
    for pid in pids:
        with suppress(OSError):
            assert token not in Path(f"/proc/{pid}/cmdline").read_text()
            links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
            sockets |= {link[8:-1] for link in links if link.startswith("socket:[")}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                listening.append(fields[1].partition(":")[0])
    assert len(listening) > 6
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    assert set(listening) <= loopback
    for machine in private_ray.started:
        assert machine.settings.directory.stat().st_mode & 0o777 == 0o700


def test_another_token_is_refused(private_ray: PrivateRay):
    stranger = private_ray.stranger
    with pytest.raises(ClusterUnavailable, match="did not start"):
        stranger.ready()
    assert "InvalidAuthToken" in (stranger.settings.directory / "machine.log").read_text()
    assert not stranger.running()
    assert stranger.processes() == []


def make_tls(directory: Path) -> RayTls:
    """Certificates for 127.0.0.1 as an operator's own authority would make them."""
    now = datetime.now(UTC)

    def certificate(
        name: str, key: ec.EllipticCurvePrivateKey, issuer: str
    ) -> x509.CertificateBuilder:
        subject, by = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer)
        )
        return (
            x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
        )

    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = certificate("authority", authority_key, "authority").add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    )
    address = x509.IPAddress(ip_address("127.0.0.1"))
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    leaf = (
        certificate("machine", key, "authority")
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    )
    files = RayTls(
        certificate=directory / "machine.pem",
        key=directory / "machine.key",
        authority=directory / "authority.pem",
    )
    for path, builder in ((files.authority, authority), (files.certificate, leaf)):
        signed = builder.sign(authority_key, hashes.SHA256())
        path.write_bytes(signed.public_bytes(Encoding.PEM))
    files.key.touch(mode=0o600)
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


def greeting_of_http2(context: ssl.SSLContext, host: str, port: int) -> bytes:
    """The first bytes that a server of HTTP/2 says, once its own certificate was found good."""
    with (
        socket.create_connection((host, port), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as stream,
        suppress(ssl.SSLError, ConnectionError),
    ):
        stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        return stream.recv(9)
    return b""


def test_with_certificates_ray_speaks_tls_with_those_who_have_one(private_ray: PrivateRay):
    tls = make_tls(private_ray.directory)
    access = RayAccess(token_file=private_ray.head.access.token_file, tls=tls)
    directory = private_ray.directory / "s"
    head = private_ray.keep(
        RayMachine.head(MachineSettings(directory=directory / "h", access=access))
    )
    host, _, port = head.ready().rpartition(":")
    joined = MachineSettings(directory=directory / "r", access=access)
    with RayMachine.join(joined, head.ready()) as raylet:
        assert raylet.ready() == head.ready()
        context = ssl.create_default_context(cafile=tls.authority)
        context.set_alpn_protocols(["h2"])
        assert greeting_of_http2(context, host, int(port)) == b"", (
            "a stranger without a certificate"
        )
        context.load_cert_chain(tls.certificate, tls.key)
        assert greeting_of_http2(context, host, int(port)) != b""
    head.end()


def test_all_of_ray_ends_when_who_started_it_is_killed(private_ray: PrivateRay):
    directory = private_ray.directory / "k"
    program = (
        "import sys; from pathlib import Path\n"
        "from runtime.hosting.ray_machine import MachineSettings, RayMachine\n"
        "machine = RayMachine.head(MachineSettings(directory=Path(sys.argv[1])))\n"
        "machine.ready(); print(machine.pid, *machine.processes(), flush=True); input()"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", program, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with starter:
        assert starter.stdout is not None
        pids = [int(pid) for pid in starter.stdout.readline().split()]
        starter.kill()
    assert len(pids) >= 3
    deadline = time.monotonic() + 30
    while (alive := session_processes(pids[0], leader=True)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive == []
