"""Routes of a client: the networks of its resources, in a routing table of their own.

A rule sends every packet without the agent's own mark through that table first, so the routes win
over the main table and yet cannot loop: what the agent itself sends carries the mark. Rules and
table are removed at the end, and what a killed predecessor left is removed at the start (its
routes went with its TUN device).

What comes for the device's own tunnel addresses has to come out of the TUN device. The kernel would
take it from any network, and a neighbour could feel for the flows inside of the tunnel by it and
put packets into them (CVE-2019-14899); a rule in nftables drops it.
"""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from clients.agent import RoutesChanged
from runtime.service import get_logger
from tunnel.agent import InterfaceChanged
from tunnel.resources import Network
from tunnel.shell.commands import CommandFailed, run_command, try_command
from tunnel.shell.nftables import remove_dead_tables, remove_table, replace_table
from tunnel.shell.tun import TunDevice

MAX_STALE_RULES = 64
TABLE_PREFIX = "holloway_client_"

log = get_logger("routing")


class ClientRouting:
    """What a client changes on its system. `start`, then `perform` for each event, then `stop`.

    `mark` is the SO_MARK of the agent's sockets; `table` and `priority` number the routing table
    and the rule, and belong to this agent alone.
    """

    def __init__(self, *, mark: int, table: int, priority: int) -> None:
        self._mark = mark
        self._table = table
        self._priority = priority
        self._tun: TunDevice | None = None
        self._sources: tuple[IPv4Address, IPv6Address] | None = None
        self._networks: frozenset[Network] = frozenset()
        self._families = ("-4", "-6") if Path("/proc/sys/net/ipv6").is_dir() else ("-4",)

    async def start(self, tun: TunDevice) -> None:
        """Put the rules in place. Raises CommandFailed."""
        self._tun = tun
        await self._remove_rules()
        for family in self._families:
            rule = f"priority {self._priority} not fwmark {self._mark:#x} lookup {self._table}"
            await run_command(["ip", family, "rule", "add", *rule.split()])
        try:
            await remove_dead_tables(TABLE_PREFIX)
        except CommandFailed as error:  # no nftables here
            log.warning("neighbours_not_kept_out", error=str(error))

    async def perform(self, event: object) -> None:
        """Follow an event of the agent. Raises CommandFailed."""
        if isinstance(event, InterfaceChanged):
            assert self._tun is not None
            interface = event.interface
            await self._tun.configure(interface.ipv4, interface.ipv6, interface.mtu)
            self._sources = (interface.ipv4, interface.ipv6)
            await self._keep_neighbours_out(interface.ipv4, interface.ipv6)
            await self._replace(frozenset(), self._networks)
            log.info("interface", ipv4=str(interface.ipv4), ipv6=str(interface.ipv6))
        elif isinstance(event, RoutesChanged):
            before, self._networks = self._networks, event.networks
            await self._replace(before - event.networks, event.networks - before)
            log.info("routes", networks=sorted(map(str, event.networks)))

    async def stop(self) -> None:
        """Take everything back."""
        await self._remove_rules()
        if self._tun is not None:
            with contextlib.suppress(CommandFailed):  # without nftables there was none
                await remove_table(TABLE_PREFIX + self._tun.name)

    async def _keep_neighbours_out(self, ipv4: IPv4Address, ipv6: IPv6Address) -> None:
        assert self._tun is not None
        elsewhere = f'iifname != {{ "{self._tun.name}", "lo" }}'
        body = (
            "  chain early {\n"
            "    type filter hook prerouting priority raw; policy accept;\n"
            f"    {elsewhere} ip daddr {ipv4} drop\n"
            f"    {elsewhere} ip6 daddr {ipv6} drop\n"
            "  }"
        )
        try:
            await replace_table(TABLE_PREFIX + self._tun.name, body)
        except CommandFailed as error:  # access works without it, so it is not refused
            log.warning("neighbours_not_kept_out", error=str(error))

    async def _replace(self, removed: frozenset[Network], added: frozenset[Network]) -> None:
        if self._sources is None or self._tun is None:
            return
        ipv4, ipv6 = self._sources
        device, table = self._tun.name, self._table
        for family, version, source in (("-4", 4, ipv4), ("-6", 6, ipv6)):
            if family not in self._families or (version == 6 and not self._tun.has_ipv6):
                continue
            lines = [
                f"route del {network} dev {device} table {table}"
                for network in removed
                if network.version == version
            ]
            lines += [
                f"route replace {network} dev {device} src {source} table {table}"
                for network in added
                if network.version == version
            ]
            if lines:
                batch = "\n".join(lines) + "\n"
                await run_command(["ip", family, "-force", "-batch", "-"], given=batch)

    async def _remove_rules(self) -> None:
        for family in self._families:
            rule = ["ip", family, "rule", "del", "lookup", str(self._table)]
            for _ in range(MAX_STALE_RULES):
                if not await try_command(rule):
                    break
            await try_command(["ip", family, "route", "flush", "table", str(self._table)])
