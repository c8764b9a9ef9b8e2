"""The benchmark of the relay measures what it says: a short round, with the relay's real process
and coturn's, in namespaces. Which figures come out is no matter here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from benchmarks.relay import QUICK as QUICK_AMOUNTS
from benchmarks.relay import Bench, Chosen
from benchmarks.relay_load import Generator, GeneratorError
from benchmarks.relay_results import KEYS, Figures, summary
from benchmarks.relay_world import World, WorldError, coturn, flows, holloway, thin
from simulations.kernel.lab import PREFIX, Lab

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
SHORT = attrs.evolve(
    QUICK_AMOUNTS, rounds=1, measure_s=0.05, paced_s=0.1, bulk_windows=(90,), round_trips=50,
    allocations=200,
)  # fmt: skip
CHOSEN = Chosen(amounts=SHORT, relay_cores="0", generator_core=0, processes=1)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab() as lab:
        yield World.build(lab, CHOSEN.relay_cores)


@pytest.fixture(scope="module")
def generator(world: World) -> Generator:
    return Generator.compile(world.lab.directory, CHOSEN.generator_core)


@pytest.fixture(scope="module")
def taken(world: World, generator: Generator) -> dict[str, list[Figures]]:
    bench = Bench(world, generator, CHOSEN)
    return {
        "generator alone": [bench.alone()],
        "coturn": [bench.of(coturn(0))],
        "holloway": [bench.of(holloway("holloway"))],
    }


def test_every_figure_of_both_relays_is_measured(taken: dict[str, list[Figures]]) -> None:
    ours, theirs = taken["holloway"][0], taken["coturn"][0]
    assert set(ours) >= {
        f"{case} {way} {figure}"
        for case in ("thin 172", "thin 1400", "bulk 1400")
        for way in ("to peer", "to client")
        for figure in ("per_s", "loss", "cpu_us", "core")
    }
    assert all(ours[f"{case} per_s"] > 0 for case in ("thin 172 to peer", "bulk 1400 to client"))
    assert ours["allocations per_cpu_s"] > 0
    assert {name for name in ours if "generator_us" not in name} == {
        name for name in theirs if "generator_us" not in name
    }


def test_the_last_line_has_a_value_for_each_key_but_those_of_xdp(
    taken: dict[str, list[Figures]],
) -> None:
    figures = summary(taken, {"holloway": "python"})
    assert all(figures[key] is not None for key in KEYS if not key.startswith("xdp_"))
    assert figures["absolute"]["coturn"]["thin_172_to_peer_per_s"] > 0


def test_a_ratio_is_null_where_a_peer_was_not_measured(taken: dict[str, list[Figures]]) -> None:
    figures = summary({name: rounds for name, rounds in taken.items() if name != "coturn"}, {})
    assert figures["latency_added_us"] is not None
    for key in KEYS:
        if key.endswith("_vs_coturn") or key == "coturn_latency_added_us":
            assert figures[key] is None, key


def test_a_packet_that_does_not_arrive_as_it_should_is_no_figure(
    world: World, generator: Generator
) -> None:
    with (
        holloway("holloway").running(world),
        flows(world, 2) as made,
        thin(world, made, 172, True) as ends,
        pytest.raises(GeneratorError, match="wrong size"),
    ):
        generator.load(attrs.evolve(ends, arriving_bytes=100), measure_s=0.05, window=8)


def test_run_as_a_user_would_it_ends_with_one_object_and_leaves_no_namespace() -> None:
    run = f"bench{os.getpid()}"
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.relay", "--quick", "--json", "--rounds", "1",
            "--relay", "holloway", "--case", "latency", "--run", run,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    figures: dict[str, Any] = json.loads(line)
    assert set(figures) >= set(KEYS)
    assert figures["latency_added_us"] is not None
    assert figures["thin_172_vs_coturn"] is None
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert f"{PREFIX}{run}-" not in listed.stdout


def test_a_relay_that_does_not_start_is_named_with_its_own_words(world: World) -> None:
    with (
        pytest.raises(WorldError, match=r"(?s)holloway does not serve.*no-such-setting"),
        holloway("holloway", "--no-such-setting").running(world),
    ):
        pass


def test_the_core_alone_is_measured_without_root_or_network() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.relay", "--quick", "--core-only"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert all(value > 0 for value in json.loads(done.stdout).values())
