"""Carries out the timeline of a scenario on the kernel: signals, nftables, addresses, API calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from runtime.randomness import SeededRandomness, shuffle
from simulations.faults import RESTART_NS, Struck, sentence_of
from simulations.installation import CHANNEL_PORT, InstallationError
from simulations.kernel.account import NO_ANSWER
from simulations.kernel.lab import Host, LabError
from simulations.kernel.links import Impairment, Quality
from simulations.kernel.parts import Parts
from simulations.kernel.schedule import Schedule
from simulations.kernel.topology import Topology, quality_of
from simulations.scenario import schema
from simulations.scenario.units import PPM, duration_ns, share_ppm

LOOK_NS: Final = 50 * 10**6
RECONNECT_NS: Final = 17 * 10**9
"""Longer than a channel's heartbeat, so that who is silent notices, too."""
Undo = Callable[[], None]


class KernelFaults:
    """The faults of one run. `impairments` by the name of their router; `changed` is called when an
    admin has changed who may what, and `log` is told of each fault."""

    def __init__(
        self,
        parts: Parts,
        topology: Topology,
        schedule: Schedule,
        impairments: dict[str, Impairment],
        changed: Callable[[], None],
        log: Callable[[int, str], None],
        seed: int,
    ) -> None:
        self._parts = parts
        self._log = log
        self._topology = topology
        self._schedule = schedule
        self._impairments = impairments
        self._changed = changed
        self._qualities: dict[str, list[Quality]] = {}
        self._outages: list[int] = []
        self._may_be_slow = False
        self._randomness = SeededRandomness(seed, "faults")
        self._parted = 0
        self.struck: list[Struck] = []

    @property
    def is_parted(self) -> bool:
        """Whether anybody is parted from anybody now."""
        return self._parted > 0

    def schedule(self, faults: Sequence[schema.Fault]) -> None:
        """Have each happen at its instant, counted from now."""
        self._may_be_slow = any(fault.slow for fault in faults)
        for fault in faults:
            self._schedule.after(duration_ns(fault.at), self._strike, fault)

    def _strike(self, fault: schema.Fault) -> None:
        now = self._schedule.now
        duration = duration_ns(fault.duration) if fault.duration else None
        if fault.kind == "upgrade":
            duration = max(0, len(fault.targets) - 1) * duration_ns(fault.every)
        struck = Struck(fault, now, None if duration is None else now + duration)
        self.struck.append(struck)
        act: Callable[[schema.Fault], Undo | None] = getattr(self, f"_{fault.kind}")
        try:
            undo = act(fault)
            struck.text = sentence_of(fault)
        except (KeyError, LabError, InstallationError, *NO_ANSWER) as error:
            undo, struck.text = None, f"nothing: {error}"
        self._log(now, struck.text)
        if undo is not None and duration is not None:
            self._schedule.after(now + duration - self._schedule.now, undo)

    # --- hosts -----------------------------------------------------------------------------------

    def _crash(self, fault: schema.Fault) -> Undo:
        for name in fault.targets:
            self._parts.crash(name)
        return lambda: self._start_all(fault.targets)

    def _restart(self, fault: schema.Fault) -> None:
        away = duration_ns(fault.duration) if fault.duration else RESTART_NS
        for name in fault.targets:
            self._restart_one(name, away)

    def _restart_one(self, name: str, away_ns: int) -> None:
        self._parts.stop(name)
        self._begin_when_over(name, away_ns)

    def _begin_when_over(self, name: str, away_ns: int) -> None:
        if self._parts.parts[name].is_up:
            self._schedule.after(LOOK_NS, self._begin_when_over, name, away_ns)
        else:
            self._schedule.after(away_ns, self._parts.begin, name)

    def _start(self, fault: schema.Fault) -> None:
        self._start_all(fault.targets)

    def _start_all(self, names: Sequence[str]) -> None:
        for name in names:
            self._parts.begin(name)

    def _pause(self, fault: schema.Fault) -> Undo:
        for name in fault.targets:
            self._parts.pause(name, paused=True)

        def resume() -> None:
            for name in fault.targets:
                self._parts.pause(name, paused=False)

        return resume

    def _upgrade(self, fault: schema.Fault) -> None:
        every = duration_ns(fault.every)
        for number, name in enumerate(fault.targets):
            self._schedule.after(number * every, self._restart_one, name, RESTART_NS)

    def _drain(self, fault: schema.Fault) -> Undo:
        for name in fault.targets:
            self._parts.stop(name)

        def come_back() -> None:
            for name in fault.targets:
                self._begin_when_over(name, 0)

        return come_back

    def _reconnect(self, fault: schema.Fault) -> None:
        """The portal's doors refuse until the channel ends by itself: nothing ends it at once."""
        refused = "\n    ".join(
            f"{'ip6' if ':' in door else 'ip'} daddr {door} udp dport {CHANNEL_PORT}"
            " reject with icmpx type port-unreachable"
            for door in self._parts.addresses("portal")
        )
        hosts = [self._topology.place(name).host for name in fault.targets]
        for host in hosts:
            host.nft(f"""
table inet reconnecting
delete table inet reconnecting
table inet reconnecting {{
  chain outward {{
    type filter hook output priority filter;
    {refused}
  }}
}}
""")
        self._schedule.after(RECONNECT_NS, self._let_again, hosts)

    @staticmethod
    def _let_again(hosts: Sequence[Host]) -> None:
        for host in hosts:
            host.nft("table inet reconnecting\ndelete table inet reconnecting\n")

    def _roam(self, fault: schema.Fault) -> Undo:
        before = [(name, self._topology.network_of(name)) for name in fault.targets]
        for name in fault.targets:
            self._topology.move(name, fault.to)

        def go_back() -> None:
            for name, network in before:
                self._topology.move(name, network)

        return go_back

    # --- networks --------------------------------------------------------------------------------

    def _partition(self, fault: schema.Fault) -> Undo:
        ours = self._hosts(fault.targets)
        if fault.others:
            theirs = self._hosts(fault.others)
        else:
            theirs = [name for name in self._parts.parts if name not in ours]
        parted = self._topology.part(ours, theirs)
        self._parted += 1

        def heal() -> None:
            self._topology.join(parted)
            self._parted -= 1

        return heal

    def _hosts(self, places: Sequence[str]) -> list[str]:
        found = [name for place in places for name in self._topology.hosts_within(place)]
        return list(dict.fromkeys(found))

    def _link(self, fault: schema.Fault) -> Undo:
        if fault.quality is None:
            raise ValueError("a fault of a link has a quality")
        quality = quality_of(fault.quality)
        for name in fault.targets:
            self._qualities.setdefault(name, []).append(quality)
            self._set_quality(name)

        def repair() -> None:
            for name in fault.targets:
                self._qualities[name].remove(quality)
                self._set_quality(name)

        return repair

    def _set_quality(self, network: str) -> None:
        attached, router, usual = self._topology.link_of(network)
        under_way = self._qualities[network]
        self._impairments[attached.name].change(router, under_way[-1] if under_way else usual)

    def _block_udp(self, fault: schema.Fault) -> Undo:
        for name in fault.targets:
            self._topology.block_udp(name, blocked=True)

        def unblock() -> None:
            for name in fault.targets:
                self._topology.block_udp(name, blocked=False)

        return unblock

    def _rebind(self, fault: schema.Fault) -> None:
        for name in fault.targets:
            self._topology.rebind(name, renumber=fault.renumber)

    # --- the portal ------------------------------------------------------------------------------

    def _database(self, fault: schema.Fault) -> Undo:
        slow_ns = duration_ns(fault.slow) if fault.slow else 0
        self._outages.append(slow_ns)
        self._set_database()

        def recover() -> None:
            self._outages.remove(slow_ns)
            self._set_database()

        return recover

    def _set_database(self) -> None:
        """Away while any fault has it so, else as slow as the slowest."""
        database = self._parts.database
        if 0 in self._outages:
            database.pause()
        else:
            database.resume()
        if self._may_be_slow:
            database.answer_after(max(self._outages, default=0))

    def _shrink_directory(self, fault: schema.Fault) -> None:
        """The same users as in virtual time, by the same stream of the seed."""
        account = self._parts.account
        users = account.users()
        shuffle(users, self._randomness)
        account.remove_users(sorted(users[: len(users) * share_ppm(fault.share) // PPM]))
        self._changed()

    def _change(self, fault: schema.Fault) -> None:
        if not fault.change:
            raise ValueError("a change names what is changed")
        self._parts.account.change(fault.change, fault.subject)
        self._changed()
