"""Fixtures for tests that need a PostgreSQL. See `tests.system.postgres_support`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from actors.store.embedded import EmbeddedPostgres
from actors.store.postgres import Logins
from tests.system.postgres_support import PostgresThread, fresh_database, own_directory


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """An embedded PostgreSQL that all tests of the session share: do not kill it."""
    with own_directory("shared") as directory, PostgresThread(directory) as running:
        yield running


@pytest.fixture
def database(postgres: EmbeddedPostgres) -> Iterator[Logins]:
    """An empty database of this test alone, for `PostgresStore.open(..., migrated=True)`."""
    with fresh_database(postgres) as logins:
        yield logins
