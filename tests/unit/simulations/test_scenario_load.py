"""Scenario files: all that is wrong is told, with its place; what is written is read again."""

from __future__ import annotations

import tomllib
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, given, settings

from simulations.scenario import schema
from simulations.scenario.kinds import CHECKS, FAULTS, SUBJECTS
from simulations.scenario.load import ScenarioError, checked, dump, load, loads, save
from simulations.scenario.schema import MAX_FILE_BYTES, MAX_NETWORKS, Scenario
from simulations.scenario.structure import Problems, read
from simulations.scenario.units import share_ppm
from tests.scenario_strategies import scenarios

HEAD = 'format = 1\nname = "x"\n[[portals]]\nname = "p1"\n'
SOUND = (
    HEAD
    + """
[[relays]]
name = "r1"
[[networks]]
name = "home"
prefix = "192.168.1.0/24"
nat = { mapping = "endpoint_independent" }
[[networks]]
name = "office"
prefix = "10.20.0.0/16"
nat = {}
[[clients]]
name = "laptop"
network = "home"
user = "grace"
[[gateways]]
name = "g1"
network = "office"
site = "berlin"
[[services]]
name = "wiki"
network = "office"
address = "10.20.0.80"
[account]
sites = ["berlin"]
users = [{ name = "grace", groups = ["staff"] }]
resources = [{ name = "wiki", sites = ["berlin"], service = "wiki" }]
policies = [{ name = "staff-wiki", group = "staff", resource = "wiki" }]
"""
)


def problems(text: str) -> list[str]:
    with pytest.raises(ScenarioError) as raised:
        loads(text)
    return [str(each) for each in raised.value.problems]


def test_a_sound_file_is_read() -> None:
    scenario = loads(SOUND)
    assert scenario.networks[0].nat == schema.NatBehaviour(mapping="endpoint_independent")
    assert scenario.account.users[0].groups == ("staff",)
    assert scenario.duration == "60s"


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios())
def test_what_is_written_is_read_again_as_the_same(scenario: Scenario) -> None:
    found = Problems()
    again = read(tomllib.loads(dump(scenario)), Scenario, "", found)
    assert not found.found
    assert again == scenario


def test_a_sound_scenario_stays_the_same_through_a_file(tmp_path: Path) -> None:
    file = tmp_path / "saved.toml"
    save(loads(SOUND), file, head="seed 7\nfound by chaos\x1b")
    assert load(file) == loads(SOUND)
    assert file.read_text().startswith("# seed 7\n# found by chaos\n")
    assert [each.name for each in tmp_path.iterdir()] == ["saved.toml"]


def test_all_that_is_wrong_is_told_at_once_with_its_place() -> None:
    found = problems(
        HEAD
        + """
colour = "red"
[[networks]]
name = "Home"
[[networks]]
name = "office"
nat = { timout = "3s", timeout = "soon", mapping = "conical" }
[[networks]]
name = "annex"
prefix = "10.1.1.1/16"
[[clients]]
name = "laptop"
network = "ofice"
"""
    )
    assert [each.partition(": ")[0] for each in found] == [
        "networks[0].name",
        "networks[1].nat.timout",
        "networks[1].nat.mapping",
        "networks[1].nat.timeout",
        "portals[0].colour",
        "clients[0].user",
        "networks[2].prefix",
    ]
    assert "did you mean 'timeout'?" in found[1]
    assert "endpoint_independent, address_dependent" in found[2]
    assert "a duration such as 20ms" in found[3]
    assert "did you mean 10.1.0.0/16?" in found[6]


def test_whoever_refers_to_an_entry_that_could_not_be_read_is_not_blamed() -> None:
    found = problems(SOUND.replace('prefix = "10.20.0.0/16"', "prefix = 10"))
    assert found == ["networks[1].prefix: expected text, got int, and this is 10"]


