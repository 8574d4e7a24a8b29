"""A database in memory that is made of rows and then only read.

Of the standard library alone: it is also part of a program that runs inside a
sandbox, see `written_tools`.
"""

from collections.abc import Mapping, Sequence
import sqlite3
from typing import Any

_READING = {
  sqlite3.SQLITE_SELECT,
  sqlite3.SQLITE_READ,
  sqlite3.SQLITE_FUNCTION,
  sqlite3.SQLITE_RECURSIVE,
}
_TYPES = {int: "INTEGER", float: "REAL", str: "TEXT"}


def connect(
  rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> sqlite3.Connection:
  """Makes the database; whatever but a query is refused from then on.

  Args:
    rows: by table, one at least of each; values are numbers and text.
  """
  connection = sqlite3.connect(
    ":memory:", check_same_thread=False, isolation_level=None
  )
  connection.execute("BEGIN")
  for table, records in rows.items():
    columns = list(records[0])
    declared = ", ".join(
      f"{quote(c)} {_TYPES[type(records[0][c])]} NOT NULL" for c in columns
    )
    names = {record.get("name") for record in records}
    is_key = "name" in columns and len(names) == len(records)
    key = f", PRIMARY KEY ({quote('name')})" if is_key else ""
    connection.execute(f"CREATE TABLE {quote(table)} ({declared}{key})")
    marks = ", ".join("?" * len(columns))
    connection.executemany(
      f"INSERT INTO {quote(table)} VALUES ({marks})",
      [tuple(record.values()) for record in records],
    )
  connection.execute("COMMIT")
  connection.execute("PRAGMA query_only = ON")
  # Attaching a file, or a pragma that undoes the line above, is no query.
  connection.set_authorizer(_allow)
  return connection


def quote(name: str) -> str:
  """Quotes an identifier for SQL."""
  doubled = name.replace('"', '""')
  return f'"{doubled}"'


def _allow(action, *told):
  del told
  return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY
