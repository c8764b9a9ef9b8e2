"""A whole installation on a lab of namespaces: real processes, each in its own namespace.

The network, with public-looking addresses (RFC 5737) on either side of a core router:

    portal 203.0.113.2      relay 203.0.113.6
              \\              /
               +--- core ---+
              /              \\
    home NAT 198.51.100.2   office NAT 192.0.2.2
         |                     |         |         |
    laptop 192.168.1.10   gateway-1  gateway-2   web 10.20.0.80

The demo walks through it, and the fault tests kill its parts one by one. A second relay stands at
203.0.113.10 where one is asked for.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import attrs

from simulations.kernel.lab import Host, Lab, NatKind

PORTAL = "203.0.113.2"
CHANNEL_PORT = 443
API_PORT = 443
RELAY = "203.0.113.6"
SECOND_RELAY = "203.0.113.10"
HOME_NAT = "198.51.100.2"
OFFICE_NAT = "192.0.2.2"
WEB = "10.20.0.80"
RESOURCE = "10.20.0.80/32"
PAGE = "Only those whom a policy allows read this page.\n"
LARGE_FILE = "large.bin"
GATEWAYS = ("gateway-1", "gateway-2")


class InstallationError(Exception):
    """A component did not start, or an API call was refused; the message says which and why."""


class Api:
    """The portal's JSON API, called from inside a namespace with the installation's own CA."""

    def __init__(
        self,
        host: Host,
        ca_file: Path,
        token: str,
        *,
        port: int = API_PORT,
        address: str = PORTAL,
    ) -> None:
        self._host = host
        self._address = address
        self._token = token
        self._port = port
        self._context = ssl.create_default_context(cafile=str(ca_file))
        self.headers: dict[str, str] = {}

    def call(self, method: str, path: str, body: object | None = None) -> Any:
        """One request; returns the decoded answer. Raises InstallationError on a problem."""
        status, answer = self.try_call(method, path, body)
        if status >= 400:
            raise InstallationError(f"{method} {path}: {status}: {answer}")
        return answer

    def try_call(self, method: str, path: str, body: object | None = None) -> tuple[int, Any]:
        """One request; returns its status and decoded answer (None for an empty one)."""
        plain = self._host.connect((self._address, self._port))
        with self._context.wrap_socket(plain, server_hostname=self._address) as stream:
            connection = http.client.HTTPConnection(self._address, self._port)
            connection.sock = stream
            connection.request(
                method,
                path,
                body=None if body is None else json.dumps(body),
                headers={
                    "Authorization": f"Bearer {self._token}",
                    "Content-Type": "application/json",
                    "Connection": "close",
                    **self.headers,
                },
            )
            response = connection.getresponse()
            data = response.read()
            return response.status, json.loads(data) if data else None


@attrs.define
class Component:
    """One process of Holloway in its namespace; `start` may be called again after a death."""

    name: str
    host: Host
    argv: list[str]
    env: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = self.host.spawn(
                self.argv, env=self.env, stdout=output, stderr=subprocess.STDOUT
            )

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to this very process."""
        assert self.process is not None, f"{self.name} was never started"
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait for the death."""
        assert self.process is not None, f"{self.name} was never started"
        self.process.kill()
        self.process.wait()

    def tail(self, lines: int = 15) -> str:
        """The end of what it logged."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def wait_until(
    holds: Callable[[], object], *, what: str, timeout_s: float = 30.0, every_s: float = 0.05
) -> Any:
    """The first truthy value that `holds` returns. Raises InstallationError after the timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := holds():
            return value
        if time.monotonic() > deadline:
            raise InstallationError(f"waited {timeout_s:.0f} s in vain until {what}")
        time.sleep(every_s)


class Installation:
    """Every part of one installation; `with Installation(lab) as it:` makes the network, and
    the parts start one by one (`start_portal`, `enrol`, ...), each logging into the lab's folder.

    With two relays each says a failure domain of its own.
    """

    def __init__(self, lab: Lab, *, relays: Literal[1, 2] = 1) -> None:
        self.lab = lab
        self.directory = lab.directory
        self.components: dict[str, Component] = {}
        core = lab.router("core")
        self.portal_host = lab.public_host("portal", core, f"{PORTAL}/30")
        self.relay_host = lab.public_host("relay", core, f"{RELAY}/30")
        self.relay_hosts = {"relay": (self.relay_host, RELAY)}
        if relays == 2:
            second = lab.public_host("relay-2", core, f"{SECOND_RELAY}/30")
            self.relay_hosts["relay-2"] = (second, SECOND_RELAY)
        self.home = lab.nat("home", core, wan=f"{HOME_NAT}/30", lan="192.168.1.1/24")
        self.office = lab.nat("office", core, wan=f"{OFFICE_NAT}/30", lan="10.20.0.1/24")
        self.laptop = lab.host("laptop", self.home, "192.168.1.10/24")
        self.gateway_hosts = {
            name: lab.host(name, self.office, f"10.20.0.{11 + number}/24")
            for number, name in enumerate(GATEWAYS)
        }
        self.web = lab.host("web", self.office, f"{WEB}/24")
        self.ids: dict[str, str] = {}
        self.operator: Api
        self.admin: Api

    # --- parts ---

    def start_everything(self, *, large_file_bytes: int, timeout_s: float = 30.0) -> None:
        """Every part, one after the other, until all are online; no policy yet."""
        self.start_web(large_file_bytes=large_file_bytes)
        self.start_portal()
        self.make_account()
        for name in self.relay_hosts:
            self.start_relay(name)
        for name in GATEWAYS:
            self.start_gateway(name)
        self.start_client()
        self.wait_until_online(timeout_s)

    def start_web(self, *, large_file_bytes: int) -> None:
        """nginx with one page, and one large file of bytes that do not compress to nothing."""
        root = self.directory / "web"
        root.mkdir()
        (root / "index.html").write_text(PAGE)
        with (root / LARGE_FILE).open("wb") as file:
            block = os.urandom(1 << 20)
            for _ in range(large_file_bytes >> 20):
                file.write(block)
        configuration = root / "nginx.conf"
        configuration.write_text(
            f"""daemon off; master_process off; pid {root}/nginx.pid; error_log stderr;
