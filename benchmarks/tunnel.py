"""The tunnel's throughput beside wireguard-go: `python -m benchmarks.tunnel [--quick] [--json]`.

A whole installation runs in a lab of namespaces: laptop, home NAT, office NAT, gateway, web host.
The web host serves iperf3, and the laptop downloads from it through (a) Holloway's direct path and
(b) wireguard-go between the same laptop and a host beside the gateway, in paired rounds that take
turns. CPU is what the two tunnel processes use, per 10**9 bytes delivered. Needs root. The last
line is one JSON object; a figure that was not measured is null.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import attrs
from rich.console import Console
from rich.table import Table

from simulations.installation import (
    GATEWAYS,
    HOME_NAT,
    OFFICE_NAT,
    WEB,
    Installation,
    InstallationError,
    wait_until,
)
from simulations.kernel.lab import Host, Lab, LabError, missing_requirements
from tunnel.wireguard.noise import public_key_of

PORT = 80
LAPTOP_PORT, GATEWAY_PORT = 41_641, 41_642
LAPTOP_WG, GATEWAY_WG = "10.99.0.1", "10.99.0.2"
# An iperf3 server that still ends one test refuses or resets whoever comes for the next.
ATTEMPTS, PAUSE_S = 3, 0.5
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
KEYS = (
    "peer", "peer_version", "tcp1_pure", "tcp4_pure", "tcp1_native", "tcp4_native",
    "cpu_per_gb_pure", "cpu_per_gb_native", "udp64_native", "udp512_native", "udp1200_native",
    "rtt_loaded", "plain_nic_tcp1_pure", "plain_nic_tcp1_native", "relayed_over_direct",
    "gbit_per_s_native",
)  # fmt: skip


@attrs.frozen
class Sample:
    """One transfer: goodput in bit/s, and CPU seconds of both tunnel ends per 10**9 bytes."""

    bits_per_s: float
    cpu_per_gb: float


class Holloway:
    """The tunnel under test: the laptop's client and whichever gateway it uses."""

    name = "holloway"

    def __init__(self, installation: Installation) -> None:
        self.installation = installation

    def up(self) -> None:
        """The routes of the client stand all the time."""

    def down(self) -> None:
        """See `up`."""

    def pids(self) -> list[int]:
        parts = self.installation.components
        names = ("laptop", *GATEWAYS)
        return [process.pid for name in names if (process := parts[name].process) is not None]


