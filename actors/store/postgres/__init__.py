"""The store on PostgreSQL (16 or newer), with native trio waiting. See docs/database.md."""

from actors.store.postgres.connection import Logins
from actors.store.postgres.migrate import MigrationError, migrate
from actors.store.postgres.store import PostgresStore

__all__ = ["Logins", "MigrationError", "PostgresStore", "migrate"]
