"""Ways that are long, lossy or narrow, on the links of a lab's router.

Latency, jitter, loss, duplication, reordering and corruption are of a userspace process that holds
packets back (`simulations.kernel.delay`), since few kernels of containers have netem; the rate is
the kernel's token bucket, and the MTU that of the link's two ends. All of it stands on a router
without connection tracking, so that no NAT sees a packet before it arrives. What befalls the n-th
packet of a direction follows from the seed and the link's name.
Needs `iptables-nft` (iptables) and `tc` (iproute2).
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import attrs

from runtime.randomness import SeededRandomness
from simulations.kernel.delay import BURST_PARTS, COPY, PARTS, Delay
from simulations.kernel.lab import Host, LabError

MAX_BURST_BYTES = 16 << 10
USUAL_MTU = 1_500


@attrs.frozen(kw_only=True)
class Quality:
    """How the link of a host behaves, in each direction. `loss`, `duplication`, `reordering` and
    `corruption` are shares of packets, `burst` the mean length of a burst of losses in packets, and
    `rate_bit_s` bits a second (0: no limit) with a queue of `queue_bytes`."""

    latency_us: int = 0
    jitter_us: int = 0
    loss: float = 0.0
    burst: float = 1.0
    duplication: float = 0.0
    reordering: float = 0.0
    corruption: float = 0.0
    rate_bit_s: int = 0
    queue_bytes: int = 64 << 10
    mtu: int = USUAL_MTU

    @property
    def delayed(self) -> bool:
        return bool(
            self.latency_us
            or self.jitter_us
            or self.loss
            or self.duplication
            or self.reordering
            or self.corruption
        )


class Impairment:
    """The links of one router, while they are impaired (see `impaired`)."""

    def __init__(self, router: Host, links: Sequence[tuple[Host, Quality]], seed: int) -> None:
        self._router = router
        self._hosts = [host for host, _ in links]
        self._seed = seed
        self._limited: set[str] = set()
        self._mtu_by_name = {host.name: USUAL_MTU for host in self._hosts}
        self._delayed: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def change(self, host: Host, quality: Quality) -> None:
        """The link of one of the hosts behaves so from now on. Raises LabError if it was not among
        those that can be delayed."""
        number = self._hosts.index(host)
        if number not in self._delayed or self._process is None or self._process.stdin is None:
            raise LabError(f"{host.short_name}: its link was not made to be changed")
        delays = " ".join(str(self._delay(number, way, quality)) for way in (0, 1))
        self._process.stdin.write(delays.encode() + b"\n")
        self._process.stdin.flush()
        self._limit_both(host, quality)

    def _limit_both(self, host: Host, quality: Quality) -> None:
        for end, device in ((self._router, host.uplink), (host, host.device)):
            if quality.rate_bit_s:
                _limit(end, device, quality)
                self._limited.add(host.name)
            elif host.name in self._limited:
                end.run("tc", "qdisc", "del", "dev", device, "root", check=False)
            if quality.mtu != self._mtu_by_name[host.name]:
                end.ip(f"link set dev {device} mtu {quality.mtu}")
        self._mtu_by_name[host.name] = quality.mtu

    def _delay(self, number: int, way: int, quality: Quality) -> Delay:
        """Of one direction of a link: 0 is into the router, 1 out of it."""
        name = f"link {self._hosts[number].short_name} {way}"
        return Delay(
            queue=2 * number + way,
            latency_us=quality.latency_us,
            jitter_us=quality.jitter_us,
            loss=round(quality.loss * PARTS),
            burst=round(quality.burst * BURST_PARTS),
            duplication=round(quality.duplication * PARTS),
            reordering=round(quality.reordering * PARTS),
            corruption=round(quality.corruption * PARTS),
            seed=int.from_bytes(SeededRandomness(self._seed, name).bytes(8), "big"),
        )


@contextlib.contextmanager
def impaired(
    router: Host,
    links: Sequence[tuple[Host, Quality]],
    *,
    changing: Collection[str] = (),
    seed: int = 1,
) -> Iterator[Impairment]:
    """Within this block the links of these hosts to the router behave so, in each direction.
    `changing`: names of those that may be told to behave otherwise meanwhile.

    Raises LabError where something is missing or refused.
    """
    made = Impairment(router, links, seed)
    delays: list[Delay] = []
    rules = [f"-A POSTROUTING -m mark --mark {COPY} -j ACCEPT"]
    for number, (host, quality) in enumerate(links):
        if quality.delayed or host.name in changing:
            made._delayed.add(number)
            for way, chain in enumerate(("PREROUTING -i", "POSTROUTING -o")):
                delays.append(made._delay(number, way, quality))
                queue = delays[-1].queue
                rules.append(f"-A {chain} {host.uplink} -j NFQUEUE --queue-num {queue}")
    with contextlib.ExitStack() as stack:
        if delays:
            made._process = stack.enter_context(_delaying(router, delays))
            for program in ("iptables-nft-restore", "ip6tables-nft-restore"):
                stack.callback(_restore, router, program, [])
                _restore(router, program, rules)
        for host, quality in links:
            stack.callback(made._limit_both, host, Quality())
            made._limit_both(host, quality)
        yield made


@contextlib.contextmanager
def _delaying(router: Host, delays: list[Delay]) -> Iterator[subprocess.Popen[bytes]]:
    process = router.spawn(
        [sys.executable, "-m", "simulations.kernel.delay", *map(str, delays)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline().strip() != b"ready":
                raise LabError(f"{router.short_name}: the delaying process did not start")
            yield process
        finally:
            process.stdin.close()
            process.wait(timeout=30)


def _restore(router: Host, program: str, rules: list[str]) -> None:
    text = "\n".join(["*mangle", *rules, "COMMIT", ""])
    done = subprocess.run(
        ["ip", "netns", "exec", router.name, program],
        input=text,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise LabError(f"{router.short_name}: {program}: {done.stderr.strip()}")


def _limit(host: Host, device: str, quality: Quality) -> None:
    burst = min(MAX_BURST_BYTES, max(2_000, quality.rate_bit_s // 8 // 250))
    host.run(
        "tc", "qdisc", "replace", "dev", device, "root", "tbf",
        "rate", f"{quality.rate_bit_s}bit", "burst", str(burst),
        "limit", str(quality.queue_bytes),
    )  # fmt: skip