def test_places_count_entries_that_could_not_be_read() -> None:
    found = problems(
        SOUND
        + """
[[networks]]
nam = "bad"
[[networks]]
name = "last"
behind = "nowhere"
"""
    )
    assert "networks[3].behind: there is no network named 'nowhere'" in found


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        ('[[networks]]\nname = "a"\nbehind = "b"\n[[networks]]\nname = "b"\nbehind = "a"',
         "networks[2].behind"),
        ('[[networks]]\nname = "home"', "networks[2].name"),
        ('[[networks]]\nname = "internet"', "networks[2].name"),
        ('[[relays]]\nname = "laptop"', "clients[0].name"),
        ('[[networks]]\nname = "n"\nprefix = "::/64"', "networks[2].prefix"),
        ('[[networks]]\nname = "n"\nprefix = "127.0.0.0/8"', "networks[2].prefix"),
        ('[[networks]]\nname = "n"\nbehind = "home"\nprefix = "192.168.1.128/25"',
         "networks[2].prefix"),
        ('[[networks]]\nname = "n"\nprefix = "198.18.7.0/24"', "networks[2].prefix"),
        ('[[networks]]\nname = "n"\nprefix = "10.0.0.0/30"\n[[relays]]\nname = "r2"\nnetwork = "n"'
         '\n[[relays]]\nname = "r3"\nnetwork = "n"', "networks[2].prefix"),
        ('[[services]]\nname = "s"\nnetwork = "office"\naddress = "10.21.0.1"',
         "services[1].address"),
        ('[[services]]\nname = "s"\nnetwork = "office"\naddress = "10.20.0.80"',
         "services[1].address"),
        ('[[links]]\nbetween = ["home", "office"]', "links[0].between"),
        ('[[links]]\nbetween = ["home", "home"]', "links[0].between"),
        ('[[gateways]]\nname = "g2"\nnetwork = "office"\nsite = "paris"', "gateways[1].site"),
        ('[[traffic]]\nsource = ["g1"]', "traffic[0].source[0]"),
        ('[[traffic]]\nto = ["laptop"]', "traffic[0].to[0]"),
        ('[[traffic]]\nat = "2min"', "traffic[0].at"),
        ('[[traffic]]\nat = "9s"\nuntil = "8s"', "traffic[0].until"),
        ('[[populations]]\nname = "p"\ncount = 3\nmix = "martian"', "populations[0].mix"),
        ('[[populations]]\nname = "p"\ncount = 15000\nroaming = 1.0', "populations"),
        ('[chaos]\nfaults = 3\nheals = "2min"', "chaos.heals"),
    ],
)  # fmt: skip
def test_a_scenario_that_means_nothing_is_refused_at_its_place(edit: str, place: str) -> None:
    found = problems(SOUND.replace("[account]", edit + "\n[account]"))
    assert found[0].partition(": ")[0] == place


@pytest.mark.parametrize(
    ("policies", "place"),
    [
        ('{ name = "p", group = "stuff", resource = "wiki" }', "[0].group"),
        ('{ name = "p", group = "everyone", resource = "wik" }', "[0].resource"),
        ('{ name = "p", group = "everyone", resource = "wiki", lease = "1s" }', "[0].lease"),
        ('{ name = "p", group = "staff", resource = "wiki", conditions = { mood = {} } }',
         "[0].conditions"),
        ('{ name = "p", group = "staff", resource = "wiki", conditions = { remote_ip = '
         '{ operator = "is_in", values = ["10.0.0.300"] } } }',
         "[0].conditions.remote_ip.values[0]"),
    ],
)  # fmt: skip
def test_a_policy_that_the_portal_would_refuse_is_refused(policies: str, place: str) -> None:
    text = SOUND.replace('[{ name = "staff-wiki", group = "staff", resource = "wiki" }]',
                         f"[{policies}]")  # fmt: skip
    assert [each.partition(": ")[0] for each in problems(text)] == [f"account.policies{place}"]


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ('kind = "crash"', "targets"),
        ('kind = "crash"\ntargets = ["home"]', "targets[0]"),
        ('kind = "crash"\ntargets = ["g1"]\nto = "home"', "to"),
        ('kind = "pause"\ntargets = ["g1"]', "duration"),
        ('kind = "partition"\ntargets = ["g1"]\nothers = ["g1"]', "others"),
        ('kind = "link"\ntargets = ["home"]', "quality"),
        ('kind = "roam"\ntargets = ["laptop"]', "to"),
        ('kind = "drain"\ntargets = ["g1"]', "targets[0]"),
        ('kind = "clock_skew"\ntargets = ["g1"]', ""),
        ('kind = "change"\nchange = "add_membership"\nsubject = ["grace"]', "subject"),
        ('kind = "change"\nchange = "remove_policy"\nsubject = ["wiki"]', "subject[0]"),
        ('kind = "shrink_directory"', "share"),
        ('kind = "restart"\ntargets = ["g1"]\nduration = "soon"', "duration"),
    ],
)
def test_a_fault_has_what_its_kind_needs_and_nothing_else(fault: str, place: str) -> None:
    found = problems(SOUND + f'[[faults]]\nat = "1s"\n{fault}\n')
    wanted = f"faults[0].{place}" if place else "faults[0]"
    assert [each.partition(": ")[0] for each in found] == [wanted]


def test_only_a_nat_forgets_bindings() -> None:
    text = SOUND.replace("[account]", '[[networks]]\nname = "n"\nprefix = "10.9.0.0/24"\n[account]')
    found = problems(text + '[[faults]]\nat = "1s"\nkind = "rebind"\ntargets = ["n"]\n')
    assert found == ["faults[0].targets[0]: 'n' has no NAT that could forget anything"]