events {{ worker_connections 64; }}
http {{
  access_log off; sendfile on; default_type text/plain;
  client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
  uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
  server {{ listen {WEB}:80; root {root}; }}
}}
"""
        )
        self._start("web", self.web, ["nginx", "-c", str(configuration), "-e", "stderr"], {})
        wait_until(lambda: self._listens(self.web, (WEB, 80)), what="the web server listens")

    def start_portal(self) -> None:
        """The portal on its embedded PostgreSQL, and the operator's and an admin's API."""
        state = self.directory / "portal"
        self._start_holloway(
            "portal",
            self.portal_host,
            ["portal", "--state-dir", str(state)],
            {
                "HOLLOWAY_PORTAL_LISTEN": f"{PORTAL}:{CHANNEL_PORT}",
                "HOLLOWAY_PORTAL_API_LISTEN": f"{PORTAL}:{API_PORT}",
                "HOLLOWAY_PORTAL_ADDRESS": f"{PORTAL}:{CHANNEL_PORT}",
            },
        )
        self.wait_for_portal()
        self.operator = Api(
            self.portal_host,
            state / "ca.pem",
            (state / "operator-token").read_text().strip(),
        )

    def wait_for_portal(self, timeout_s: float = 60.0) -> None:
        wait_until(self._portal_ready, what="the portal is ready", timeout_s=timeout_s)

    def make_account(self) -> None:
        """An account with an admin, a user in a group, a site, and tokens for every agent."""
        account = self.operator.call("POST", "/v1/accounts", {"name": "Demo", "slug": "demo"})
        self.ids["account"] = account["id"]
        self.operator.headers["Holloway-Account"] = account["id"]
        admin = self.operator.call(
            "POST", "/v1/principals", {"name": "Ada", "role": "admin", "kind": "user"}
        )
        token = self.operator.call(
            "POST", "/v1/tokens", {"kind": "api", "name": "Ada's", "principal_id": admin["id"]}
        )
        self.admin = Api(self.portal_host, self.directory / "portal" / "ca.pem", token["token"])
        make = self.make
        make("site", "sites", {"name": "Office"})
        make(
            "resource",
            "resources",
            {
                "name": "Intranet",
                "kind": "cidr",
                "address": RESOURCE,
                "site_ids": [self.ids["site"]],
                "filters": [{"protocol": "tcp", "port_start": 80, "port_end": 80}],
            },
        )
        make("group", "groups", {"name": "Engineers"})
        make("principal", "principals", {"name": "Grace", "kind": "user"})
        make(
            "membership",
            "memberships",
            {"group_id": self.ids["group"], "principal_id": self.ids["principal"]},
        )
        self._token(self.admin, "client", {"principal_id": self.ids["principal"]})
        self._token(self.admin, "gateway", {"site_id": self.ids["site"]})
        self._token(self.operator, "relay", {})

    def make(self, name: str, noun: str, body: dict[str, object]) -> str:
        """Create an entity as the admin, remember its id under `name`, and return it."""
        self.ids[name] = self.admin.call("POST", f"/v1/{noun}", body)["id"]
        return self.ids[name]

    def allow(self, **extra: object) -> str:
        """The policy by which Engineers may reach the Intranet."""
        body = {"group_id": self.ids["group"], "resource_id": self.ids["resource"], **extra}
        return self.make("policy", "policies", body)

    def forbid(self) -> None:
        """Delete that policy."""
        self.admin.call("DELETE", f"/v1/policies/{self.ids['policy']}")

    def start_relay(self, name: str = "relay") -> None:
        host, address = self.relay_hosts[name]
        domain = ["--failure-domain", name] if len(self.relay_hosts) > 1 else []
        self._start_holloway(
            name,
            host,
            ["relay", "--name", name, "--listen", f"{address}:3478", *domain],
            {"HOLLOWAY_RELAY_TOKEN_FILE": str(self.directory / "relay-token")},
        )

    def start_gateway(self, name: str) -> None:
        self._start_holloway(
            name,
            self.gateway_hosts[name],
            ["gateway", "--name", name, "--state-dir", str(self.directory / name)],
            {"HOLLOWAY_GATEWAY_TOKEN_FILE": str(self.directory / "gateway-token")},
        )

    def start_client(self) -> None:
        self._start_holloway(
            "laptop",
            self.laptop,
            ["up", "--name", "laptop", "--state-dir", str(self.directory / "laptop")],
            {"HOLLOWAY_UP_TOKEN_FILE": str(self.directory / "client-token")},
        )

    def wait_until_online(self, timeout_s: float = 30.0) -> None:
        """Until the portal sees all relays, both gateways and the client."""

        def online() -> bool:
            gateways = self.admin.call("GET", "/v1/gateways")["items"]
            clients = self.admin.call("GET", "/v1/clients")["items"]
            relays = self.operator.call("GET", "/v1/relays")["items"]
            return (
                sum(entry["online"] for entry in gateways) == len(GATEWAYS)
                and any(entry["online"] for entry in clients)
                and sum(entry["online"] for entry in relays) == len(self.relay_hosts)
            )

        wait_until(online, what="relays, gateways and client are online", timeout_s=timeout_s)

    # --- looking and acting ---

    def status(self, name: str = "laptop") -> dict[str, Any]:
        """What `holloway status --json` says on a host with an agent; empty when it is down."""
        component = self.components[name]
        state = self.directory / name
        done = subprocess.run(
            ["ip", "netns", "exec", component.host.name, *HOLLOWAY, "status", "--json",
             "--state-dir", str(state)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )  # fmt: skip
        if done.returncode != 0:
            return {}
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def curl(self, *options: str, path: str = "", timeout_s: float = 10.0) -> tuple[int, str]:
        """An unmodified curl on the laptop: its exit status, and what it printed."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.laptop.name, "curl", "--silent", "--show-error",
             "--max-time", str(timeout_s), *options, f"http://{WEB}/{path}"],
            capture_output=True,
            text=True,
        )  # fmt: skip
        return done.returncode, done.stdout or done.stderr

    def fetch_page(self, timeout_s: float = 10.0) -> bool:
        """Whether curl gets the private page, whole."""
        code, text = self.curl(timeout_s=timeout_s)
        return code == 0 and text == PAGE

    @contextlib.contextmanager
    def download(self, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """A running curl of the large file, and the file into which it writes."""
        target = self.directory / "download"
        target.unlink(missing_ok=True)
        process = self.laptop.spawn(
            ["curl", "--silent", "--output", str(target), "--max-time", "120", *options,
             f"http://{WEB}/{LARGE_FILE}"]
        )  # fmt: skip
        try:
            yield process, target
        finally:
            process.kill()
            process.wait()

    def set_nats(self, kind: NatKind) -> None:
        """Both NATs become of this kind and forget every binding, as after a replacement."""
        for nat in (self.home, self.office):
            nat.set_nat(kind)
            nat.flush_bindings()

    def block_udp(self) -> None:
        """From now on no datagram enters or leaves the laptop."""
        self.laptop.nft(_BLOCKED_UDP)

    def unblock_udp(self) -> None:
        self.laptop.run("nft", "delete", "table", "inet", "blocked")

    # --- helpers ---

    def _token(self, api: Api, kind: str, body: dict[str, object]) -> None:
        made = api.call("POST", "/v1/tokens", {"kind": kind, "name": f"{kind} token", **body})
        self.ids[f"{kind}_token"] = made["id"]
        path = self.directory / f"{kind}-token"
        path.touch(mode=0o600)
        path.write_text(made["token"])

    def _start_holloway(self, name: str, host: Host, argv: list[str], env: dict[str, str]) -> None:
        self._start(name, host, [*HOLLOWAY, *argv], {"PYTHONPATH": str(ROOT), **env})

    def _start(self, name: str, host: Host, argv: list[str], env: dict[str, str]) -> None:
        component = self.components.get(name)
        if component is None:
            component = Component(
                name=name, host=host, argv=argv, env=env, log=self.directory / f"{name}.log"
            )
            self.components[name] = component
        component.start()

    def _portal_ready(self) -> bool:
        component = self.components["portal"]
        if not component.alive():
            raise InstallationError(f"the portal ended at its start:\n{component.tail()}")
        state = self.directory / "portal"
        if not (state / "ca.pem").exists() or not (state / "operator-token").exists():
            return False
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            api = Api(self.portal_host, state / "ca.pem", "")
            status, _ = api.try_call("GET", "/readyz")
            return status == 200
        return False

    @staticmethod
    def _listens(host: Host, address: tuple[str, int]) -> bool:
        with contextlib.suppress(OSError):
            host.connect(address, timeout_s=1).close()
            return True
        return False


_BLOCKED_UDP = """
table inet blocked {
  chain input { type filter hook input priority 0; iifname != lo meta l4proto udp drop; }
  chain output {
    type filter hook output priority 0;
    oifname != { "lo", "holloway0" } meta l4proto udp drop;
  }
}
"""

ROOT = Path(__file__).resolve().parent.parent
HOLLOWAY = [sys.executable, "-m", "holloway"]
