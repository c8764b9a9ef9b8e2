"""Ways that are long, lossy or narrow, on the links of a lab's router.

Latency, jitter and loss are of a userspace process that holds packets back (`simulations.kernel.
delay`), since few kernels of containers have netem; the rate is the kernel's token bucket. All of
it stands on a router without connection tracking, so that no NAT sees a packet before it arrives.
Needs `iptables-nft` (iptables) and `tc` (iproute2).
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from simulations.kernel.delay import PARTS, Delay
from simulations.kernel.lab import Host, LabError

MAX_BURST_BYTES = 16 << 10


@attrs.frozen(kw_only=True)
class Quality:
    """How the link of a host behaves, in each direction. `loss` is a share of packets, and
    `rate_bit_s` bits a second (0: no limit) with a queue of `queue_bytes`."""

    latency_us: int = 0
    jitter_us: int = 0
    loss: float = 0.0
    rate_bit_s: int = 0
    queue_bytes: int = 64 << 10

    @property
    def delayed(self) -> bool:
        return bool(self.latency_us or self.jitter_us or self.loss)


@contextlib.contextmanager
def impaired(router: Host, links: Sequence[tuple[Host, Quality]]) -> Iterator[None]:
    """Within this block the links of these hosts to the router behave so, in each direction.

    Raises LabError where something is missing or refused.
    """
    delays: list[Delay] = []
    rules: list[str] = []
    for number, (host, quality) in enumerate(links):
        if quality.delayed:
            for way, chain in enumerate(("PREROUTING -i", "POSTROUTING -o")):
                queue = 2 * number + way
                delays.append(_delay(queue, quality))
                rules.append(f"-A {chain} {host.uplink} -j NFQUEUE --queue-num {queue}")
    limited = [(host, quality) for host, quality in links if quality.rate_bit_s]
    ends = [(router, host.uplink, q) for host, q in limited]
    ends += [(host, host.device, q) for host, q in limited]
    with contextlib.ExitStack() as stack:
        if delays:
            stack.enter_context(_delaying(router, delays))
            for program in ("iptables-nft-restore", "ip6tables-nft-restore"):
                stack.callback(_restore, router, program, [])
                _restore(router, program, rules)
        for host, device, quality in ends:
            stack.callback(host.run, "tc", "qdisc", "del", "dev", device, "root", check=False)
            _limit(host, device, quality)
        yield


@contextlib.contextmanager
def _delaying(router: Host, delays: list[Delay]) -> Iterator[None]:
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
            yield
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


def _delay(queue: int, quality: Quality) -> Delay:
    return Delay(
        queue=queue,
        latency_us=quality.latency_us,
        jitter_us=quality.jitter_us,
        loss=round(quality.loss * PARTS),
    )


def _limit(host: Host, device: str, quality: Quality) -> None:
    burst = min(MAX_BURST_BYTES, max(2_000, quality.rate_bit_s // 8 // 250))
    host.run(
        "tc", "qdisc", "replace", "dev", device, "root", "tbf",
        "rate", f"{quality.rate_bit_s}bit", "burst", str(burst),
        "limit", str(quality.queue_bytes),
    )  # fmt: skip
