"""The lab of namespaces: it routes, its NATs behave as named, and it leaves nothing behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simulations.kernel.lab import Host, Lab, LabError, sweep

pytestmark = pytest.mark.system


def namespaces(prefix: str) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(prefix)]


def udp_socket(host: Host, address: tuple[str, int]) -> socket.socket:
    with host.entered():
        bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    bound.bind(address)
    bound.settimeout(2)
    return bound


def test_an_easy_nat_keeps_one_mapping_and_a_hard_one_does_not() -> None:
    with Lab() as lab:
        core = lab.router("core")
        first = lab.public_host("first", core, "203.0.113.2/30")
        second = lab.public_host("second", core, "203.0.113.6/30")
        home = lab.nat("home", core, wan="198.51.100.2/30", lan="192.168.1.1/24")
        laptop = lab.host("laptop", home, "192.168.1.10/24")
        servers = [
            udp_socket(first, ("203.0.113.2", 3478)),
            udp_socket(second, ("203.0.113.6", 3478)),
        ]
        mappings = {}
        for kind in ("port_restricted", "symmetric"):
            home.set_nat(kind)
            home.flush_bindings()
            inside = udp_socket(laptop, ("192.168.1.10", 41_000))
            seen = []
            for server in servers:
                inside.sendto(b"who am I", server.getsockname())
                seen.append(server.recvfrom(100)[1])
            mappings[kind] = seen
            # endpoint-dependent filtering: a stranger's packet does not get in
            stranger = udp_socket(second, ("203.0.113.6", 9_999))
            stranger.sendto(b"let me in", seen[0])
            inside.settimeout(0.3)
            with pytest.raises(TimeoutError):
                inside.recvfrom(100)
            inside.close()
            stranger.close()
        assert mappings["port_restricted"] == [("198.51.100.2", 41_000)] * 2
        assert mappings["symmetric"][0] != mappings["symmetric"][1]
        for server in servers:
            server.close()


def test_nothing_is_left_after_an_exception() -> None:
    lab = Lab()
    with pytest.raises(LabError), lab:  # noqa: PT012
        core = lab.router("core")
        sleeper = lab.public_host("sleeper", core, "203.0.113.2/30").spawn(["sleep", "1000"])
        assert len(namespaces(lab.prefix)) == 2
        core.run("false")
    assert namespaces(lab.prefix) == []
    assert sleeper.wait(timeout=10) != 0
    assert not lab.directory.exists()


def test_the_janitor_removes_everything_when_the_maker_is_killed() -> None:
    maker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time\nfrom simulations.kernel.lab import Lab\nlab = Lab().__enter__()\n"
            "lab.router('core')\nprint(lab.prefix, flush=True)\ntime.sleep(1000)",
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert maker.stdout is not None
    prefix = maker.stdout.readline().strip()
    assert namespaces(prefix)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    deadline = time.monotonic() + 30
    while namespaces(prefix) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert namespaces(prefix) == []


def test_a_sweep_refuses_to_remove_more_than_one_run() -> None:
    with pytest.raises(LabError):
        sweep("hlw-")
    with pytest.raises(LabError):
        sweep("")
