"""Networks made of Linux network namespaces, with real NATs by nftables.

A `Lab` is a context manager: its namespaces bear the name of the run (`hlw-<run>-<host>`), and
exactly those are removed at its end, with the processes inside them, also after an exception.
Should the maker itself be killed, a janitor process that waits for its death removes the same.
Needs root, `ip` (iproute2), `nft` and, to flush a NAT's bindings, `conntrack`.

    with Lab() as lab:
        core = lab.router("core")
        home = lab.nat("home", core, wan="198.51.100.2/30", lan="192.168.1.1/24")
        laptop = lab.host("laptop", home, "192.168.1.10/24")
        laptop.run("ping", "-c1", "203.0.113.2")

The two kinds of NAT that `nat` makes are those that most tests need; `simulations.kernel.nats` has
every other. Plain `masquerade` alone is no easy NAT, since a peer's packet that arrives first would
take the port of the own flow.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_interface
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import attrs

NatKind = Literal["port_restricted", "symmetric"]

_EASY = "masquerade"
_HARD = "masquerade random,fully-random"
_CLONE_NEWNET = 0x4000_0000
PREFIX = "hlw-"
ETC = Path("/etc/netns")
"""Where `ip netns exec` finds what a namespace has in place of files in /etc (ip-netns(8))."""
LINK_ROUTER = "fe80::1"
"""A router, as its neighbours know it on their links."""
DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")
"""Before a command: it is killed when we die. (Not done by code between fork and exec: then CPython
runs its callbacks of a fork in us, too, and a signal's exception that is raised in one is lost.)"""
REQUIRED_PROGRAMS = {
    "setpriv": "util-linux",
    "ip": "iproute2",
    "nft": "nftables",
    "conntrack": "conntrack",
    "sysctl": "procps",
}


class LabError(Exception):
    """A namespace could not be made or a command in it failed; the message says which and why."""


def missing_requirements(programs: dict[str, str] | None = None) -> list[str]:
    """What this machine lacks for a lab, one sentence each; empty when all is there.

    `programs` maps further executables to the Debian package that brings them.
    """
    missing = []
    if os.geteuid() != 0:
        missing.append("root is needed to make network namespaces: run with sudo")
    for program, package in (REQUIRED_PROGRAMS | (programs or {})).items():
        if shutil.which(program, path=_search_path()) is None:
            missing.append(f"`{program}` is missing: apt-get install {package}")
    if os.geteuid() == 0 and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        missing.append("/dev/net/tun cannot be opened: load the tun module, or allow the device")
    if missing:
        return missing
    probe = f"{PREFIX}probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return [f"network namespaces are not permitted here: {made.stderr.strip()}"]
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return []


@attrs.define
class Host:
    """One namespace of a lab. `name` is the full name that `ip netns` shows, `device` the one
    by which it hangs on the next router, `uplink` that router's end of it, and `wan_address` the
    outer address of a NAT."""

    name: str
    short_name: str
    device: str = ""
    uplink: str = ""
    wan_address: str = ""
    _attachments: int = 0
    _hops: int = 0
    _lan_network: str | None = None

    def run(self, *argv: str, check: bool = True, timeout_s: float = 60.0) -> str:
        """Run a command inside to its end and return what it printed. Raises LabError."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *argv],
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode != 0:
            raise LabError(
                f"{self.short_name}: `{' '.join(argv)}` ended with {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()}"
            )
        return done.stdout

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process inside, in a session of its own; it is killed if the maker dies."""
        return subprocess.Popen(
            [*DIES_WITH_PARENT, "ip", "netns", "exec", self.name, *argv],
            env=None if env is None else os.environ | env,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            start_new_session=True,
        )

    def name_hosts(self, names: Mapping[str, Sequence[str]]) -> None:
        """Have what is started inside from now on find these names at these addresses."""
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        lines += [f"{address} {name}" for name, each in names.items() for address in each]
        directory = ETC / self.name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "hosts").write_text("\n".join(lines) + "\n")

    def nft(self, rules: str) -> None:
        """Load an nftables file. Raises LabError with nft's own words."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, "nft", "-f", "-"],
            input=rules,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise LabError(f"{self.short_name}: nft: {done.stderr.strip()}")

    def ip(self, *commands: str) -> None:
        """Run `ip` commands inside as one batch."""
        done = subprocess.run(
            ["ip", "-n", self.name, "-batch", "-"],
            input="\n".join(commands) + "\n",
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise LabError(f"{self.short_name}: ip: {done.stderr.strip()}")

    def set_nat(self, kind: NatKind) -> None:
        """Change how this NAT maps new flows; bindings that exist stay (see `flush_bindings`)."""
        self.nft(_nat_rules(kind))

    def flush_bindings(self) -> None:
        """Forget every binding of this NAT, as a reboot or a rebinding would."""
        self.run("conntrack", "-F")

    def pids(self) -> list[int]:
        """Processes that live in this namespace."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(line) for line in done.stdout.split()]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within this block the calling thread makes its sockets in this namespace.

        Not for a thread that runs an event loop: only sockets made inside belong here.
        """
        with (
            open(f"/proc/self/task/{threading.get_native_id()}/ns/net", "rb") as outside,
            open(f"/var/run/netns/{self.name}", "rb") as inside,
        ):
            _setns(inside.fileno())
            try:
                yield
            finally:
                _setns(outside.fileno())

    def connect(self, address: tuple[str, int], *, timeout_s: float = 10.0) -> socket.socket:
        """A TCP connection made from inside this namespace, usable anywhere."""
        with self.entered():
            return socket.create_connection(address, timeout=timeout_s)


class Lab:
    """A network of namespaces; see the module's text. `directory` is a scratch folder (0711)."""

    def __init__(self, run: str | None = None) -> None:
        self.run_name = run or secrets.token_hex(3)
        self.prefix = f"{PREFIX}{self.run_name}-"
        self.hosts: dict[str, Host] = {}
        self.directory = Path()
        self._janitor: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Lab:
        if missing := missing_requirements():
            raise LabError("; ".join(missing))
        os.environ["PATH"] = _search_path()  # after a plain `su`, say, it has no /usr/sbin
        self.directory = Path(tempfile.mkdtemp(prefix=self.prefix))
        self.directory.chmod(0o711)  # a database under an account of its own passes through
        self._janitor = subprocess.Popen(
            [sys.executable, "-m", "simulations.kernel.lab", self.prefix, str(self.directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove every namespace of this run and all processes inside. May be called again."""
        if self._janitor is None:
            return
        assert self._janitor.stdin is not None
        self._janitor.stdin.close()
        self._janitor.wait(timeout=60)
        self._janitor = None
        self.hosts.clear()

    # --- what a network is made of ---

    def router(self, name: str) -> Host:
        """A namespace that forwards between its interfaces: the internet in the middle."""
        host = self._namespace(name)
        host.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        return host

    def public_host(self, name: str, router: Host, *addresses: str) -> Host:
        """A host with public addresses (`203.0.113.2/30`: the router takes the `.1`)."""
        host = self._namespace(name)
        self._link(host, "eth0", router, addresses)
        return host

    def nat(
        self,
        name: str,
        router: Host,
        *,
        wan: str,
        lan: str,
        kind: NatKind | None = "port_restricted",
    ) -> Host:
        """A NAT between the router and a LAN; `lan` is its own inside address with prefix.

        `router` may be a NAT itself (a carrier's): then `wan` is an address on its LAN. Without a
        `kind` it translates nothing; who is to find the LAN needs a route.
        """
        host = self._namespace(name)
        host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        if router._lan_network is None:
            self._link(host, "wan", router, (wan,))
        else:
            self._join_lan(host, "wan", router, wan)
        host.ip("link add lan type bridge", f"addr add {lan} dev lan", "link set lan up")
        host._lan_network = lan
        host.wan_address = str(ip_interface(wan).ip)
        if kind is not None:
            host.set_nat(kind)
        return host

    def way(self, name: str, nat: Host, address: str) -> Host:
        """A router on the LAN behind a NAT that does nothing but forward: for links that are
        impaired on their way to a further NAT. Who is to find what is behind it needs a route."""
        host = self.host(name, nat, address)
        host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        return host

    def host(self, name: str, nat: Host, address: str = "") -> Host:
        """A host on the LAN behind a NAT, with its default route through it. Without an address it
        has no IPv4."""
        assert nat._lan_network is not None, f"{nat.short_name} is no NAT"
        host = self._namespace(name)
        self._join_lan(host, "eth0", nat, address)
        return host

    def move(self, host: Host, nat: Host, address: str = "") -> None:
        """A host of a LAN, or a public one, is on the LAN behind a NAT from now on."""
        assert nat._lan_network is not None, f"{nat.short_name} is no NAT"
        host.ip("link del eth0")
        self._join_lan(host, "eth0", nat, address)

    def move_out(self, host: Host, router: Host, *addresses: str) -> None:
        """A host has public addresses from now on."""
        host.ip("link del eth0")
        self._link(host, "eth0", router, addresses)

    def route_ipv6(self, nat: Host, router: Host, *, wan: str, lan: str) -> None:
        """Give a NAT an IPv6 prefix to route, without translation; `ipv6` then gives addresses."""
        nat.run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
        outer, inner = ip_interface(wan), ip_interface(lan)
        gateway = next(outer.network.hosts())
        router.ip(f"addr add {gateway}/{outer.network.prefixlen} dev {nat.uplink} nodad")
        nat.ip(
            f"addr add {wan} dev wan nodad",
            f"addr add {lan} dev lan nodad",
            f"route add default via {gateway}",
        )
        router.ip(f"route add {inner.network} via {outer.ip}")

    def forward_ipv6(self, inner: Host, outer: Host) -> str:
        """Let a NAT, or a router on the way to one, forward IPv6 to the router that it hangs on,
        and return the hop by which that one finds it, as of an `ip route`."""
        inner.run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
        outer._hops += 1
        end = inner.uplink if outer._lan_network is None else "lan"
        own = f"fe80::{outer._hops + 1:x}"
        outer.ip(f"addr replace {LINK_ROUTER}/64 dev {end} nodad")
        inner.ip(
            f"addr add {own}/64 dev {inner.device} nodad",
            f"route add default via {LINK_ROUTER} dev {inner.device}",
        )
        return f"via {own} dev {end}"

    def lan_ipv6(self, nat: Host, address: str) -> None:
        """An IPv6 address with its prefix for a NAT on its LAN; `ipv6` then gives hosts theirs."""
        nat.ip(f"addr add {address} dev lan nodad")

    def ipv6(self, host: Host, address: str) -> None:
        """An IPv6 address for a host on a LAN that has the prefix, and its default route."""
        gateway = next(ip_interface(address).network.hosts())
        host.ip(f"addr add {address} dev eth0 nodad", f"route add default via {gateway}")

    def _namespace(self, name: str) -> Host:
        full_name = self.prefix + name
        made = subprocess.run(["ip", "netns", "add", full_name], capture_output=True, text=True)
        if made.returncode != 0:
            raise LabError(f"namespace {full_name}: {made.stderr.strip()}")
        host = Host(name=full_name, short_name=name)
        host.ip("link set lo up")
        # IPv6 addresses of links would be tentative, and neighbours unknown, for 2 s
        host.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
        self.hosts[name] = host
        return host

    def _join_lan(self, host: Host, device: str, nat: Host, address: str) -> None:
        assert nat._lan_network is not None
        nat._attachments += 1
        port = f"lan{nat._attachments}"
        nat.ip(
            f"link add {port} type veth peer name {device} netns {host.name}",
            f"link set {port} master lan",
            f"link set {port} up",
        )
        host.device, host.uplink = device, port
        gateway = ip_interface(nat._lan_network).ip
        host.ip(f"link set {device} up")
        if address:
            host.ip(f"addr add {address} dev {device}", f"route add default via {gateway}")

    def _link(self, host: Host, device: str, router: Host, addresses: Sequence[str]) -> None:
        router._attachments += 1
        port = f"port{router._attachments}"
        host.device, host.uplink = device, port
        router.ip(f"link add {port} type veth peer name {device} netns {host.name}")
        router.ip(f"link set {port} up")
        host.ip(f"link set {device} up")
        for text in addresses:
            interface = ip_interface(text)
            router_ip = next(interface.network.hosts())
            prefix = interface.network.prefixlen
            nodad = " nodad" if interface.version == 6 else ""
            router.ip(f"addr add {router_ip}/{prefix} dev {port}{nodad}")
            host.ip(f"addr add {text} dev {device}{nodad}", f"route add default via {router_ip}")


def _nat_rules(kind: NatKind) -> str:
    source_nat = _EASY if kind == "port_restricted" else _HARD
    return f"""
table ip nat_of_lab
delete table ip nat_of_lab
table ip nat_of_lab {{
  chain early {{
    type filter hook prerouting priority mangle;
    iifname "wan" ct state new,invalid meta l4proto udp drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    oifname "wan" {source_nat}
  }}
  chain forward {{
    type filter hook forward priority filter;
    iifname "wan" ct state new,invalid drop
  }}
}}
"""


def _search_path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


_libc = ctypes.CDLL(None, use_errno=True)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise LabError(f"setns: {os.strerror(code)}")


# --- the janitor ---------------------------------------------------------------------------------


def sweep(prefix: str, directory: Path | None = None) -> None:
    """End the processes in, and remove, every namespace whose name begins with `prefix`."""
    if not prefix.startswith(PREFIX) or len(prefix) < len(PREFIX) + 3:
        raise LabError(f"{prefix!r} does not name one run")
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    names = [line.split()[0] for line in listed.splitlines() if line.startswith(prefix)]
    for sent in (signal.SIGTERM, signal.SIGKILL):
        _signal_all(names, sent)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        shutil.rmtree(ETC / name, ignore_errors=True)
    if directory is not None and directory.name.startswith(prefix):
        shutil.rmtree(directory, ignore_errors=True)


def _signal_all(names: Sequence[str], sent: signal.Signals, wait_s: float = 3.0) -> None:
    deadline = time.monotonic() + wait_s
    signalled: set[int] = set()
    while time.monotonic() < deadline:
        pids: set[int] = set()
        for name in names:
            done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            pids |= {int(pid) for pid in done.stdout.split()}
        if not pids:
            return
        for pid in pids - signalled:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        signalled |= pids
        time.sleep(0.05)


def _janitor(prefix: str, directory: Path) -> None:
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sent, signal.SIG_IGN)
    sys.stdin.buffer.read()
    sweep(prefix, directory)


if __name__ == "__main__":
    _janitor(sys.argv[1], Path(sys.argv[2]))
