"""docs/simulator.md: its reference is that of the schema, its examples run, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

from simulations import sim_command
from simulations.farm.job import Job, perform
from simulations.report.merged import reasons
from simulations.scenario.load import loads, ready_names
from simulations.scenario.reference import COMMON, NOTES, TABLES, note, renewed

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "simulator.md").read_text()
TOML = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)


def test_the_reference_is_what_the_schema_says() -> None:
    assert renewed(GUIDE) == GUIDE, (
        "run: python -m simulations.scenario.reference docs/simulator.md"
    )


def test_every_field_is_told_of_and_nothing_else() -> None:
    fields = {(owner, field.name) for _, owner in TABLES for field in attrs.fields(owner)}
    assert all(note(*each) for each in fields)
    assert set(NOTES) <= fields
    assert set(COMMON) <= {name for _, name in fields}


def test_the_example_of_a_topology_runs_and_holds() -> None:
    result = perform(Job(scenario=TOML[0], name="the guide"), seed=1)
    assert reasons(result) == ()
    assert len(result.checks) == 2


def test_the_other_examples_are_tables_of_a_file() -> None:
    for text in TOML[1:]:
        loads(TOML[0] + text.replace('heals = "60s"', 'heals = "30s"'))


@pytest.mark.parametrize("line", re.findall(r"^holloway sim (\w+.*)$", GUIDE, re.MULTILINE))
def test_its_commands_and_options_are_there(line: str) -> None:
    command, _, rest = line.partition(" ")
    source = Path(sim_command.__file__).read_text()
    assert f"def {'list_' if command == 'list' else command}(" in source or command == "drill"
    for option in re.findall(r"--([a-z-]+)", rest.partition("#")[0]):
        assert re.search(rf"^    {option.replace('-', '_')}: ", source, re.MULTILINE), option
    name = rest.split()[0] if command == "run" else ""
    assert not name or "." in name or name.isupper() or name in ready_names()


def test_the_ready_made_ones_that_it_names_exist() -> None:
    named = re.findall(r"`([a-z]+(?:-[a-z]+)+)`", GUIDE.partition("## Reference")[0])
    assert {"hotel-udp-blocked", "shrinking-directory"} <= set(named)
    assert set(named) - set(ready_names()) == set()
