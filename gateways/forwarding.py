"""Forwarding on a gateway: nftables, forwarding switches, routes; set up and exactly restored.

A table of our own, named after the TUN device, translates what clients send (masquerade), lets
back only replies, keeps clients apart, keeps them off the gateway's own addresses, and drops
tunnel addresses that arrive from elsewhere.
Where the machine forwarded nothing before, it forwards nothing else now either. The switches of
the kernel that are changed are written down first, in a file below /run; so the start after a
crash finds what to put back, and a gateway that ends leaves the machine as it was.
"""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import msgspec

from channel.messages import Interface
from gateways.agent import FlushTranslations
from runtime.service import get_logger, make_private_directory
from tunnel.agent import InterfaceChanged
from tunnel.shell.commands import CommandFailed, run_command, try_command
from tunnel.shell.network import network_namespace
from tunnel.shell.nftables import remove_dead_tables, remove_table, replace_table
from tunnel.shell.tun import TunDevice

TABLE_PREFIX = "holloway_gateway_"
IPV4_FORWARD = "net/ipv4/ip_forward"
IPV6_FORWARD = "net/ipv6/conf/all/forwarding"
_PROC = Path("/proc/sys")
_ACCEPT_RA = re.compile(r"net/ipv6/conf/(?!\.{1,2}/)[^/\0]{1,15}/accept_ra")

log = get_logger("forwarding")


class _Saved(msgspec.Struct):
    """The restore file: which device wrote it, and the switches as they were."""

    device: str
    switches: dict[str, str]


class GatewayForwarding:
    """What a gateway changes on its system. `start`, then `perform` for each event, then `stop`.

    `directory` holds the restore file (0700). `masquerade` False leaves client addresses as they
    are, for networks that route the tunnel ranges back to this gateway.
    """

    def __init__(self, *, directory: Path, masquerade: bool = True) -> None:
        self._directory = directory
        self._masquerade = masquerade
        self._tun: TunDevice | None = None
        self._saved: _Saved | None = None
        self._ranges: tuple[IPv4Network, IPv6Network] | None = None
        self.warnings: list[str] = []

    async def start(self, tun: TunDevice) -> None:
        """Clean up after a crash, then begin to forward. Raises CommandFailed, OSError."""
        self._tun = tun
        make_private_directory(self._directory)
        await remove_dead_tables(TABLE_PREFIX)
        self._restore_after_crash()
        self._saved = _Saved(device=tun.name, switches=_switches_to_change())
        self._write_down()
        forwarded_before = self._saved.switches.get(IPV4_FORWARD, "1") != "0"
        await replace_table(self._table_name, self._rules(None, forwarded_before))
        for key in self._saved.switches:
            _write(key, "2" if key.endswith("accept_ra") else "1")
        _write(f"net/ipv4/conf/{tun.name}/rp_filter", "1")
        self.warnings = await _foreign_obstacles()
        for warning in self.warnings:
            log.warning("forwarding_obstacle", detail=warning)

    async def perform(self, event: object) -> None:
        """Follow an event of the agent. Raises CommandFailed."""
        if isinstance(event, InterfaceChanged):
            await self._follow_interface(event.interface)
        elif isinstance(event, FlushTranslations):
            await self._flush(event)

    async def stop(self) -> None:
        """Put everything back."""
        if self._tun is None:
            return
        await remove_table(self._table_name)
        if self._saved is not None:
            _put_back(self._saved.switches)
            self._saved = None
            self._restore_file.unlink(missing_ok=True)

    # --- helpers ---------------------------------------------------------------------------------

    @property
    def _table_name(self) -> str:
        assert self._tun is not None
        return table_name(self._tun.name)

    @property
    def _restore_file(self) -> Path:
        """One for each network namespace, since the switches belong to it."""
        return self._directory / f"forwarding-{network_namespace()}.json"

    async def _follow_interface(self, interface: Interface) -> None:
        assert self._tun is not None
        assert self._saved is not None
        await self._tun.configure(interface.ipv4, interface.ipv6, interface.mtu)
        device = self._tun.name
        lines = [f"route replace {interface.range_ipv4} dev {device}"]
        if self._tun.has_ipv6:
            lines.append(f"-6 route replace {interface.range_ipv6} dev {device}")
        for line in lines:
            await run_command(["ip", *line.split()])
        self._ranges = (interface.range_ipv4, interface.range_ipv6)
        forwarded_before = self._saved.switches.get(IPV4_FORWARD, "1") != "0"
        await replace_table(self._table_name, self._rules(self._ranges, forwarded_before))
        log.info("interface", ipv4=str(interface.ipv4), ipv6=str(interface.ipv6))

    async def _flush(self, event: FlushTranslations) -> None:
        family = "ipv4" if event.client.version == 4 else "ipv6"
        command = ["conntrack", "-D", "-f", family, "-s", str(event.client)]
        if event.network is not None and event.network.prefixlen > 0:
            command += ["-d", str(event.network)]
        # It fails when there was nothing to delete, so failing says nothing.
        await try_command(command)

    def _rules(self, ranges: tuple[IPv4Network, IPv6Network] | None, forwarded_before: bool) -> str:
        assert self._tun is not None
        device = self._tun.name
        spoofed = masquerade = ""
        if ranges is not None:
            ipv4, ipv6 = ranges
            spoofed = (
                f'iifname != {{ "{device}", "lo" }} ip saddr {ipv4} drop\n'
                f'    iifname != {{ "{device}", "lo" }} ip6 saddr {ipv6} drop'
            )
            if self._masquerade:
                masquerade = (
                    f'oifname != "{device}" ip saddr {ipv4} masquerade\n'
                    f'    oifname != "{device}" ip6 saddr {ipv6} masquerade'
                )
        others = "" if forwarded_before else "drop"
        return f"""
  chain early {{
    type filter hook prerouting priority raw; policy accept;
    iifname "{device}" fib daddr type {{ local, broadcast }} drop
    {spoofed}
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname "{device}" oifname "{device}" drop
    iifname "{device}" tcp flags syn tcp option maxseg size set rt mtu
    iifname "{device}" accept
    oifname "{device}" tcp flags syn tcp option maxseg size set rt mtu
    oifname "{device}" ct state established,related accept
    oifname "{device}" drop
    {others}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    {masquerade}
  }}
"""

    def _write_down(self) -> None:
        assert self._saved is not None
        temporary = self._restore_file.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(self._saved))
        temporary.replace(self._restore_file)

    def _restore_after_crash(self) -> None:
        """A file that is still there was written by a gateway that never ended in order."""
        try:
            left = msgspec.json.decode(self._restore_file.read_bytes(), type=_Saved)
            if not all(map(_is_ours, left.switches, left.switches.values())):
                raise msgspec.ValidationError("switches that no gateway changes")
        except FileNotFoundError:
            return
        except msgspec.MsgspecError:
            log.warning("restore_file_unreadable", path=str(self._restore_file))
            return
        if (_PROC / f"net/ipv4/conf/{left.device}").exists() and (
            self._tun is None or left.device != self._tun.name
        ):
            return  # another gateway runs in this namespace and will put its switches back
        _put_back(left.switches)
        log.info("restored_after_crash", device=left.device)