class WireguardGo:
    """wireguard-go at both ends; the laptop reaches the web host through it only while `up`."""

    name = "wireguard-go"

    def __init__(self, installation: Installation) -> None:
        lab = installation.lab
        self.laptop = installation.laptop
        # A host of its own beside the gateways: those forward nothing but Holloway's packets.
        self.gateway = lab.host("wireguard", installation.office, "10.20.0.21/24")
        self.gateway.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        ours, theirs = secrets.token_bytes(32), secrets.token_bytes(32)
        self.interfaces = (f"wa{lab.run_name}"[:15], f"wb{lab.run_name}"[:15])
        self.processes = [
            self._start(lab, self.laptop, self.interfaces[0], LAPTOP_WG, LAPTOP_PORT, ours, theirs,
                        f"{OFFICE_NAT}:{GATEWAY_PORT}"),
            self._start(lab, self.gateway, self.interfaces[1], GATEWAY_WG, GATEWAY_PORT, theirs,
                        ours, f"{HOME_NAT}:{LAPTOP_PORT}"),
        ]  # fmt: skip
        self.gateway.nft(
            f"table ip bench_{os.getpid()} {{\nchain post {{\n"
            "type nat hook postrouting priority srcnat;\n"
            f"ip saddr {LAPTOP_WG} masquerade\n}}\n}}\n"
        )

    def _start(
        self,
        lab: Lab,
        host: Host,
        interface: str,
        address: str,
        port: int,
        private: bytes,
        peer_private: bytes,
        endpoint: str,
    ) -> subprocess.Popen[bytes]:
        process = host.spawn(
            ["wireguard-go", "-f", interface],
            env={"LOG_LEVEL": "error", "WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        control = Path(f"/var/run/wireguard/{interface}.sock")
        wait_until(control.exists, what="wireguard-go listens")
        path = lab.directory / f"{interface}.conf"
        path.touch(mode=0o600)
        path.write_text(
            f"[Interface]\nPrivateKey = {b64encode(private).decode()}\nListenPort = {port}\n"
            f"[Peer]\nPublicKey = {b64encode(public_key_of(peer_private)).decode()}\n"
            f"AllowedIPs = 0.0.0.0/0\nEndpoint = {endpoint}\nPersistentKeepalive = 1\n"
        )
        host.run("wg", "setconf", interface, os.fspath(path))
        host.ip(f"addr add {address}/24 dev {interface}", f"link set {interface} mtu 1420 up")
        return process

    def up(self) -> None:
        """Lead the laptop's traffic for the web host through this tunnel, before Holloway's."""
        self.laptop.ip(
            f"rule add pref 1 to {WEB} lookup 7777",
            f"route add {WEB} dev {self.interfaces[0]} src {LAPTOP_WG} table 7777",
        )
        wait_until(
            lambda: "1 received" in self.laptop.run("ping", "-c1", "-W1", WEB, check=False),
            what="the web host answers through wireguard-go",
        )

    def down(self) -> None:
        self.laptop.ip(f"rule del pref 1 to {WEB}", "route flush table 7777")

    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.wait(timeout=10)


Tunnel = Holloway | WireguardGo


def transfer(it: Installation, tunnel: Tunnel, *, streams: int, seconds: int) -> Sample:
    """Download from the web host through `tunnel`, once. Raises InstallationError."""
    tunnel.up()
    try:
        why = ""
        for _ in range(ATTEMPTS):
            before = _cpu_s(tunnel.pids())
            done = subprocess.run(
                ["ip", "netns", "exec", it.laptop.name, "iperf3", "--client", WEB,
                 "--port", str(PORT), "--reverse", "--parallel", str(streams),
                 "--time", str(seconds), "--json"],
                capture_output=True,
                text=True,
                timeout=seconds + 30,
            )  # fmt: skip
            used = _cpu_s(tunnel.pids()) - before
            report = json.loads(done.stdout or "{}")
            received = report.get("end", {}).get("sum_received")
            if done.returncode == 0 and received:
                return Sample(received["bits_per_second"], used / received["bytes"] * 1e9)
            why = report.get("error") or done.stderr or f"it ended with {done.returncode}"
            time.sleep(PAUSE_S)
    finally:
        tunnel.down()
    raise InstallationError(f"iperf3 through {tunnel.name}: {why}")


def run(*, quick: bool, console: Console) -> dict[str, object]:
    """Measure everything; the keys of the last line. Raises LabError, InstallationError."""
    rounds, seconds = (2, 3) if quick else (5, 8)
    figures: dict[str, object] = dict.fromkeys(KEYS)
    with Lab() as lab:
        it = Installation(lab)
        _start(it)
        tunnels: list[Tunnel] = [Holloway(it)]
        if not missing_requirements({"wireguard-go": "wireguard-go", "wg": "wireguard-tools"}):
            tunnels.append(WireguardGo(it))
            figures["peer"], figures["peer_version"] = "wireguard-go", _version("wireguard-go")
        else:
            console.print("wireguard-go or wg is missing: no ratios")
        samples: dict[tuple[str, int], list[Sample]] = {}
        try:
            for _ in range(rounds):
                for streams in (1, 4):
                    for tunnel in tunnels:
                        sample = transfer(it, tunnel, streams=streams, seconds=seconds)
                        samples.setdefault((tunnel.name, streams), []).append(sample)
        finally:
            for tunnel in tunnels:
                if isinstance(tunnel, WireguardGo):
                    tunnel.close()
        if not quick:
            relayed = _relayed(it, tunnels[0], seconds)
            samples[("holloway relayed", 1)] = [relayed]
            direct = _median(samples[("holloway", 1)], _rate)
            figures["relayed_over_direct"] = round(relayed.bits_per_s / direct, 3)
    _print(console, samples)
    for streams in (1, 4):
        ratios = _ratios(samples, streams, _rate)
        figures[f"tcp{streams}_pure"] = ratios
    figures["cpu_per_gb_pure"] = _ratios(samples, 1, _cpu)
    figures["gbit_per_s_pure"] = round(_median(samples[("holloway", 1)], _rate) / 1e9, 3)
    return figures


def _start(it: Installation) -> None:
    """Bring the installation up, with an iperf3 server where its policy lets the laptop go."""
    it.start_portal()
    it.make_account()
    it.start_relay()
    for name in GATEWAYS:
        it.start_gateway(name)
    it.start_client()
    it.wait_until_online(60)
    server = it.web.spawn(
        ["iperf3", "--server", "--port", str(PORT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    it.allow()
    wait_until(lambda: server.poll() is None and _answers(it), what="iperf3 answers", timeout_s=60)
    wait_until(
        lambda: _path_kind(it) == "direct", what="the path through the NATs is direct", timeout_s=60
    )


def _answers(it: Installation) -> bool:
    try:
        it.laptop.connect((WEB, PORT), timeout_s=3).close()
    except OSError:
        return False
    return True


def _path_kind(it: Installation) -> str | None:
    paths = [peer["path"] for peer in it.status().get("peers", []) if peer.get("path")]
    return paths[0]["kind"] if paths else None


def _relayed(it: Installation, tunnel: Tunnel, seconds: int) -> Sample:
    it.set_nats("symmetric")
    wait_until(
        lambda: _answers(it) and _path_kind(it) == "relayed",
        what="the path leads through the relay",
        timeout_s=60,
    )
    return transfer(it, tunnel, streams=1, seconds=seconds)


def _cpu_s(pids: list[int]) -> float:
    """User and system time of these processes so far (proc(5), fields 14 and 15)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


def _rate(sample: Sample) -> float:
    return sample.bits_per_s


def _cpu(sample: Sample) -> float:
    return sample.cpu_per_gb


def _median(samples: list[Sample], of: Callable[[Sample], float]) -> float:
    return statistics.median(of(sample) for sample in samples)


def _ratios(
    samples: dict[tuple[str, int], list[Sample]], streams: int, of: Callable[[Sample], float]
) -> float | None:
    """The median of the paired ratios, Holloway over peer."""
    peers = samples.get(("wireguard-go", streams))
    if not peers:
        return None
    pairs = zip(samples[("holloway", streams)], peers, strict=True)
    return round(statistics.median(of(ours) / of(theirs) for ours, theirs in pairs), 3)


def _print(console: Console, samples: dict[tuple[str, int], list[Sample]]) -> None:
    table = Table(title="Download through the tunnel, 2 NATs, direct unless named otherwise")
    for column in ("tunnel", "TCP streams", "Mbit/s median", "lowest", "highest", "CPU s/GB"):
        table.add_column(column)
    for (name, streams), taken in samples.items():
        rates = sorted(sample.bits_per_s / 1e6 for sample in taken)
        row = [statistics.median(rates), rates[0], rates[-1]]
        table.add_row(
            name, str(streams), *(f"{rate:.0f}" for rate in row), f"{_median(taken, _cpu):.1f}"
        )
    console.print(table)
    console.print(
        f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} cores, "
        f"iperf3 {_version('iperf3')}, wireguard-go {_version('wireguard-go')} "
        "(MTU 1420; Holloway 1280). "
        "Not measured: native variant, UDP, loaded round trip, plain NIC."
    )


def _version(program: str) -> str | None:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    words = (done.stdout or done.stderr).split()
    return next((word for word in words if word[:1] in "v0123456789"), None)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the tunnel beside wireguard-go.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json, highlight=False, width=100)
    if missing := missing_requirements({"iperf3": "iperf3"}):
        print(*missing, sep="\n", file=sys.stderr)
        print(json.dumps(dict.fromkeys(KEYS)))
        return 2
    begun = time.monotonic()
    try:
        figures = run(quick=arguments.quick, console=console)
    except (LabError, InstallationError) as error:
        print(f"benchmarks.tunnel: {error}", file=sys.stderr)
        print(json.dumps(dict.fromkeys(KEYS)))
        return 1
    console.print(f"{time.monotonic() - begun:.0f} s")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
