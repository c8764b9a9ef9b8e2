"""What all tests share: hypothesis without deadlines (timings never decide a test), one clear
sentence instead of many failures where the machine lacks what the system tests need, and which
files run side by side in `make test`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import hypothesis
import pytest

from runtime.guard import surface_failures
from simulations.kernel.lab import missing_requirements

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

surface_failures()  # what a process would log and survive fails a test

hypothesis.settings.register_profile("holloway", deadline=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "holloway"))

HEAVY: Final = (
    "tests/system/test_portal_cluster.py",
    "tests/system/test_ray_cluster.py",
    "tests/system/test_cluster_command.py",
    "tests/system/test_portal_api_events_cluster.py",
    "tests/system/test_demo.py",
    "tests/system/test_farm_on_ray.py",
    "tests/system/test_kernel_twin.py",
    "tests/system/test_kernel_ipv6.py",
    "tests/system/test_kernel_links.py",
    "tests/system/test_kernel_watch.py",
    "tests/system/test_kernel_faults.py",
    "tests/system/test_kernel_hostile.py",
    "tests/system/test_relay_browser.py",
)
"""Files that start a Ray, a browser, or several installations at once. They come first, and are one
worker's: none of them ever runs beside another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {file: number for number, file in enumerate(HEAVY)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # a worker's exit would be taken for a crash
        require_what_they_need([item.nodeid for item in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: list[str]) -> None:
    require_what_they_need(ids)


def require_what_they_need(ids: list[str]) -> None:
    if not any(id.startswith("tests/system/") for id in ids):
        return
    if missing := missing_requirements():
        pytest.exit("the system tests cannot run here: " + "; ".join(missing), returncode=2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Of files, in the order of collection: a file is one worker's, for the sake of its fixtures,
    and all heavy ones are one worker's together."""
    from xdist.scheduler import LoadScopeScheduling

    class FileScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "heavy" if file in HEAVY else file

    config.option.loadscopereorder = False
    return FileScheduling(config, log)


# --- what was left out, as .ci/run looks for it: pytest-xdist does not pass it on -----------------


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if hasattr(item.config, "workeroutput"):
            item.config.workeroutput.setdefault("deselected", []).append(item.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if node.gateway.id == "gw0":  # all workers leave out the same
        left_out = getattr(node, "workeroutput", {}).get("deselected", [])
        reporter = node.config.pluginmanager.get_plugin("terminalreporter")
        counted = [SimpleNamespace(nodeid=each) for each in left_out]
        reporter.stats.setdefault("deselected", []).extend(counted)