def table_name(device: str) -> str:
    """The nftables table (family inet) of the gateway with this TUN device."""
    return TABLE_PREFIX + device


def _is_ours(key: str, value: str) -> bool:
    """Whether a switch of a restore file is one that a gateway changes: nothing else is written
    on the word of a file."""
    named = key in (IPV4_FORWARD, IPV6_FORWARD) or _ACCEPT_RA.fullmatch(key) is not None
    return named and value in ("0", "1")


def _switches_to_change() -> dict[str, str]:
    """The switches that are not as forwarding needs them, with their present values."""
    switches = {}
    if _read(IPV4_FORWARD) == "0":
        switches[IPV4_FORWARD] = "0"
    if _has("net/ipv6") and _read(IPV6_FORWARD) == "0":
        # A machine that forwards ignores router advertisements, and would lose its default route.
        for directory in sorted((_PROC / "net/ipv6/conf").iterdir()):
            key = f"net/ipv6/conf/{directory.name}/accept_ra"
            if directory.name not in ("all", "default", "lo") and _read(key) == "1":
                switches[key] = "1"
        switches[IPV6_FORWARD] = "0"
    return switches


def _put_back(switches: dict[str, str]) -> None:
    for key in sorted(switches, key=lambda key: key.endswith("accept_ra")):
        try:
            _write(key, switches[key])
        except OSError as error:  # an interface that is gone
            log.warning("not_restored", switch=key, error=str(error))


async def _foreign_obstacles() -> list[str]:
    """Rules of others that would drop what is forwarded, in words."""
    try:
        shown = await run_command(["nft", "-j", "list", "chains"])
    except CommandFailed:
        return []
    obstacles = []
    for entry in msgspec.json.decode(shown).get("nftables", ()):
        chain = entry.get("chain", {})
        if chain.get("hook") == "forward" and chain.get("policy") == "drop":
            obstacles.append(
                f"chain {chain.get('name')} of table {chain.get('family')} {chain.get('table')} "
                "drops forwarded packets unless a rule in it accepts them (Docker does this)"
            )
    return obstacles


def _has(path: str) -> bool:
    return (_PROC / path).exists()


def _read(key: str) -> str:
    try:
        return (_PROC / key).read_text().strip()
    except OSError:
        return ""


def _write(key: str, value: str) -> None:
    (_PROC / key).write_text(value + "\n")
