"""The TUN device, in a namespace of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simulations.kernel.lab import Lab
from tunnel.shell.tun import TunDevice, TunError

pytestmark = pytest.mark.system

# Runs inside the namespace: answers one ping of the kernel, then goes.
ANSWERER = """
import sys
from ipaddress import IPv4Address, IPv6Address
import trio
from tunnel.packet import parse
from tunnel.shell.tun import TunDevice

async def main(tun):
    await tun.configure(IPv4Address("100.64.0.1"), IPv6Address("fd48:4c57:5900::1"), 1300)
    await trio.run_process(["ip", "route", "add", "10.9.0.0/24", "dev", tun.name])
    print(tun.name, flush=True)
    answered = 0
    with trio.fail_after(20):
        while answered < 3:
            await tun.wait_readable()
            for packet in tun.read_batch():
                header = parse(packet)
                if header is None or not header.is_echo_request:
                    continue
                body = bytearray(packet[header.offset:])
                body[0] = 0
                total = int.from_bytes(body[2:4], "big") + 0x0800
                body[2:4] = ((total & 0xFFFF) + (total >> 16)).to_bytes(2, "big")
                reply = packet[:12] + packet[16:20] + packet[12:16] + bytes(body)
                answered += tun.write_batch([reply])
    sys.stdin.read()
    statistics = tun.statistics()
    assert statistics.written_packets == 3 and statistics.dropped_packets == 0

with TunDevice.create("hlw%d") as tun:
    trio.run(main, tun)
"""


def test_the_kernel_pings_through_a_device_made_inside_a_namespace() -> None:
    with Lab() as lab:
        core = lab.router("core")
        host = lab.public_host("host", core, "203.0.113.2/30")
        answerer = host.spawn(
            [sys.executable, "-c", ANSWERER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert answerer.stdout is not None
        name = answerer.stdout.readline().decode().strip()
        assert name == "hlw0"
        printed = host.run("ping", "-c", "3", "-i", "0.2", "-W", "5", "10.9.0.7")
        assert "3 received" in printed
        shown = host.run("ip", "addr", "show", "dev", name)
        assert "mtu 1300" in shown
        assert "100.64.0.1/32" in shown
        assert "fd48:4c57:5900::1/128" in shown
        assert "fe80" not in shown
        answerer.communicate(b"")
        assert answerer.returncode == 0
        assert name not in host.run("ip", "link", "show")


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(TunError, match="1 to 15 bytes"):
        TunDevice.create("a-name-that-is-far-too-long")
