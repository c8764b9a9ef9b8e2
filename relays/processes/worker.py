"""One of several processes of a relay: `python -m relays.processes.worker DESCRIPTOR`.

It gets its settings, secrets and sockets from its parent, over the pair of sockets of which it
inherits one end, and ends when the other end closes: none is left behind, however the parent ended.
Signals are the parent's affair.
"""

from __future__ import annotations

import signal
import socket
import sys
from typing import Final

import attrs
import structlog
import trio

from relays.authentication import Credentials, StampedCredentials, StaticCredentials
from relays.processes.link import Link
from relays.processes.messages import (
    DrainNow,
    RelayKnown,
    Report,
    Revoke,
    Setup,
    ShownCertificate,
    ToWorker,
    decode_to_worker,
    encode,
)
from relays.serving import Serving
from relays.settings import check
from relays.transports.siblings import Siblings
from relays.transports.tls import Certificate, CertificateSource
from runtime.clock import SystemClock
from runtime.memory import keep_memory_private
from runtime.net.address import Address
from runtime.secret import Secret
from runtime.service import configure_logging

REPORT_S: Final = 0.5


async def work(descriptor: int) -> None:
    """Serve until the parent is gone."""
    link = Link(socket.socket(fileno=descriptor))
    lines = link.lines()
    setup = decode_to_worker(await anext(lines))
    if not isinstance(setup, Setup):
        raise ValueError("the first message is no Setup")
    configure_logging(setup.settings.log_format, setup.settings.log_level)
    structlog.contextvars.bind_contextvars(process=setup.index)
    worker = _Worker(setup, link)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        nursery.start_soon(worker.report)
        async for line in lines:
            worker.hear(decode_to_worker(line))
        nursery.cancel_scope.cancel()
    worker.serving.close()


class _Worker:
    def __init__(self, setup: Setup, link: Link) -> None:
        self._link = link
        self._credentials = _credentials(setup)
        inherited = {
            Address(host, port): socket.socket(fileno=descriptor)
            for host, port, descriptor in setup.inherited.listeners
        }
        self._clock = SystemClock()
        self._certificates = None
        if setup.certificate is not None:
            self._certificates = CertificateSource.given(_certificate(setup.certificate))
        self.serving = Serving(
            setup.settings,
            check(setup.settings),
            self._credentials,
            self._clock,
            certificates=self._certificates,
            processes=len(setup.slices),
            inherited=inherited,
            flows_descriptor=setup.inherited.flows,
        )
        posts = [None if one < 0 else socket.socket(fileno=one) for one in setup.inherited.posts]
        self._siblings = Siblings(
            inbox=socket.socket(fileno=setup.inherited.inbox),
            posts=posts,
            slices=setup.slices,
            clock=self._clock,
        )
        server = self.serving.server
        server.use_siblings(self.serving.sockets.attach(self._siblings))
        self.serving.listen()
        if setup.draining:
            server.drain()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.serving.run)
            nursery.start_soon(self._siblings.run, self.serving.server, self.serving.sockets)

    async def report(self) -> None:
        """Twice a second tell the parent how it stands, and the core the wall clock."""
        server = self.serving.server
        while True:
            server.synchronise(self._clock.monotonic_ns(), self._unix_s())
            report = Report(
                allocations=server.allocations,
                statistics=self.serving.statistics(),
                transports={
                    name: attrs.asdict(one) for name, one in self.serving.transports().items()
                },
            )
            try:
                await self._link.send(encode(report))
            except trio.BrokenResourceError:
                return  # the parent is gone, which is heard in another task
            await trio.sleep(REPORT_S)

    def hear(self, message: ToWorker) -> None:
        server, credentials = self.serving.server, self._credentials
        if isinstance(message, DrainNow):
            server.drain()
        elif isinstance(message, RelayKnown) and isinstance(credentials, StampedCredentials):
            credentials.relay_id = message.relay_id
        elif isinstance(message, Revoke):
            if isinstance(credentials, StampedCredentials):
                credentials.revoke(
                    message.user, until_unix_s=message.until_unix_s, unix_s=self._unix_s()
                )
            server.revoke_user(message.user)
        elif isinstance(message, ShownCertificate) and self._certificates is not None:
            self._certificates.current = _certificate(message)

    def _unix_s(self) -> int:
        return int(self._clock.utc_now().timestamp())


def _credentials(setup: Setup) -> Credentials:
    if setup.users is not None:
        return StaticCredentials(setup.users)
    credentials = StampedCredentials(setup.stamp_secret, revoked_until=setup.revoked_until)
    credentials.relay_id = setup.relay_id
    return credentials


def _certificate(told: ShownCertificate) -> Certificate:
    return Certificate.of(told.chain, Secret(told.key))


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    keep_memory_private()
    trio.run(work, int(sys.argv[1]))


if __name__ == "__main__":
    main()
