"""A Ray of a test run alone: a head and three raylets on this machine."""

from __future__ import annotations

from pathlib import Path

from runtime.hosting.ray_machine import MachineSettings, RayMachine
from tests.ports import free_port


class Ray:
    """A head and three raylets. The first raylet is the one through which we look."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.started: list[RayMachine] = []
        self.raylets: list[RayMachine] = []

    def start(self) -> None:
        settings = MachineSettings(directory=self._directory / "h")
        self.head = self._keep(RayMachine.head(settings, port=free_port()))
        self.address = self.head.ready()
        self.raylets = [self._join() for _ in range(3)]
        for raylet in self.raylets:
            raylet.ready()

    def _keep(self, machine: RayMachine) -> RayMachine:
        self.started.append(machine)
        return machine

    def _join(self) -> RayMachine:
        directory = self._directory / f"r{len(self.started)}"
        settings = MachineSettings(directory=directory, access=self.head.access, slots=8)
        return self._keep(RayMachine.join(settings, self.address))

    def replace(self, raylet: RayMachine) -> None:
        """Start another in place of one that was killed."""
        raylet.end()
        self.raylets.remove(raylet)
        self.raylets.append(self._join())
        self.raylets[-1].ready()

    def head_returns(self) -> None:
        port = int(self.address.rpartition(":")[2])
        self.head = self._keep(RayMachine.head(self.head.settings, port=port))
        self.head.ready()

    def end(self) -> None:
        for machine in reversed(self.started):
            machine.end()
