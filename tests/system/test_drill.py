"""A drill on a whole installation: what is killed, paused and cut off recovers, is measured, and is
as it was afterwards, however the drill ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.drill.partition import ports_of
from simulations.drill.processes import DrillError, argv_of, component_of, found
from simulations.installation import WEB, Component, Installation, wait_until
from simulations.kernel.lab import Lab
from simulations.result import Result, from_json

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
PARTS = ("portal", "relay", "gateway-1", "gateway-2", "laptop")

FILE = """
format = 1
name = "everything once"
duration = "200s"

[[faults]]
at = "1s"
kind = "crash"
targets = ["relay"]
duration = "1s"

[[faults]]
at = "8s"
kind = "pause"
targets = ["portal"]
duration = "3s"

[[faults]]
at = "16s"
kind = "partition"
targets = ["serving"]
duration = "10s"

[[faults]]
at = "40s"
kind = "restart"
targets = ["laptop"]

[[checks]]
kind = "recovered"
at = "16s"
within = "60s"
"""


@pytest.fixture(scope="module")
def it() -> Iterator[Installation]:
    with Lab() as lab:
        installation = Installation(lab)
        installation.start_everything(large_file_bytes=1 << 20)
        installation.allow()
        wait_until(installation.fetch_page, what="the page arrives")
        yield installation


def named(it: Installation) -> list[str]:
    options = []
    for name in PARTS:
        options += ["--process", f"{name}={pid_of(it.components[name])}"]
    return options


def pid_of(component: Component) -> int:
    """That of the newest process of a component: a drill may just have started another."""
    wanted = [part.encode() for part in component.argv]

    def newest() -> int:
        pids = [pid for pid in component.host.pids() if list(argv_of(pid)) == wanted]
        return max(pids, default=0)

    pid: int = wait_until(newest, what=f"{component.name} runs")
    return pid


def drilled(it: Installation, file: Path, *options: str) -> tuple[int, Result, str]:
    output = file.with_suffix(".json")
    done = subprocess.run(
        [sys.executable, "-m", "holloway", "sim", "drill", str(file), "--yes",
         "--probe", f"laptop@tcp://{WEB}:80", "--json", str(output), *named(it), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert output.exists(), done.stderr
    return done.returncode, from_json(output.read_bytes()), done.stderr


def test_what_is_broken_recovers_and_is_measured(it: Installation, tmp_path: Path) -> None:
    file = tmp_path / "drill.toml"
    serving = next(peer["name"] for peer in it.status()["peers"] if peer["path"])
    file.write_text(FILE.replace("serving", serving))

    status, result, said = drilled(it, file)

    assert status == 0, said
    kinds = [fault.kind for fault in result.faults]
    assert kinds == ["crash", "pause", "partition", "restart"]
    relay, portal, gateway, laptop = (fault.recovery_ns for fault in result.faults)
    assert relay == portal == 0  # tunnels need neither
    assert gateway is not None
    assert laptop is not None
    assert min(gateway, laptop) > 0
    assert result.pairs[0].answered > 0
    for name in PARTS:
        pid_of(it.components[name])
    wait_until(it.fetch_page, what="the page arrives after the drill")


def test_a_drill_that_is_interrupted_leaves_nothing_broken(
    it: Installation, tmp_path: Path
) -> None:
    file = tmp_path / "drill.toml"
    faults = "".join(
        f'[[faults]]\nat = "0s"\nkind = "{kind}"\ntargets = ["{name}"]\nduration = "1h"\n'
        for kind, name in (("partition", "gateway-1"), ("pause", "gateway-2"), ("crash", "relay"))
    )
    file.write_text(f'format = 1\nname = "long"\nduration = "2h"\n{faults}')
    drill = subprocess.Popen(
        [sys.executable, "-m", "holloway", "sim", "drill", str(file), "--yes", *named(it)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert drill.stderr is not None
    for line in drill.stderr:
        if "crash" in line:
            break
    drill.send_signal(signal.SIGTERM)
    drill.communicate(timeout=60)
    assert drill.returncode == 1
    assert "hlw_drill" not in it.gateway_hosts["gateway-1"].run("nft", "list", "tables")
    for name in PARTS:
        state = Path(f"/proc/{pid_of(it.components[name])}/stat").read_text().split(") ")[1][0]
        assert state != "T", f"{name} is paused still"
    wait_until(it.fetch_page, what="the page arrives after the drill", timeout_s=60)


def test_only_processes_of_holloway_are_ever_touched() -> None:
    with pytest.raises(DrillError, match="none of Holloway's"), found([f"me={os.getpid()}"]):
        pass


@pytest.mark.parametrize(
    ("line", "component"),
    [
        ("/usr/bin/python3 -m holloway gateway --name a", "gateway"),
        ("python3.11 -I -m holloway up", "up"),
        ("/opt/holloway/bin/python /opt/holloway/bin/holloway portal", "portal"),
        ("holloway relay", "relay"),
        ("sudo holloway relay", None),
        ("holloway sim drill", None),
        ("python -m pytest holloway gateway", None),
        ("vim holloway", None),
        ("", None),
    ],
)
def test_a_component_is_known_by_its_command_line(line: str, component: str | None) -> None:
    assert component_of([word.encode() for word in line.split()]) == component


def test_the_ports_of_a_process_are_those_of_its_sockets(it: Installation) -> None:
    def listens() -> bool:
        return ("udp", 3478) in ports_of(pid_of(it.components["relay"]))

    wait_until(listens, what="the relay listens")


@pytest.mark.parametrize(
    ("file", "options", "words"),
    [
        ('format = 1\nname = "x"', [], "there are no faults"),
        ("format = 7", [], "format"),
        (FILE, [], "no process 'serving'"),
        (FILE.replace("serving", "relay"), ["--probe", "gopher://x"], "a probe is tcp://"),
        (FILE.replace("serving", "relay"), ["--probe", "nobody@tcp://1.2.3.4:5"], "no process"),
        (FILE.replace('"pause"', '"roam"').replace("serving", "relay"), [], "only crash"),
    ],
)
def test_what_cannot_be_drilled_is_refused_before_anything_breaks(
    it: Installation, tmp_path: Path, file: str, options: list[str], words: str
) -> None:
    path = tmp_path / "drill.toml"
    path.write_text(file)
    done = subprocess.run(
        [sys.executable, "-m", "holloway", "sim", "drill", str(path), "--yes", *named(it),
         *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    named(it)  # all of them run
