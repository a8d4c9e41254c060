"""The databases the archive's contract holds for, each behind the same handle: its URL, and what only a test may do to it."""

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from uuid import uuid4

from tests.postgresql import PostgreSQL


class Database(ABC):
    """An empty database."""

    url: str

    @abstractmethod
    def sql(self, statement: str) -> None:
        """Run one statement behind the archive's back."""


class SqliteFile(Database):
    """A file in a directory that does not exist yet."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "new" / "deep" / "audit.sqlite3"
        self.url = f"sqlite+aiosqlite:///{self.path}"

    def sql(self, statement: str) -> None:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(statement)


class PostgresqlDatabase(Database):
    """A database of its own on the session's server."""

    def __init__(self, server: PostgreSQL, name: str) -> None:
        self._server, self._name = server, name
        self.url = server.url(name)

    def sql(self, statement: str) -> None:
        self._server.sql(statement, self._name)


@contextmanager
def postgresql_database(server: PostgreSQL) -> Iterator[PostgresqlDatabase]:
    """An empty database for the duration of a block."""
    name = f"at_{uuid4().hex[:12]}"
    with server.database(name):
        yield PostgresqlDatabase(server, name)
