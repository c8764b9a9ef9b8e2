"""`holloway admin` as somebody uses it, on a real API over HTTPS that the token's pin proves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import pytest
import trio
import yaml

import holloway
from actors.model import AuthProvider
from actors.store.postgres import Logins, PostgresStore
from admin.command import OTHERS
from admin.description import description
from channel.credentials import encode_token
from tests.system.portal_support import Installation, installation, key_ring, world

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "admin.md"


@attrs.frozen
class Ended:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out)


@attrs.frozen
class Terminal:
    """A person with a token, at a terminal without any other setting."""

    here: Installation
    env: dict[str, str]

    async def admin(self, *argv: str, stdin: bytes = b"", **env: str) -> Ended:
        done = await trio.run_process(
            [sys.executable, "-m", "holloway", "admin", *argv],
            env=self.env | env, capture_stdout=True, capture_stderr=True, check=False, stdin=stdin,
            cwd=ROOT,
        )  # fmt: skip
        said = done.stderr.decode()
        assert "Traceback" not in said, said
        return Ended(done.returncode, done.stdout.decode(), said)

    async def answer(self, text: str, *argv: str) -> Ended:
        """The same with somebody at the keyboard, who answers this."""
        ours, theirs = os.openpty()
        try:
            os.write(ours, text.encode())
            done = await trio.run_process(
                [sys.executable, "-m", "holloway", "admin", *argv],
                env=self.env, capture_stdout=True, capture_stderr=True, check=False, stdin=theirs,
                cwd=ROOT,
            )  # fmt: skip
        finally:
            os.close(ours)
            os.close(theirs)
        return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


def environment(home: Path, **env: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HOLLOWAY_", "COLUMNS"))}
    return kept | {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config")} | env


@asynccontextmanager
async def terminal(home: Path) -> AsyncIterator[Terminal]:
    """At an installation with the account acme, which has one thing of every noun."""
    async with installation(home / "portal") as here:
        _, token = await here.admin_of("acme")
        async with here.client(token) as client:
            await world(here, client)
        env = environment(home, HOLLOWAY_TOKEN=token, HOLLOWAY_ADMIN_PORTAL=str(here.door.address))
        yield Terminal(here, env)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "portal").mkdir()
    return tmp_path


# --- nouns and verbs -----------------------------------------------------------------------------


async def test_a_thing_is_made_shown_changed_and_removed_by_its_name(home: Path) -> None:
    async with terminal(home) as at:
        made = (await at.admin("groups", "create", "--name", "Crew", "-o", "json")).json()
        assert (await at.admin("groups", "get", "Crew", "-o", "json")).json() == made
        member = await at.admin(
            "memberships", "create", "--group", "Crew", "--principal", "uwe@example.org",
            "-o", "json",
        )  # fmt: skip
        assert member.json()["group_id"] == made["id"]
        tag = await at.admin("groups", "get", "Crew", "--print-etag")
        old = tag.out.strip()
        renamed = await at.admin(
            "groups", "update", "Crew", "--name", "Team", "--if-match", old, "-o", "json"
        )
        assert renamed.json() == made | {"name": "Team"}
        late = await at.admin("groups", "delete", "Team", "--if-match", old)
        assert late.status == 3
        removed = await at.admin("groups", "delete", made["id"])
        assert (removed.status, removed.out) == (0, f"deleted: group Team ({made['id']})\n")
        gone = await at.admin("groups", "get", made["id"])
        assert gone.status == 4
        assert "There is no such group here" in gone.err


async def test_lists_are_printed_for_people_and_for_programs(home: Path) -> None:
    async with terminal(home) as at:
        table = await at.admin("policies", "list")
        heading, row = table.out.splitlines()
        assert heading.split()[:3] == ["id", "group", "resource"]
        assert row.split()[1:3] == ["Staff", "Intranet"]
        as_json = (await at.admin("policies", "list", "-o", "json")).json()
        as_yaml = await at.admin("policies", "list", HOLLOWAY_ADMIN_OUTPUT="yaml")
        assert yaml.safe_load(as_yaml.out) == as_json
        assert UUID(as_json[0]["group_id"])
        narrow = (await at.admin("policies", "list", COLUMNS="40")).out.splitlines()
        assert max(map(len, narrow)) <= 40
        assert [line.split()[0] for line in narrow] == ["id", as_json[0]["id"]]
        assert "not shown (-o wide): " in (await at.admin("policies", "list", COLUMNS="40")).err
        wide = (await at.admin("policies", "list", "-o", "wide", COLUMNS="40")).out.splitlines()
        assert {"account", "created_at", "resource"} <= set(wide[0].split())
        assert len(wide) == 2


async def test_every_list_fits_a_terminal_of_eighty_columns(home: Path) -> None:
    async with terminal(home) as at:
        for noun in ("resources", "tokens", "policies"):
            listed = await at.admin(noun, "list", COLUMNS="80")
            assert listed.status == 0, listed.err
            lines = listed.out.splitlines()
            count = len((await at.admin(noun, "list", "-o", "json")).json())
            assert len(lines) == 1 + count, listed.out  # no cell was folded
            assert max(map(len, lines)) <= 80


async def test_whoever_sits_at_a_terminal_is_asked_before_something_is_deleted(home: Path) -> None:
    async with terminal(home) as at:
        made = (await at.admin("sites", "create", "--name", "Rome", "-o", "json")).json()
        asked = await at.answer("no\n", "sites", "delete", "Rome")
        assert asked.status == 1
        assert f"Delete site Rome ({made['id']}), with all that refers to it?" in asked.err
        assert "nothing was done" in asked.err
        assert (await at.admin("sites", "get", "Rome")).status == 0
        done = await at.answer("yes\n", "sites", "delete", "Rome", "-o", "json")
        assert done.json() == made
        assert (await at.admin("sites", "get", made["id"])).status == 4
        await at.admin("sites", "create", "--name", "Rome")
        unasked = await at.answer("", "sites", "delete", "Rome", "--yes")
        assert unasked.status == 0
        assert "Delete" not in unasked.err


async def test_every_list_there_is_can_be_printed(home: Path) -> None:
    async with terminal(home) as at:
        operator = {"HOLLOWAY_TOKEN": at.here.operator_token, "HOLLOWAY_ADMIN_ACCOUNT": "acme"}
        listed = [
            (noun, operation.verb)
            for noun, verbs in description().nouns.items()
            for operation in verbs.values()
            if operation.is_list
        ]
        assert ("nodes", "list") in listed
        assert ("logs", "requests") in listed
        for noun, verb in listed:
            ended = await at.admin(noun, verb, **operator)
            assert ended.status == 0, (noun, verb, ended.err)


async def test_pages_are_followed_and_filters_passed_on(home: Path) -> None:
    async with terminal(home) as at:
        for name in ("one", "two", "three"):
            await at.admin("sites", "create", "--name", name)
        everything = (await at.admin("sites", "list", "--all", "-o", "json")).json()
        some = await at.admin("sites", "list", "--limit", "2", "-o", "json")
        assert some.json() == everything[:2]
        assert "there are more than these 2" in some.err
        found = (await at.admin("sites", "list", "--name", "two", "-o", "json")).json()
        assert [site["name"] for site in found] == ["two"]


async def test_bodies_come_from_flags_from_json_and_from_files(home: Path) -> None:
    file = home / "conditions.json"
    file.write_text('{"remote_ip": {"operator": "is_in", "values": ["192.0.2.0/24"]}}')
    async with terminal(home) as at:
        made = await at.admin(
            "policies", "create", "--group", "Staff", "--resource", "Intranet",
            "--conditions", f"@{file}", "--data", '{"lease_s": 60, "description": "x"}',
            "--description", "by night", "--expires-at", "null", "-o", "json",
        )  # fmt: skip
        policy = made.json()
        assert policy["conditions"]["remote_ip"]["values"] == ["192.0.2.0/24"]
        assert (policy["lease_s"], policy["description"]) == (60, "by night")
        body = b'{"name": "Hall", "kind": "dns", "address": "*.example.org"}'
        hall = await at.admin(
            "resources", "create", "--data", "-", "--site", "Berlin", "-o", "json", stdin=body
        )
        assert len(hall.json()["site_ids"]) == 1
        emptied = await at.admin(
            "principals", "update", "Uwe", "--email", "null", "--disabled", "-o", "json"
        )
        assert (emptied.json()["email"], emptied.json()["disabled"]) == (None, True)


async def test_a_question_is_asked_by_names(home: Path) -> None:
    async with terminal(home) as at:
        asked = ["policies", "explain", "--principal", "Uwe", "--resource", "Intranet"]
        answer = await at.admin(*asked, "-o", "json")
        assert answer.json()["allowed"] is True
        assert "allowed by policy" in (await at.admin(*asked)).out


async def test_events_are_followed(home: Path) -> None:
    async with terminal(home) as at:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "holloway", "admin", "events", "watch", "--after", "1"],
            env=at.env, stdout=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            seen = b""
            while seen.count(b"\n") < 3:
                seen += await process.stdout.receive_some()
        finally:
            process.kill()
            await process.wait()
        events = [json.loads(line) for line in seen.splitlines()[:3]]
        assert [event["id"] for event in events] == ["2", "3", "4"]
        assert {event["event"] for event in events} == {"change"}


async def test_an_operator_names_the_account_by_its_slug(home: Path) -> None:
    async with terminal(home) as at:
        file = home / "operator"
        file.write_text(at.here.operator_token + "\n")
        file.chmod(0o600)
        operator = ["--token-file", str(file), "-o", "json"]
        groups = await at.admin("groups", "list", "--account", "acme", *operator)
        assert {group["name"] for group in groups.json()} == {"Everyone", "Staff"}
        without = await at.admin("groups", "list", *operator)
        assert without.status == 3
        assert "--account SLUG" in without.err
        config = home / ".config" / "holloway"
        config.mkdir(parents=True)
        (config / "admin.toml").write_text(
            f'default = "it"\n[profiles.it]\ntoken_file = "{file}"\naccount = "acme"\n'
            f'portal = "{at.here.door.address}"\noutput = "json"\n'
        )
        bare = Terminal(at.here, environment(home))
        assert (await bare.admin("groups", "list")).json() == groups.json()


# --- failures ------------------------------------------------------------------------------------


async def test_failures_say_what_to_do_and_end_by_their_kind(home: Path) -> None:
    async with terminal(home) as at:
        taken = await at.admin("groups", "create", "--name", "Staff")
        assert (taken.status, taken.out) == (3, "")
        assert "--name: another group has this name already" in taken.err
        for argv, status, words in [
            (["groups", "create"], 2, "--name: needed"),
            (["groups", "frob"], 2, "Unknown command"),
            (["groups", "list", "--frob"], 2, "Unknown option"),
            (["resources", "create", "--kind", "x"], 2, "Choose from"),
            (["sites", "get", "Nowhere"], 4, "sites has nothing that is called 'Nowhere'"),
            (["policies", "create", "--group", "x", "--resource", "Intranet"], 4, "--group-id"),
            (["sites", "create", "--name", ""], 3, "--name"),
            (["relays", "list"], 3, "operator"),
        ]:
            ended = await at.admin(*argv)
            assert ended.status == status, (argv, ended)
            assert words in " ".join(ended.err.replace("│", " ").split()), (argv, ended.err)


async def test_things_of_one_name_are_not_guessed_at(home: Path) -> None:
    async with terminal(home) as at:
        await at.admin("principals", "create", "--name", "Uwe")
        ended = await at.admin("principals", "get", "Uwe")
        assert ended.status == 2
        assert "2 of principals are called 'Uwe'" in ended.err


async def test_no_token_a_wrong_token_and_a_token_for_others(home: Path) -> None:
    async with terminal(home) as at:
        nobody = Terminal(at.here, environment(home))
        assert "no token" in (await nobody.admin("groups", "list")).err
        cut = await at.admin("groups", "list", HOLLOWAY_TOKEN=at.env["HOLLOWAY_TOKEN"][:-3])
        assert cut.status == 2
        assert at.env["HOLLOWAY_TOKEN"][20:40] not in cut.err
        made = await at.admin(
            "tokens", "create", "--kind", "client", "--name", "t", "--principal", "Uwe",
            "-o", "json",
        )  # fmt: skip
        laptop = await at.admin("groups", "list", HOLLOWAY_TOKEN=made.json()["token"])
        assert (laptop.status, "token for a client" in laptop.err) == (2, True)
        narrow = await at.admin(
            "tokens", "create", "--kind", "api", "--name", "n", "--principal", "Ada",
            "--scopes", "sites:read", "-o", "json",
        )  # fmt: skip
        bounded = {"HOLLOWAY_TOKEN": narrow.json()["token"]}
        assert (await at.admin("sites", "get", "Berlin", **bounded)).status == 0
        lacking = await at.admin("groups", "get", "Staff", **bounded)
        assert (lacking.status, "lacks the scope groups:read" in lacking.err) == (3, True)
        unknown = encode_token(
            "api", UUID(int=7), bytes(32), at.here.office.portal, at.here.office.pin
        )
        refused = await at.admin("groups", "list", HOLLOWAY_TOKEN=unknown.reveal_text())
        assert refused.status == 3


async def test_the_token_goes_to_nobody_but_its_own_portal(home: Path) -> None:
    (home / "other").mkdir()
    async with terminal(home) as at, installation(home / "other") as other:
        impostor = await at.admin("groups", "list", "--portal", str(other.door.address))
        assert impostor.status == 6
        assert "Nothing was sent to it" in impostor.err
        ca = home / "portal" / "ca.pem"
        assert (await at.admin("groups", "list", "--ca", str(ca))).status == 0
        wrong = await at.admin("groups", "list", "--ca", str(home / "other" / "ca.pem"))
        assert wrong.status == 5
        away = await at.admin("groups", "list", "--portal", "127.0.0.1:1")
        assert (away.status, "is it running?" in away.err) == (5, True)


# --- the account as one file ---------------------------------------------------------------------


async def test_an_export_applies_to_nothing_and_an_edit_to_what_was_edited(home: Path) -> None:
    async with terminal(home) as at:
        file = home / "account.toml"
        assert (await at.admin("export", "-f", str(file))).status == 0
        text = file.read_text()
        declared = tomllib.loads(text)
        assert [group["members"] for group in declared["groups"]] == [["uwe@example.org"]]
        same = await at.admin("diff", "-f", str(file), "--exit-code")
        assert (same.status, same.out) == (0, "no difference\n")
        number = (await at.admin("diff", "-f", str(file), "-o", "json")).json()["number"]
        await at.admin("apply", "--yes", "-f", str(file))
        after = (await at.admin("diff", "-f", str(file), "-o", "json")).json()["number"]
        assert after == number

        edited = text.replace('name = "Berlin"', 'name = "Bonn"\nwas = "Berlin"')
        edited = edited.replace('["Berlin"]', '["Bonn"]')
        file.write_text(
            edited
            + '\n[[groups]]\nname = "Guests"\nmembers = ["Ada"]\n'
            + '\n[[policies]]\ngroup = "Guests"\nresource = "Intranet"\n'
        )
        shown = await at.admin("diff", "-f", str(file), "--exit-code")
        assert shown.status == 1
        lines = shown.out.splitlines()
        assert "~ site Bonn" in lines
        assert "    name: Berlin -> Bonn" in lines
        assert "+ group Guests" in lines
        assert "+ policy Guests -> Intranet" in lines
        assert any(line.startswith("gained: Ada -> Intranet, from ") for line in lines)
        assert "2 to make, 1 to change, 0 to remove" in lines
        dry = await at.admin("apply", "--dry-run", "-f", str(file))
        assert dry.out.split("gained")[0] == shown.out.split("gained")[0]
        assert "Bonn" not in (await at.admin("export")).out
        unasked = await at.admin("apply", "-f", str(file))
        assert (unasked.status, "give --yes" in unasked.err) == (2, True)
        assert (await at.admin("apply", "-y", "-f", str(file))).status == 0
        assert (await at.admin("diff", "-f", str(file))).out == "no difference\n"
        again = (await at.admin("export", "-o", "json")).json()
        assert [site["name"] for site in again["sites"]] == ["Bonn"]
        as_yaml = await at.admin("export", "-o", "yaml")
        assert yaml.safe_load(as_yaml.out) == again


async def test_an_account_is_carried_to_another_one(home: Path) -> None:
    async with terminal(home) as at:
        exported = await at.admin("export")
        _, other = await at.here.admin_of("other")
        file = home / "account.toml"
        file.write_text(exported.out)
        done = await at.admin("apply", "-y", "-f", str(file), HOLLOWAY_TOKEN=other)
        assert done.status == 0, done.err
        assert (await at.admin("export", HOLLOWAY_TOKEN=other)).out == exported.out


async def test_a_section_that_is_left_out_is_left_alone(home: Path) -> None:
    async with terminal(home) as at:
        before = (await at.admin("export", "-o", "json")).json()
        only_sites = b'[[sites]]\nname = "Berlin"\n[[sites]]\nname = "Bonn"\n'
        done = await at.admin("apply", "-y", "-f", "-", "-o", "json", stdin=only_sites)
        assert [step["name"] for step in done.json()["steps"]] == ["Bonn"]
        after = (await at.admin("export", "-o", "json")).json()
        assert after == before | {"sites": [{"name": "Berlin"}, {"name": "Bonn"}]}


LOOPBACK = b"""
[[resources]]
name = "x"
kind = "ip"
address = "127.0.0.1"
sites = ["Berlin"]
"""


async def test_what_must_not_be_done_is_not_done(home: Path) -> None:
    async with terminal(home) as at:
        made = await at.admin(
            "policy-tests", "create", "--name", "Uwe works", "--principal", "Uwe",
            "--resource", "Intranet", "--expected", "allowed",
        )  # fmt: skip
        assert made.status == 0, made.err
        before = (await at.admin("export")).out
        planned = await at.admin("diff", "-f", "-", stdin=b"policies = []")
        assert "this test would fail, so it is refused: Uwe works" in planned.out
        assert planned.status == 0
        dry = await at.admin("apply", "--dry-run", "-f", "-", stdin=b"policies = []")
        assert (dry.status, dry.out.splitlines()[0]) == (3, planned.out.splitlines()[0])
        assert "policy tests would fail" in dry.err
        for declared, words in [
            (b"policies = []", "Uwe works"),
            (b'[[principals]]\nname = "Uwe"\nemail = "uwe@example.org"', "your own token"),
            (b'[[groups]]\nname = "Staff"\nmembers = ["x"]', "groups[0].members[0]: there is no"),
            (b'[[groups]]\nname = "Everyone"', "groups[0]: 'Everyone' is kept by Holloway"),
            (b"frob = 1", "frob: is not a field here"),
            (LOOPBACK, "resources[0].address: 127.0.0.1/32 touches the"),
        ]:
            ended = await at.admin("apply", "-y", "-f", "-", stdin=declared)
            assert ended.status == 3, (declared, ended)
            assert words in ended.err, (declared, ended.err)
        assert (await at.admin("export")).out == before


async def test_the_plan_that_was_seen_is_the_one_that_is_applied(home: Path) -> None:
    async with terminal(home) as at, at.here.client(at.env["HOLLOWAY_TOKEN"]) as client:
        declared = {"declaration": {"sites": [{"name": "Berlin"}, {"name": "Bonn"}]}}
        planned = (await client.post("/v1/declaration/plan", json=declared)).json()
        await client.post("/v1/sites", json={"name": "Rome"})
        late = await client.post(
            "/v1/declaration/apply", json=declared | {"number": planned["number"]}
        )
        assert (late.status_code, late.json()["code"]) == (409, "changed_meanwhile")


async def test_a_transaction_has_a_limit_that_is_told(home: Path) -> None:
    async with terminal(home) as at, at.here.client(at.env["HOLLOWAY_TOKEN"]) as client:
        sites = [{"name": "Berlin"}, *({"name": f"site {n}"} for n in range(1_001))]
        refused = await client.post("/v1/declaration/apply", json={"declaration": {"sites": sites}})
        assert (refused.status_code, refused.json()["code"]) == (422, "too_many_changes")


async def test_a_whole_account_may_be_larger_than_other_bodies(home: Path) -> None:
    async with terminal(home) as at, at.here.client(at.env["HOLLOWAY_TOKEN"]) as client:
        people = [{"name": f"{n} " + "x" * 240} for n in range(6_000)]
        body = {"declaration": {"principals": [{"name": "Ada", "role": "admin"}, *people]}}
        assert len(json.dumps(body)) > 1 << 20
        planned = await client.post("/v1/declaration/plan", json=body)
        assert planned.status_code == 200, planned.text
        made = [step for step in planned.json()["steps"] if step["action"] == "create"]
        assert len(made) == len(people)
        for path in ("/v1/declaration/plan", "/v1/declaration/apply"):
            large = await client.post(path, json={"declaration": "x" * (4 << 20)})
            assert (large.status_code, large.json()["code"]) == (413, "body_too_large")
        other = await client.post("/v1/sites", json={"name": "x" * (1 << 20)})
        assert other.status_code == 413


async def test_secrets_go_in_by_reference_and_never_come_out(home: Path) -> None:
    declared = b"""
