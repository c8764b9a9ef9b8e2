"""What all tests share: hypothesis without deadlines (timings never decide a test), and one clear
sentence instead of many failures where the machine lacks what the system tests need."""

from __future__ import annotations

import os

import hypothesis
import pytest

from runtime.guard import surface_failures
from simulations.kernel import missing_requirements

surface_failures()  # what a process would log and survive fails a test

hypothesis.settings.register_profile("holloway", deadline=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "holloway"))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not any(item.get_closest_marker("system") for item in session.items):
        return
    if missing := missing_requirements():
        pytest.exit("the system tests cannot run here: " + "; ".join(missing), returncode=2)
