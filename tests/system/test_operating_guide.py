"""docs/operating.md is true: its first part is done by hand here, word for word, on four machines.

Each machine is a network namespace with a shell, and with directories of its own at /etc, /opt,
/run and /var/lib. Blocks of the guide say by their first line where they are to be run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.installation import PAGE, Installation, wait_until
from simulations.kernel.lab import Host, Lab

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "operating.md").read_text()
BLOCK = re.compile(r"```sh\n# on the (\w+)(, in a terminal of its own)?\n(.*?)```", re.DOTALL)
DONE = "--done--"
PORTS = {"portal": 9470, "relay": 9478, "gateway": 9479, "laptop": 9480}
NAMES = "127.0.0.1 localhost\n203.0.113.2 portal.example.org\n"


class Machine:
    """A machine with one shell that stays, and further terminals."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.folder = folder
        self.terminals: list[subprocess.Popen[bytes]] = []
        shutil.copytree(
            "/etc", folder / "etc", symlinks=True, ignore_dangling_symlinks=True,
            ignore=shutil.ignore_patterns("holloway"),
        )  # fmt: skip
        (folder / "etc" / "hosts").write_text(NAMES)
        (folder / "etc" / "holloway").mkdir()
        for name in ("lib", "opt", "home"):
            (folder / name).mkdir()
        (folder / "opt" / "holloway" / "bin").mkdir(parents=True)
        (folder / "opt" / "holloway" / "bin" / "holloway").symlink_to(
            Path(sys.executable).parent / "holloway"
        )
        self._shell = self._start(["bash"])
        assert self._shell.stdin is not None
        self._shell.stdin.write(
            f"""set -euo pipefail; cd {folder}/home
scp() {{ install -m 0600 "$1" {folder.parent}/"$(echo "${{2#root@}}" | tr -d :)"; }}
""".encode()
        )

    def open_terminal(self, script: str) -> None:
        """Run a block that does not end; its output goes to a file."""
        self.terminals.append(self._start(["bash", "-c", script.strip()]))

    def run(self, script: str) -> str:
        """Run a block in the shell that stays, and return what it printed."""
        assert self._shell.stdin is not None
        log = self.folder / "shell.log"
        begin = log.stat().st_size
        self._shell.stdin.write(f"{script}\necho {DONE}\n".encode())
        self._shell.stdin.flush()

        def printed() -> str:
            return log.read_bytes()[begin:].decode()

        def over() -> bool:
            assert self._shell.poll() is None, f"{script}\n{printed()}"
            return DONE in printed()

        wait_until(over, what=f"this has run: {script}", timeout_s=120)
        return printed().replace(DONE, "")

    def ends(self) -> list[int]:
        """The exit status of every terminal, which were told to end before."""
        return [terminal.wait(timeout=120) for terminal in self.terminals]

    def _start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        folder = self.folder
        mounts = f"""
            mount --make-rprivate /
            mount --bind {folder}/etc /etc
            mount --bind {folder}/lib /var/lib
            mount --bind {folder}/opt /opt
            exec "$@"
        """
        log = "shell.log" if argv == ["bash"] else f"terminal-{len(self.terminals)}.log"
        with (folder / log).open("ab") as output:
            return self.host.spawn(
                ["unshare", "--mount", "sh", "-ec", mounts, "sh", *argv],
                env={"PATH": "/opt/holloway/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )


@pytest.fixture
def machines() -> Iterator[dict[str, Machine]]:
    with Lab() as lab:
        it = Installation(lab)
        it.start_web(large_file_bytes=0)
        hosts = {
            "portal": it.portal_host,
            "relay": it.relay_host,
            "gateway": it.gateway_hosts["gateway-1"],
            "laptop": it.laptop,
        }
        made = {}
        for name, host in hosts.items():
            folder = lab.directory / name
            folder.mkdir(mode=0o755)
            made[name] = Machine(host, folder)
        try:
            yield made
        except BaseException:
            for log in sorted(lab.directory.glob("*/*.log")):
                print(f"--- {log}\n{log.read_text(errors='replace')[-3000:]}")
            raise


def get(machine: Machine, port: int, path: str) -> str:
    return machine.host.run("curl", "--silent", f"http://127.0.0.1:{port}{path}", check=False)


def wait_until_ready(machine: Machine, port: int) -> None:
    wait_until(
        lambda: '"ready":true' in get(machine, port, "/readyz"),
        what=f"what serves port {port} is ready",
        timeout_s=60,
    )


def end(machine: Machine) -> None:
    """SIGTERM to what runs in its terminals; each ends with exit status 0."""
    for terminal in machine.terminals:
        terminal.terminate()
    assert machine.ends() == [0]


def state_of(host: Host) -> str:
    """Rules, routes, nftables and switches of a machine, as text; without link-local addresses,
    which come up in their own time."""
    shown = [
        host.run("ip", *argv.split())
        for argv in ("rule", "-6 rule", "route show table all", "-brief link")
    ]
    shown.append(host.run("nft", "list", "ruleset"))
    switches = "net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv6.conf.eth0.accept_ra"
    shown.append(host.run("sysctl", *switches.split()))
    lines = "\n".join(shown).splitlines()
    return "\n".join(line for line in lines if not re.search(r"\bfe80:|\bff00:", line))


def metric(machine: Machine, port: int, name: str) -> float | None:
    found = re.search(rf"^{name} (\S+)$", get(machine, port, "/metrics"), re.MULTILINE)
    return None if found is None else float(found[1])


def test_the_guide_leads_by_hand_to_the_first_access_and_back(
    machines: dict[str, Machine],
) -> None:
    portal, laptop = machines["portal"], machines["laptop"]
    before = {name: state_of(machine.host) for name, machine in machines.items()}
    blocks = BLOCK.findall(GUIDE)
    assert len(blocks) == GUIDE.count("# on the ")
    printed: list[str] = []
    served: set[str] = set()
    for name, is_terminal, script in blocks:
        if is_terminal:
            machines[name].open_terminal(script)
            if name != "portal":
                wait_until_ready(machines[name], PORTS[name])
        else:
            printed.append(machines[name].run(script))
        if "holloway status" in script:  # with everything at work
            for other, port in PORTS.items():
                shown = get(machines[other], port, "/metrics")
                served |= set(re.findall(r"^# TYPE (holloway_\w+) ", shown, re.MULTILINE))
    said = "\n".join(printed)
    assert '"database":{"detail":"","ok":true}' in said
    assert "curl ended with 7" in said
    assert said.index("no tunnels at present") < said.index("denied: forbidden (policy):")
    assert "allowed by policy" in said
    assert PAGE in said
    assert re.search(r"\S+: direct.*\n  198\.51\.100\.2:\d+ <-> 192\.0\.2\.2:\d+\n", said)
    assert said.count("curl ended with") == 2

    assert not undocumented(served)

    assert laptop.ends() == [0]
    end(machines["gateway"])
    relay = machines["relay"]
    wait_until(
        lambda: metric(relay, 9478, "holloway_relay_allocations") == 0,
        what="agents that ended gave their allocations back",
    )
    end(relay)
    end(portal)
    for name, machine in machines.items():
        assert state_of(machine.host) == before[name], name


def undocumented(metrics: set[str]) -> set[str]:
    """Those of the metrics that neither the guide nor the relay's page names."""
    pages = GUIDE + (ROOT / "docs" / "relay.md").read_text()
    short = {re.sub("holloway_(relay|gateway|client)", "", name): name for name in metrics}
    return {
        name for end, name in short.items() if end not in pages and not name.endswith("_created")
    }


def test_the_settings_file_of_the_guide_is_understood_by_every_component(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    tables = tomllib.loads(block)
    assert set(tables) == {"portal", "relay", "gateway", "up"}
    file = tmp_path / "holloway.toml"
    file.write_text(block)
    for command in tables:
        argv = [sys.executable, "-m", "holloway", "--config", str(file), command]
        # No component gets further than its secrets: there is no token, and no such file.
        if command == "portal":
            argv += ["--state-dir", str(tmp_path), "--database-url-file", "/nowhere"]
            argv += ["--observability", ""]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=60)
        words = "/nowhere: No such file" if command == "portal" else "no token is given"
        assert words in done.stderr, done.stderr
        assert done.returncode == 1


def test_the_units_are_valid_and_start_what_the_guide_says(tmp_path: Path) -> None:
    units = sorted((ROOT / "packaging" / "systemd").glob("*.service"))
    commands = []
    for unit in units:
        text = unit.read_text()
        commands += re.findall(r"^ExecStart=/opt/holloway/bin/holloway (\w+)$", text, re.MULTILINE)
        (tmp_path / unit.name).write_text(text.replace("/opt/holloway/bin/holloway", "/bin/true"))
        for credential in re.findall(r"^LoadCredential=([\w-]+):", text, re.MULTILINE):
            assert credential in GUIDE
    assert sorted(commands) == ["gateway", "portal", "relay", "up"]
    done = subprocess.run(
        ["systemd-analyze", "verify", *sorted(map(str, tmp_path.glob("*.service")))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