[[auth_providers]]
name = "Keycloak"
kind = "oidc"
issuer = "https://id.example.org"
client_id = "holloway"
client_secret = { env = "SESAME" }
"""
    async with terminal(home) as at:
        argv = ["apply", "-y", "-f", "-", "-o", "json"]
        first = await at.admin(*argv, stdin=declared, SESAME="opensesame")
        [step] = first.json()["steps"]
        assert step["fields"] == [{"field": "client_secret", "before": None, "after": "(secret)"}]
        assert "opensesame" not in first.out
        assert "opensesame" not in (await at.admin("export")).out
        account_id = UUID((await at.admin("accounts", "list", "-o", "json")).json()[0]["id"])
        [provider] = await at.here.store.list(account_id, "auth_provider")
        provider = await at.here.store.get(account_id, "auth_provider", provider.id)
        assert isinstance(provider, AuthProvider)
        assert provider.client_secret is not None
        kept = key_ring().open(
            provider.client_secret, table="auth_provider", column="client_secret",
            account_id=account_id, row_id=provider.id,
        )  # fmt: skip
        assert kept.matches("opensesame")
        assert (await at.admin(*argv, stdin=declared, SESAME="opensesame")).json()["steps"] == []
        unset = await at.admin(*argv, stdin=declared)
        assert (unset.status, "SESAME is not set" in unset.err) == (2, True)


async def test_the_example_of_the_guide_applies_to_a_new_account(home: Path) -> None:
    [example] = re.findall(r"```toml\n(version = 1.*?)```", GUIDE.read_text(), re.DOTALL)
    async with terminal(home) as at:
        operator = {"HOLLOWAY_TOKEN": at.here.operator_token, "LOGIN_SECRET": "opensesame"}
        new = await at.admin("accounts", "create", "--name", "x", "--slug", "guide", **operator)
        assert new.status == 0, new.err
        on_it = ["--account", "guide", "-f", "-"]
        done = await at.admin("apply", "-y", *on_it, stdin=example.encode(), **operator)
        assert done.status == 0, done.err
        same = await at.admin("diff", *on_it, stdin=example.encode(), **operator)
        assert same.out == "no difference\n"
        exported = await at.admin("export", "--account", "guide", **operator)
        assert tomllib.loads(exported.out)["policies"] == tomllib.loads(example)["policies"]


async def test_postgresql_carries_out_what_was_planned(home: Path, database: Logins) -> None:
    async with (
        PostgresStore.open(database, migrated=True) as store,
        installation(home / "portal", store=store) as here,
    ):
        _, token = await here.admin_of("acme")
        async with here.client(token) as client:
            await world(here, client)
            before = (await client.get("/v1/declaration")).json()
            declared = before | {
                "sites": [{"name": "Bonn", "was": "Berlin"}, {"name": "Berlin"}],
                "groups": [{"name": "Staff", "members": []}, {"name": "New", "members": ["Ada"]}],
                "policy_tests": [],
                "policies": [{"group": "New", "resource": "Intranet"}],
                "auth_providers": [],
                "resources": [before["resources"][0] | {"sites": ["Bonn", "Berlin"]}],
            }
            body = {"declaration": declared}
            planned = (await client.post("/v1/declaration/plan", json=body)).json()
            applied = await client.post("/v1/declaration/apply", json=body)
            assert applied.status_code == 200, applied.text
            names = [(each["action"], each["name"]) for each in planned["steps"]]
            assert [(each["action"], each["name"]) for each in applied.json()["steps"]] == names
            again = (await client.post("/v1/declaration/plan", json=body)).json()
            assert again["steps"] == []
            after = (await client.get("/v1/declaration")).json()
            assert [site["name"] for site in after["sites"]] == ["Berlin", "Bonn"]
            assert after["policies"] == declared["policies"]
            number = planned["number"]
            assert applied.json()["number"] > number
            late = await client.post(
                "/v1/declaration/apply",
                json={"declaration": before, "number": number},
            )
            assert late.json()["code"] == "changed_meanwhile"


# --- completion ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("holloway re", ["relay"]),
        ("holloway admin res", ["resources"]),
        ("holloway admin policies exp", ["explain", "exposure"]),
        ("holloway admin resources create --add", ["--address"]),
        ("holloway admin resources create --kind d", ["device_pool", "dns"]),
        ("holloway admin export --out", ["--output"]),
    ],
)
def test_bash_completes_nouns_verbs_flags_and_values(
    tmp_path: Path, line: str, wanted: list[str]
) -> None:
    words = line.split()
    script = f"""
source <({sys.executable} -m holloway admin completion bash)
COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
_holloway
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path)
    )
    assert sorted(done.stdout.split()) == wanted, done.stderr


def test_every_command_is_completed() -> None:
    assert {name for name in holloway.app if not name.startswith("-")} == {*OTHERS, "admin"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_completion_too(tmp_path: Path, shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "holloway", "admin", "completion", shell],
        capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path), check=True,
    )  # fmt: skip
    assert "policy-tests" in done.stdout
    assert "holloway" in done.stdout
