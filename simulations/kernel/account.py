"""The account of a scenario, made and changed through the API of a real portal.

Who may what is asked of the account of the simulator (`simulations.account`), which is changed
beside it: the portal that is looked at is not its own judge.
"""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

from actors.policy.conditions import NOWHERE
from simulations.account import EVERYONE, AccountBook, added_later
from simulations.hosts.database import Database
from simulations.installation import Api, InstallationError
from simulations.kernel.watch import Authorized
from simulations.net.world import World
from simulations.scenario.schema import Change, Policy, Scenario
from simulations.scenario.units import duration_ns

MAX_PAGE: Final = 200
TOO_MANY: Final = 429
FIRST_ERROR: Final = 400
TRIES: Final = 60
AGAIN_S: Final = 0.5
NO_ANSWER: Final = (OSError, ValueError, http.client.HTTPException)
"""What becomes of a call to a node that is going, or not there yet."""


class KernelAccount:
    """The entities by the names of the file. `operator` gives the operator's API of a node that
    lives, and `admin` that of the account's admin with a token."""

    def __init__(
        self,
        scenario: Scenario,
        directory: Path,
        addresses: dict[str, str],
        api: Callable[[str], Api],
        operator_token: str,
    ) -> None:
        self._scenario = scenario
        self._directory = directory
        self._addresses = addresses
        self._api = api
        self._operator_token = operator_token
        self._admin_token = ""
        self._account_id = ""
        self._ids: dict[tuple[str, str], str] = {}
        self._names: dict[str, str] = {}
        self._policies = {policy.name: policy for policy in scenario.account.policies}
        self._book = AccountBook(
            world := World(1),
            Database(world),
            scenario,
            portal="portal:443",
            addresses=addresses,
            regions=NOWHERE,  # these portals are given no region database
        )
        self._world = world
        self._began = time.monotonic_ns()
        self._ahead_ns = time.time_ns() - self._began

    # --- who may what ----------------------------------------------------------------------------

    def may(self, client: str, resource: str, remote_ip: str) -> bool:
        """Whether policy lets a client reach a resource now."""
        past = time.monotonic_ns() - self._began - self._world.now
        if past > 0:
            self._world.run_for(past)
        return self._book.may(client, resource, remote_ip)

    def expiries(self) -> list[int]:
        """The instants, on the machine's monotonic clock, at which policies of the file expire."""
        return [
            self._began + duration_ns(policy.expires_in)
            for policy in self._scenario.account.policies
            if policy.expires_in
        ]

    # --- making ----------------------------------------------------------------------------------

    def make(self) -> None:
        """The account, everything in it, and tokens for all agents. Raises InstallationError."""
        operator = self.operator()
        self._account_id = operator.call("POST", "/v1/accounts", {"name": "Twin", "slug": "twin"})[
            "id"
        ]
        operator = self.operator()
        admin = operator.call(
            "POST", "/v1/principals", {"name": "Admin", "role": "admin", "kind": "user"}
        )
        body = {"kind": "api", "name": "Admin's", "principal_id": admin["id"]}
        self._admin_token = operator.call("POST", "/v1/tokens", body)["token"]
        self._token(operator, "relay", "relay", {})
        written = self._scenario.account
        later = added_later(self._scenario)
        for site in written.sites:
            site_id = self._make("site", site, "sites", {"name": site})
            self._token(self.admin(), f"site-{site}", "gateway", {"site_id": site_id})
        self._make_groups()
        for user in written.users:
            body = {"name": user.name, "kind": "user"}
            user_id = self._make("user", user.name, "principals", body)
            self._token(self.admin(), f"user-{user.name}", "client", {"principal_id": user_id})
            for group in user.groups:
                if group != EVERYONE and ("membership", f"{user.name}/{group}") not in later:
                    self._add_membership(user.name, group)
        for resource in written.resources:
            body = {
                "name": resource.name,
                "kind": "cidr",
                "address": str(ip_network(self._addresses[resource.name])),
                "site_ids": [self._ids["site", site] for site in resource.sites],
                "filters": list(resource.filters),
            }
            self._make("resource", resource.name, "resources", body)
        for policy in written.policies:
            if ("policy", policy.name) not in later:
                self._add_policy(policy)

    def token_file(self, name: str) -> Path:
        """The token of `relay`, `site-<site>`, or `user-<user>`."""
        return self._directory / f"token-{name}"

    def operator(self) -> Api:
        """The API as the operator."""
        api = self._api(self._operator_token)
        if self._account_id:
            api.headers["Holloway-Account"] = self._account_id
        return api

    def admin(self) -> Api:
        """The API as the account's admin."""
        return self._api(self._admin_token)

    def _make_groups(self) -> None:
        for group in self.admin().call("GET", f"/v1/groups?limit={MAX_PAGE}")["items"]:
            if group["kind"] == "everyone":
                self._ids["group", EVERYONE] = group["id"]
        names = [group for user in self._scenario.account.users for group in user.groups]
        names += [policy.group for policy in self._scenario.account.policies]
        names += [f.subject[1] for f in self._scenario.faults if f.change == "add_membership"]
        for name in dict.fromkeys(names):
            if ("group", name) not in self._ids:
                self._make("group", name, "groups", {"name": name})

    def _add_membership(self, user: str, group: str) -> None:
        body = {"group_id": self._ids["group", group], "principal_id": self._ids["user", user]}
        self._make("membership", f"{user}/{group}", "memberships", body)

    def _add_policy(self, policy: Policy, *, disabled: bool | None = None) -> None:
        body: dict[str, Any] = {
            "group_id": self._ids["group", policy.group],
            "resource_id": self._ids["resource", policy.resource],
            "disabled": policy.disabled if disabled is None else disabled,
            "conditions": policy.conditions,
        }
        if policy.lease:
            body["lease_s"] = max(1, duration_ns(policy.lease) // 10**9)
        if policy.expires_in:
            lasts = timedelta(microseconds=duration_ns(policy.expires_in) // 1_000)
            body["expires_at"] = (datetime.now(UTC) + lasts).isoformat()
        self._make("policy", policy.name, "policies", body)

    @staticmethod
    def _call(api: Api, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A call that waits while there are too many. Raises InstallationError."""
        for _ in range(TRIES):
            status, answer = api.try_call(method, path, body)
            if status != TOO_MANY:
                break
            time.sleep(AGAIN_S)
        if status >= FIRST_ERROR:
            raise InstallationError(f"{method} {path}: {status}: {answer}")
        return answer

    def _make(self, kind: str, name: str, noun: str, body: dict[str, Any]) -> str:
        made: str = self._call(self.admin(), "POST", f"/v1/{noun}", body)["id"]
        self._ids[kind, name] = made
        self._names[made] = name
        return made

    def _token(self, api: Api, name: str, kind: str, body: dict[str, Any]) -> None:
        body = {"kind": kind, "name": name, **body}
        made = self._call(api, "POST", "/v1/tokens", body)
        self._ids["token", name] = made["id"]
        path = self.token_file(name)
        path.touch(mode=0o600)
        path.write_text(made["token"])

    # --- changing --------------------------------------------------------------------------------

    def change(self, change: Change, subject: tuple[str, ...]) -> None:
        """What an admin does. Raises ValueError for a subject that is not there, and
        InstallationError where the API refuses."""
        first = subject[0] if subject else ""
        match change:
            case "add_policy" | "enable_policy" | "disable_policy":
                self._set_policy(first, disabled=change == "disable_policy")
            case "remove_policy":
                self._delete("policies", "policy", first)
            case "add_membership":
                self._add_membership(*subject)
            case "remove_membership":
                self._delete("memberships", "membership", "/".join(subject))
            case "remove_user":
                self._delete("principals", "user", first)
            case "disable_user":
                path = f"/v1/principals/{self._ids['user', first]}"
                self._call(self.admin(), "PATCH", path, {"disabled": True})
            case "delete_token":
                user = self._book.user_by_client[first]
                self._delete("tokens", "token", f"user-{user}")
            case "remove_resource":
                self._delete("resources", "resource", first)
        self._book.change(change, subject)

    def users(self) -> list[str]:
        """Of the file, in its order."""
        return list(self._book.users())

    def remove_users(self, names: Sequence[str]) -> None:
        """As a directory that lost them does. Raises InstallationError."""
        for name in names:
            if ("user", name) in self._ids:
                self._delete("principals", "user", name)
        self._book.remove_users(names)

    def _set_policy(self, name: str, *, disabled: bool) -> None:
        known = self._ids.get(("policy", name))
        if known is None:
            self._add_policy(self._policies[name], disabled=disabled)
        else:
            body = {"disabled": disabled}
            self._call(self.admin(), "PATCH", f"/v1/policies/{known}", body)

    def _delete(self, noun: str, kind: str, name: str) -> None:
        id = self._ids.pop((kind, name), None)
        if id is None:
            raise ValueError(f"there is no {kind} {name!r}")
        self._call(self.admin(), "DELETE", f"/v1/{noun}/{id}")

    # --- who is online ---------------------------------------------------------------------------

    def online(self) -> set[str]:
        """The names of all agents that the portal sees."""
        found: set[str] = set()
        for who, noun in (
            (self.operator, "relays"),
            (self.admin, "gateways"),
            (self.admin, "clients"),
        ):
            with contextlib.suppress(InstallationError, *NO_ANSWER):
                items = who().call("GET", f"/v1/{noun}?limit={MAX_PAGE}")["items"]
                self._names |= {item["id"]: str(item["name"]) for item in items}
                found.update(str(item["name"]) for item in items if item["online"])
        return found

    # --- what it has given out -------------------------------------------------------------------

    def authorizations(self) -> list[Authorized] | None:
        """All that there ever were; None if the portal does not say."""
        self.online()  # who is who
        found: list[Authorized] = []
        path = f"/v1/authorizations?limit={MAX_PAGE}"
        cursor = ""
        try:
            while True:
                page = self._call(self.admin(), "GET", path + cursor)
                found += map(self._authorized, page["items"])
                if not page["next_cursor"]:
                    return found
                cursor = f"&cursor={page['next_cursor']}"
        except (InstallationError, *NO_ANSWER):
            return None

    def _authorized(self, item: dict[str, Any]) -> Authorized:
        def instant(text: str) -> int:
            return int(datetime.fromisoformat(text).timestamp() * 10**9) - self._ahead_ns

        return Authorized(
            client=self._names.get(item["client_id"], ""),
            gateway=self._names.get(item["gateway_id"], ""),
            resource=self._names.get(item["resource_id"], ""),
            created_ns=instant(item["created_at"]),
            expires_ns=instant(item["expires_at"]),
            ended_ns=instant(item["ended_at"]) if item["ended_at"] else None,
        )
