"""Data that a model put into an SQLite file, read where it lies.

The file is opened inside the sandbox alone; what leaves it is text, and is
checked here as what a model wrote.
"""

import io
import re
import shlex
import tarfile
from typing import Any

from dsv32_jax.agents import tools

MAX_TABLES, MAX_ROWS, MAX_COLUMNS, MAX_CHARACTERS = 20, 5000, 40, 4 << 20
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,60}")
_DUMP = """import json, sqlite3, sys
connection = sqlite3.connect("file:" + sys.argv[1] + "?mode=ro", uri=True)
names = [row[0] for row in connection.execute(
  "SELECT name FROM sqlite_master WHERE type = 'table'"
  " AND name NOT LIKE 'sqlite_%' ORDER BY name")]
connection.row_factory = sqlite3.Row
print(json.dumps({name: [dict(row) for row in connection.execute(
  'SELECT * FROM "' + name.replace('"', '""') + '"')] for name in names}))
"""


def _empty_tree() -> bytes:
  file = io.BytesIO()
  tarfile.open(fileobj=file, mode="w").close()
  return file.getvalue()


# Image of a workspace that holds nothing.
EMPTY_TREE = _empty_tree()


def command(path: str) -> str:
  """Returns the command line that prints a database as `check` reads it."""
  return f"python3 -I -c {shlex.quote(_DUMP)} {shlex.quote(path)}"


def check(text: str) -> dict[str, list[dict[str, Any]]]:
  """Returns the rows by table.

  Raises:
    tools.ToolError: there are too many, none, or values other than numbers
      and text, of one type a column.
  """
  tables = tools.strict_json(text)
  if not isinstance(tables, dict) or not 0 < len(tables) <= MAX_TABLES:
    raise tools.ToolError(f"the database must have 1 to {MAX_TABLES} tables")
  for table, rows in tables.items():
    _check_table(table, rows)
  if sum(map(len, tables.values())) > MAX_ROWS:
    raise tools.ToolError(f"the database has more than {MAX_ROWS} rows")
  return tables


def _check_table(table, rows):
  if not isinstance(rows, list) or not rows:
    raise tools.ToolError(f"the table {table!r:.80} has no rows")
  if not 0 < len(rows[0]) <= MAX_COLUMNS:
    raise tools.ToolError(f"the table {table!r:.80} has too many columns")
  for name in (table, *rows[0]):
    if not _NAME.fullmatch(name):
      raise tools.ToolError(f"{name!r:.80} is no name of a table or column")
  types = {column: type(value) for column, value in rows[0].items()}
  for row in rows:
    if {column: type(value) for column, value in row.items()} != types or not (
      set(types.values()) <= {int, float, str}
    ):
      raise tools.ToolError(
        f"the table {table!r:.80} holds other than numbers and text, or not of"
        " one type a column"
      )
