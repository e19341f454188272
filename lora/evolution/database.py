"""A SQLite file in which a change is a transaction, for any number of threads and processes."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from lora.errors import StoreError

PATIENCE = 30.0
"""Seconds to wait for another's transaction."""


@contextmanager
def transaction(path: Path, expected: str) -> Iterator[sqlite3.Connection]:
    """Run the block as one transaction, which an error or a kill undoes.

    Raises:
        StoreError: SQLite can't read or write the file; `expected` says what it should be.
    """
    try:
        with closing(sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
    except sqlite3.Error as error:
        raise StoreError(str(path), expected, error) from error
