"""Carries out the faults of a scenario: the whole of its timeline, each kind as the schema says.

Faults of one kind may overlap: what a network's uplink or firewall is like, whether the database
answers and how a clock runs goes by those that are under way, and is as it was when all are over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import attrs

from runtime.clock import NS_PER_MS
from runtime.randomness import shuffle
from simulations.build import Installation, Slot
from simulations.checks.interface import hears
from simulations.hosts.agent import AgentHost
from simulations.hosts.portal import PortalNode
from simulations.hosts.relay import RelayHost
from simulations.net.firewall import FirewallState
from simulations.net.links import LinkQuality
from simulations.net.routing import Network
from simulations.net.world import Host
from simulations.scenario import schema
from simulations.scenario.units import PPM, duration_ns, share_ppm, signed_duration_ns
from simulations.topology import firewall_of, quality_of

T = TypeVar("T")
RESTART_NS: Final = 500 * NS_PER_MS
"""How long a process is away that is restarted."""
Undo = Callable[[], None]


@attrs.define(eq=False)
class Struck:
    """A fault that happened. Instants are the world's; `over_at` is None for one without an end."""

    fault: schema.Fault
    at: int
    over_at: int | None
    text: str = ""


class Faults:
    """The faults of one run. `changed` is called when an admin has changed who may what."""

    def __init__(
        self, installation: Installation, *, changed: Callable[[], None], log: Callable[..., None]
    ) -> None:
        self._installation = installation
        self._world = installation.world
        self._changed = changed
        self._log = log
        self._told = hears(installation.observers, "fault")
        self._randomness = installation.world.randomness("faults")
        self._qualities: dict[Network, list[LinkQuality]] = {}
        self._usual: dict[Network, LinkQuality] = {}
        self._blocked: dict[Network, int] = {}
        self._firewalls: dict[Network, FirewallState | None] = {}
        self._outages: list[int] = []
        self.struck: list[Struck] = []

    def schedule(self, faults: Sequence[schema.Fault]) -> None:
        """Have each happen at its instant, counted from now."""
        for fault in faults:
            self._world.after(duration_ns(fault.at), self._strike, fault)

    def _strike(self, fault: schema.Fault) -> None:
        now = self._world.now
        duration = duration_ns(fault.duration) if fault.duration else None
        if fault.kind == "upgrade":
            duration = max(0, len(fault.targets) - 1) * duration_ns(fault.every)
        over_at = None if duration is None else now + duration
        struck = Struck(fault, now, over_at)
        self.struck.append(struck)
        act: Callable[[schema.Fault], Undo | None] = getattr(self, f"_{fault.kind}")
        try:
            undo = act(fault)
            struck.text = sentence_of(fault)
        except ValueError as error:
            undo, struck.text = None, f"nothing: {error}"
        self._world.note("fault", fault.kind, fault.targets, struck.text)
        self._log(now, fault, struck.text)
        for told in self._told:
            told(now, fault.kind, fault.targets, struck.text)
        if undo is not None and duration is not None:
            self._world.after(duration, self._end, fault, undo)

    def _end(self, fault: schema.Fault, undo: Undo) -> None:
        undo()
        self._world.note("fault over", fault.kind, fault.targets)
        self._log(self._world.now, fault, f"{fault.kind} is over")

    # --- hosts -----------------------------------------------------------------------------------

    def _crash(self, fault: schema.Fault) -> Undo:
        slots = self._slots(fault)
        for slot in slots:
            slot.crash()
        return lambda: _start_all(slots)

    def _restart(self, fault: schema.Fault) -> None:
        away = duration_ns(fault.duration) if fault.duration else RESTART_NS
        for slot in self._slots(fault):
            self._restart_one(slot, away)

    def _restart_one(self, slot: Slot, away_ns: int) -> None:
        life = slot.life
        if isinstance(life, PortalNode) and not life.is_over:
            life.drain(lambda: self._world.after(away_ns, slot.start))
            return
        slot.stop()
        self._world.after(away_ns, slot.start)

    def _start(self, fault: schema.Fault) -> None:
        _start_all(self._slots(fault))

    def _pause(self, fault: schema.Fault) -> Undo:
        hosts = [slot.host for slot in self._slots(fault)]
        for host in hosts:
            host.pause()

        def resume() -> None:
            for host in hosts:
                host.resume()

        return resume

    def _upgrade(self, fault: schema.Fault) -> None:
        every = duration_ns(fault.every)
        for number, slot in enumerate(self._slots(fault)):
            self._world.after(number * every, self._restart_one, slot, RESTART_NS)

    def _drain(self, fault: schema.Fault) -> Undo:
        slots = self._slots(fault)
        for slot in slots:
            if isinstance(slot.life, PortalNode | RelayHost) and not slot.life.is_over:
                slot.life.drain(_nothing)

        def come_back() -> None:
            for slot in slots:
                slot.stop()
                slot.start()

        return come_back

    def _reconnect(self, fault: schema.Fault) -> None:
        for slot in self._slots(fault):
            life = slot.life
            if isinstance(life, AgentHost | RelayHost) and not life.is_over and slot.host.runs:
                life.channel.end_connection(life.now)

    def _roam(self, fault: schema.Fault) -> Undo:
        moved = [(slot.host, slot.host.network) for slot in self._slots(fault)]
        for host, _ in moved:
            self._move(host, self._network(fault.to))
        self._addresses_changed()

        def go_back() -> None:
            for host, network in moved:
                self._move(host, network)
            self._addresses_changed()

        return go_back

    def _addresses_changed(self) -> None:
        """Who may what depends on it where a policy asks where somebody is."""
        policies = self._installation.scenario.account.policies
        if any(name.startswith("remote_ip") for each in policies for name in each.conditions):
            self._changed()

    @staticmethod
    def _move(host: Host, network: Network) -> None:
        if host.network is not network:
            host.move(network)

    def _clock_skew(self, fault: schema.Fault) -> Undo:
        hosts = [slot.host for slot in self._slots(fault)]
        offset = signed_duration_ns(fault.offset)
        for host in hosts:
            host.clock.jump(offset)
            host.drift(host.clock.drift_ppm + fault.drift_ppm)

        def set_right() -> None:
            for host in hosts:
                host.clock.jump(-offset)
                host.drift(host.clock.drift_ppm - fault.drift_ppm)

        return set_right

    # --- networks --------------------------------------------------------------------------------

    def _partition(self, fault: schema.Fault) -> Undo:
        targets = [self._place(name) for name in fault.targets]
        others = [self._place(name) for name in fault.others]
        if not others:
            others = [slot.host for slot in self._all() if not _is_in(slot.host, targets)]
        return self._world.partition(targets, others).heal

    def _link(self, fault: schema.Fault) -> Undo:
        if fault.quality is None:
            raise ValueError("a fault of a link has a quality")
        quality = quality_of(fault.quality)
        networks = [self._network(name) for name in fault.targets]
        for network in networks:
            self._usual.setdefault(network, network.uplink.there.quality)
            self._qualities.setdefault(network, []).append(quality)
            self._set_quality(network)

        def repair() -> None:
            for network in networks:
                self._qualities[network].remove(quality)
                self._set_quality(network)

        return repair

    def _set_quality(self, network: Network) -> None:
        under_way = self._qualities[network]
        quality = under_way[-1] if under_way else self._usual[network]
        network.uplink.there.quality = network.uplink.back.quality = quality

    def _block_udp(self, fault: schema.Fault) -> Undo:
        written = {each.name: each for each in self._installation.scenario.networks}
        for name in fault.targets:
            network = self._network(name)
            if name not in written:
                raise ValueError(f"{name!r} has no firewall")
            self._blocked[network] = self._blocked.get(network, 0) + 1
            if self._blocked[network] == 1:
                self._firewalls[network] = network.firewall
                rules = firewall_of(
                    written[name].firewall, has_ipv6=bool(written[name].prefix6), block_udp=True
                )
                network.firewall = None if rules is None else FirewallState(rules)

        def unblock() -> None:
            for network in map(self._network, fault.targets):
                self._blocked[network] -= 1
                if not self._blocked[network]:
                    network.firewall = self._firewalls.pop(network)

        return unblock

    def _rebind(self, fault: schema.Fault) -> None:
        for name in fault.targets:
            network = self._network(name)
            if fault.renumber:
                network.renumber()
                self._addresses_changed()
            else:
                network.rebind()

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
        database = self._installation.database
        if not self._outages:
            database.recover()
        else:
            database.fail(0 if 0 in self._outages else max(self._outages))

    def _change(self, fault: schema.Fault) -> None:
        if not fault.change:
            raise ValueError("a change names what is changed")
        self._installation.account.change(fault.change, fault.subject)
        self._changed()

    def _shrink_directory(self, fault: schema.Fault) -> None:
        users = list(self._installation.account.users())
        shuffle(users, self._randomness)
        gone = users[: len(users) * share_ppm(fault.share) // PPM]
        self._installation.account.remove_users(sorted(gone))
        self._changed()

    # --- names -----------------------------------------------------------------------------------

    def _all(self) -> list[Slot]:
        return list(self._installation.slots.values())

    def _slots(self, fault: schema.Fault) -> list[Slot]:
        unknown = [name for name in fault.targets if name not in self._installation.slots]
        if unknown:
            raise ValueError(f"there is no host {unknown[0]!r}")
        return [self._installation.slots[name] for name in fault.targets]

    def _network(self, name: str) -> Network:
        network = self._installation.networks.get(name)
        if network is None:
            raise ValueError(f"there is no network {name!r}")
        return network

    def _place(self, name: str) -> Host | Network:
        slot = self._installation.slots.get(name)
        return slot.host if slot is not None else self._network(name)


def sentence_of(fault: schema.Fault) -> str:
    """A fault in words."""
    parts = [fault.kind, *fault.targets]
    if fault.change:
        parts = [fault.change, *fault.subject]
    if fault.others:
        parts += ["from", *fault.others]
    if fault.to:
        parts += ["to", fault.to]
    if fault.duration:
        parts += ["for", fault.duration]
    return " ".join(parts)


def _start_all(slots: Sequence[Slot]) -> None:
    for slot in slots:
        slot.start()


def _is_in(host: Host, places: Sequence[Host | Network]) -> bool:
    return host in places or any(
        isinstance(place, Network) and host.network.is_under(place) for place in places
    )


def _nothing() -> None:
    return None