@pytest.mark.parametrize(
    ("check", "place"),
    [
        ('kind = "recovered"\nat = "5s"\nwithin = "1s"', "at"),
        ('kind = "cut"\nat = "5s"', "within"),
        ('kind = "online"', "targets"),
        ('kind = "share"\npath = "direct"', "path"),
        ('kind = "reach"\npath = "none"\nwithin = "1s"', "within"),
        ('kind = "denied"\nsource = ["lap"]', "source[0]"),
    ],
)
def test_a_check_has_what_its_kind_needs_and_nothing_else(check: str, place: str) -> None:
    fault = '[[faults]]\nat = "4s"\nkind = "crash"\ntargets = ["g1"]\n'
    found = problems(SOUND + fault + f"[[checks]]\n{check}\n")
    assert [each.partition(": ")[0] for each in found] == [f"checks[0].{place}"]


def test_every_kind_of_the_schema_has_its_row() -> None:
    assert set(FAULTS) == set(schema.FaultKind.__args__)
    assert set(CHECKS) == set(schema.CheckKind.__args__)
    assert set(SUBJECTS) == set(schema.Change.__args__)
    fault_fields = {field.name for field in attrs.fields(schema.Fault)}
    check_fields = {field.name for field in attrs.fields(schema.Check)}
    assert all(kind.fields <= fault_fields for kind in FAULTS.values())
    assert all(kind.fields <= check_fields for kind in CHECKS.values())
    assert fault_fields == set().union(*(kind.fields for kind in FAULTS.values()))
    assert check_fields == set().union(*(kind.fields for kind in CHECKS.values()))


@pytest.mark.parametrize(
    ("share", "ppm"), [(1.7e-05, 17), (1e-06, 1), (0.0, 0), (1.0, 1_000_000), (1, 1_000_000)]
)
def test_a_share_is_read_however_small_it_is(share: float, ppm: int) -> None:
    assert share_ppm(share) == ppm


# --- files from strangers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "format = 1\nname = " + "[" * 100_000,
        'format = 1\nname = "x"\nx = ' + "{a=" * 600 + "1" + "}" * 600,
        "format = 2\nname = 'x'",
        "format = true\nname = 'x'",
        "name = 'x'",
        "format = 1",
        "format = 1\nname = 1979-05-27",
        "format = 1\nname = 'x'\nseed = 99999999999999999999999999",
        "format = 1\nname = 'x'\nlinks = [{between = ['a']}]",
        "format = 1\nname = 'x'\nnetworks = 3",
        "format = 1\nname = 'x'\nnetworks = [3]",
        "format = 1\nname = 'x'\nduration = '1e99999s'",
        "format = 1\nname = 'x'\nduration = '400d'",
        "\x00",
        "",
    ],
)
def test_whatever_a_file_says_the_answer_is_one_error(text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize("value", ["nan", "inf", "1979-05-27", "07:32:00"])
def test_numbers_and_dates_that_cannot_be_worked_with_are_refused(value: str) -> None:
    text = (
        SOUND.replace("conditions", "") + f"[[faults]]\nat = '1s'\nkind = 'crash'\nshare = {value}"
    )
    assert any(each.startswith("faults[0].share: ") for each in problems(text))


def test_bytes_that_are_no_text_and_files_that_are_too_large_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ScenarioError, match="is no text in UTF-8"):
        load(file)
    file.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ScenarioError, match="is larger than 16 MiB"):
        load(file)
    with pytest.raises(ScenarioError, match="No such file"):
        load(tmp_path / "absent.toml")


def test_lists_have_limits() -> None:
    rows = "{name='n'}," * (MAX_NETWORKS + 1)
    assert problems(f"format = 1\nname = 'x'\nnetworks = [{rows}]") == [
        f"networks: has {MAX_NETWORKS + 1} entries; at most {MAX_NETWORKS} are taken"
    ]


def test_what_a_message_repeats_steers_no_terminal() -> None:
    with pytest.raises(ScenarioError) as raised:
        loads('format = 1\nname = "x"\nseed = "\\u001b[2J"\n"\\u001b[31m" = 1')
    assert "\x1b" not in str(raised.value)


def test_a_scenario_that_was_made_is_held_to_the_same_rules() -> None:
    sound = loads(SOUND)
    assert checked(sound) == sound
    broken = attrs.evolve(sound, gateways=())
    assert checked(broken) == broken  # a site may have no gateway
    with pytest.raises(ScenarioError, match="there is no user named 'grace'"):
        checked(attrs.evolve(sound, account=attrs.evolve(sound.account, users=())))
