"""`holloway demo`: watch one whole access, end to end, on this machine.

Everything in it is real: processes in network namespaces, PostgreSQL, QUIC, STUN and TURN,
WireGuard packets, kernel NATs, an unmodified curl. Each step ends in an outcome that either held
or not, and a figure that was measured; outcomes alone decide the exit status.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import attrs
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from runtime.service import configure_logging
from simulations.installation import (
    GATEWAYS,
    HOME_NAT,
    LARGE_FILE,
    OFFICE_NAT,
    WEB,
    Installation,
    InstallationError,
    wait_until,
)
from simulations.kernel.lab import Lab, LabError, missing_requirements
from simulations.run import run
from simulations.scenario.load import ready

LARGE_FILE_BYTES = 64 << 20
SLOW_RATE = "2M"
SETTLE_S = 60.0


@attrs.frozen
class Outcome:
    """One thing that had to happen: whether it did, and what was measured on the way."""

    name: str
    title: str
    held: bool
    figure: str
    measured: dict[str, Any] = attrs.field(factory=dict)


@attrs.define
class Demo:
    """The walk through one installation; `outcomes` grows with each step."""

    installation: Installation
    say: Callable[[RenderableType], None]
    outcomes: list[Outcome] = attrs.field(factory=list)

    def run(self) -> None:
        """Every step in order. A step that cannot go on raises InstallationError."""
        self.set_up()
        self.denied()
        self.allowed()
        self.revoked()
        self.failed_over()
        self.relayed()

    # --- the steps ---

    def set_up(self) -> None:
        it = self.installation
        with self.timed() as seconds:
            it.start_everything(large_file_bytes=LARGE_FILE_BYTES, timeout_s=SETTLE_S)
        self.note(
            "installed",
            "portal, relay, two gateways and the client are online",
            True,
            f"{seconds():.1f} s",
            seconds=seconds(),
        )

    def denied(self) -> None:
        it = self.installation
        code, _ = it.curl(timeout_s=4)
        client = it.admin.call("GET", "/v1/clients")["items"][0]
        answer = it.admin.call(
            "POST",
            "/v1/policies/explain",
            {"client_id": client["id"], "resource_id": it.ids["resource"]},
        )
        why = answer["sentence"]
        self.note(
            "denied_without_policy",
            "without a policy, curl fails and the denial says why",
            code != 0 and not answer["allowed"] and "policy" in answer["violated"],
            f"curl ended with {code}; {why}",
            curl_exit=code,
            why=why,
        )

    def allowed(self) -> None:
        it = self.installation
        it.allow()
        with self.timed() as seconds:
            self.page("the page arrives once the policy is made")
        path = self.path()
        ends = (public_ip(path, "local"), public_ip(path, "remote"))
        direct = path.get("kind") == "direct" and ends == (HOME_NAT, OFFICE_NAT)
        self.note(
            "direct_path",
            "a policy is made: the page arrives through a hole-punched tunnel",
            direct,
            f"{path.get('kind')}: {path.get('local')} <-> {path.get('remote')}\n"
            f"round trip {milliseconds(path.get('rtt_ns'))}, first packet to first delivered "
            f"packet {milliseconds(path.get('first_delivery_ns'))}",
            seconds_from_policy_to_page=seconds(),
            path=path,
            home_nat=HOME_NAT,
        )

    def revoked(self) -> None:
        it = self.installation
        with it.download("--limit-rate", SLOW_RATE) as (process, target):
            wait_until(
                lambda: target.exists() and target.stat().st_size > 1 << 20,
                what="the download is under way",
            )
            it.forbid()
            begun = time.monotonic()
            last_growth, size = begun, target.stat().st_size
            while time.monotonic() - begun < 3.0 and process.poll() is None:
                if (now_size := target.stat().st_size) > size:
                    size, last_growth = now_size, time.monotonic()
                time.sleep(0.005)
            stopped = time.monotonic() - last_growth > 1.5 or process.poll() is not None
            stopped = stopped and size < LARGE_FILE_BYTES
        still_reachable = it.fetch_page(timeout_s=3)
        after_ms = (last_growth - begun) * 1000
        self.note(
            "cut_by_revocation",
            "the policy is deleted during a download: the traffic stops",
            stopped and not still_reachable,
            f"last byte {after_ms:.0f} ms after the deletion was acknowledged, "
            f"at {size >> 20} of {LARGE_FILE_BYTES >> 20} MiB",
            cut_after_ms=after_ms,
        )
        it.allow()
        with self.timed() as seconds:
            self.page("the page arrives again")
        self.note(
            "allowed_again",
            "the policy is made again: the page arrives again",
            True,
            f"{seconds():.2f} s",
            seconds=seconds(),
        )

    def failed_over(self) -> None:
        it = self.installation
        with self.timed() as seconds, it.download() as (process, target):
            code = process.wait(timeout=130)
            whole = target.stat().st_size == LARGE_FILE_BYTES
        rate = LARGE_FILE_BYTES * 8 / seconds() / 1e6
        self.note(
            "large_download",
            f"a file of {LARGE_FILE_BYTES >> 20} MiB is downloaded through the tunnel",
            code == 0 and whole,
            f"{rate:.0f} Mbit/s",
            megabits_per_s=rate,
        )
        used = self.peer()["name"]
        it.components[used].kill()
        with self.timed() as seconds:
            self.page("the page arrives through the other gateway")
        now_used = self.peer()["name"]
        self.note(
            "failed_over",
            f"{used}, which carries it, is killed: the next curl takes the other",
            now_used != used and now_used in GATEWAYS,
            f"through {now_used} after {seconds():.2f} s",
            seconds=seconds(),
            gateway=now_used,
        )

    def relayed(self) -> None:
        it = self.installation
        it.set_nats("symmetric")
        with self.timed() as seconds:
            self.page("the page arrives through a relay")
        path = wait_until(
            lambda: (path := self.path()).get("kind") == "relayed" and path,
            what="the path is relayed",
            timeout_s=SETTLE_S,
        )
        self.note(
            "relayed",
            "both NATs turn symmetric and forget bindings: the page arrives relayed",
            path["kind"] == "relayed" and it.fetch_page(),
            f"through the relay {path.get('relay')} after {seconds():.2f} s, round trip "
            f"{milliseconds(path.get('rtt_ns'))}",
            seconds=seconds(),
            path=path,
        )

    # --- helpers ---

    def page(self, what: str) -> None:
        """Fetch the private page, again and again until it arrives."""
        wait_until(lambda: self.installation.fetch_page(5), what=what, timeout_s=SETTLE_S)

    def peer(self) -> dict[str, Any]:
        """The one peer of the laptop that carries traffic now; empty when there is none."""
        peers = self.installation.status().get("peers", [])
        connected = [peer for peer in peers if peer.get("path")]
        return connected[0] if connected else {}

    def path(self) -> dict[str, Any]:
        peer = self.peer()
        return {**peer.get("path", {}), "first_delivery_ns": peer.get("first_delivery_ns")}

    def note(self, name: str, title: str, held: bool, figure: str, **measured: Any) -> None:
        outcome = Outcome(name=name, title=title, held=held, figure=figure, measured=measured)
        self.outcomes.append(outcome)
        mark = "[green]ok[/green]" if held else "[red]FAILED[/red]"
        self.say(f"{mark} {escape(title)}")
        self.say(Padding(escape(figure), (0, 0, 0, 3)))

    @contextmanager
    def timed(self) -> Iterator[Callable[[], float]]:
        """Yields a function that tells the seconds of the block (its end, once it is over)."""
        begun = time.monotonic()
        ended: list[float] = []
        yield lambda: (ended[0] if ended else time.monotonic()) - begun
        ended.append(time.monotonic())


STORY: Final = (
    ("denied_without_policy", "without a policy, nothing passes"),
    ("direct_path", "a policy is made: the service answers through a hole-punched tunnel"),
    ("cut_by_revocation", "the policy goes: the traffic stops"),
    ("allowed_again", "the policy is there again: the service answers again"),
    ("failed_over", "a gateway dies: the other carries on"),
    ("failed_over_again", "that one dies too, the first being back: it carries on"),
    ("relayed", "the laptop moves behind a symmetric NAT: the service answers through a relay"),
)
"""The checks of the ready-made scenario `demo`, in its order, by the names of our outcomes."""


def run_demo(*, as_json: bool = False, keep: bool = False) -> int:
    """Run the demo; 0 when every outcome held, 1 when one did not, 2 when it cannot run here.
    Where the machine lacks what real processes in namespaces need, the story is told in virtual
    time, and that is said."""
    console = Console(stderr=as_json, highlight=False)
    if missing := missing_requirements({"nginx": "nginx-light", "curl": "curl"}):
        return run_in_virtual_time(console, missing, as_json=as_json, keep=keep)
    signal.signal(signal.SIGTERM, _interrupted)
    failure = ""
    outcomes: list[Outcome] = []
    made: dict[str, str] = {}
    try:
        with Lab() as lab:
            made = {"run": lab.run_name, "directory": str(lab.directory)}
            console.print(f"Fetching http://{WEB}/ and {LARGE_FILE} from behind two NATs,")
            console.print(f"in the network namespaces {lab.prefix}*\n")
            try:
                demo = Demo(Installation(lab), console.print, outcomes)
                demo.run()
            except InstallationError as error:
                failure = str(error)
                outcomes.append(Outcome("completed", "the demo ran to its end", False, failure))
                _show_logs(console, lab)
            finally:
                _summary(console, outcomes)
            if keep:
                _look_around(console, lab)
    except LabError as error:
        failure = str(error)
        console.print(f"[red]{failure}[/red]", markup=True)
    except KeyboardInterrupt:
        failure = "interrupted; everything was removed"
        console.print(failure)
    held = bool(outcomes) and not failure and all(outcome.held for outcome in outcomes)
    if as_json:
        print(json.dumps(_as_json(outcomes, held, failure) | made))
    return 0 if held else 1


def run_in_virtual_time(console: Console, missing: list[str], *, as_json: bool, keep: bool) -> int:
    """The same story by the same cores and actors, without processes, packets and curl."""
    for sentence in missing:
        print(f"holloway demo: {sentence}", file=sys.stderr)
    if keep:
        print("holloway demo: there is nothing to keep without namespaces", file=sys.stderr)
        return 2
    configure_logging("text", "error")
    console.print("So this is the story in virtual time, from one seed: the same actors, agents")
    console.print("and protocols, but no process, kernel or curl (`holloway sim run demo`).\n")
    result = run(ready("demo"), 1)
    outcomes = []
    for (name, title), checked in zip(STORY, result.checks, strict=True):
        outcomes.append(Outcome(name, title, checked.held, checked.detail or checked.text))
        mark = "[green]ok[/green]" if checked.held else "[red]FAILED[/red]"
        console.print(f"{mark} {escape(title)}")
    _summary(console, outcomes)
    if as_json:
        report = _as_json(outcomes, result.held, result.error)
        print(json.dumps(report | {"world": "virtual", "missing": missing, "trace": result.trace}))
    return 0 if result.held else 1


def public_ip(path: dict[str, Any], side: str) -> str:
    """The address without its port of one side of a path, as `status` writes it."""
    return str(path.get(side) or "").rpartition(":")[0].strip("[]")


def milliseconds(duration_ns: object) -> str:
    return f"{duration_ns / 1e6:.1f} ms" if isinstance(duration_ns, int) else "unknown"


def _summary(console: Console, outcomes: list[Outcome]) -> None:
    """The closing table, within 80 columns; what went by before has the same in sentences."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, width=min(console.width, 80))
    table.add_column("held", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("measured", overflow="fold")
    for outcome in outcomes:
        held = "[green]yes[/green]" if outcome.held else "[red]NO[/red]"
        table.add_row(held, outcome.name.replace("_", " "), escape(outcome.figure))
    console.print()
    console.print(table)
    console.print(f"{sum(outcome.held for outcome in outcomes)} of {len(outcomes)} outcomes held.")


def _as_json(outcomes: list[Outcome], held: bool, failure: str) -> dict[str, Any]:
    return {
        "held": held,
        "failure": failure,
        "outcomes": {outcome.name: outcome.held for outcome in outcomes},
        "measured": {outcome.name: outcome.measured for outcome in outcomes},
    }


def _show_logs(console: Console, lab: Lab) -> None:
    for log in sorted(lab.directory.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-12:]
        console.print(f"\n--- {log.name}", *lines, sep="\n", markup=False)


def _look_around(console: Console, lab: Lab) -> None:
    console.print(
        f"\nEverything keeps running. Namespaces: {lab.prefix}*; state and logs: {lab.directory}\n"
        f"  ip netns exec {lab.prefix}laptop curl http://{WEB}/\n"
        f"  ip netns exec {lab.prefix}laptop {sys.executable} -m holloway status "
        f"--state-dir {lab.directory}/laptop\n"
        "Ctrl-C removes it all.",
        markup=False,
        soft_wrap=True,
    )
    with suppress(KeyboardInterrupt):
        signal.pause()


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt
