"""What a synthesised tool is, the templates of tools, and how one runs.

A tool is data: a schema for the policy, and the SQL that answers it. So it is
stored with its environment and runs without any generated code.
"""

from collections.abc import Mapping
import dataclasses
import math
import sqlite3
from typing import Any

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import read_only
from dsv32_jax.agents.synthesis.general import schema

PAGE_SIZE = 5
quote = read_only.quote


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolSpec:
  """A tool of a database.

  Attributes:
    name: of the tool.
    description: for the policy.
    parameters: JSON schema of the arguments, all of them required.
    sql: with named parameters :argument.
    shape: what becomes of the rows, by its "kind".
    exists: (argument, table): names that must be in the table.
  """

  name: str
  description: str
  parameters: Mapping[str, Any]
  sql: str
  shape: Mapping[str, Any]
  exists: tuple[tuple[str, str], ...] = ()

  def dump(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def load(cls, record: Mapping[str, Any]) -> "ToolSpec":
    exists = tuple((argument, table) for argument, table in record["exists"])
    return cls(**{**record, "exists": exists})


def execute(
  spec: ToolSpec, arguments: Mapping[str, Any], connection: sqlite3.Connection
) -> Any:
  """Runs a tool whose arguments fit its schema.

  Raises:
    tools.ToolError: if it names something that is not there.
  """
  for argument, table in spec.exists:
    found = connection.execute(
      f"SELECT 1 FROM {quote(table)} WHERE name = ?", (arguments[argument],)
    ).fetchone()
    if found is None:
      raise tools.ToolError(f"no {table} is called {arguments[argument]!r}")
  # SQLite takes no lists: keywords choose among the columns afterwards.
  bound = {k: v for k, v in arguments.items() if not isinstance(v, list)}
  rows = connection.execute(spec.sql, bound).fetchall()
  return _SHAPES[spec.shape["kind"]](rows, spec.shape, arguments)


def list_all(table: schema.Table) -> ToolSpec:
  """Every name, of one parent where the table has one."""
  where, properties, exists = _within(table)
  suffix = f"_by_{table.parent}" if table.parent else ""
  return ToolSpec(
    name=f"get_all_{table.plural}{suffix}",
    description=f"Lists every {table.name}{_of(table)}.",
    parameters=_object(properties),
    sql=f"SELECT name FROM {quote(table.name)}{where} ORDER BY rowid",
    shape={"kind": "names"},
    exists=exists,
  )


def list_pages(table: schema.Table) -> ToolSpec:
  """Names in pages."""
  where, properties, exists = _within(table)
  return ToolSpec(
    name=f"list_{table.plural}",
    description=(
      f"Lists every {table.name}{_of(table)}, {PAGE_SIZE} a page, and tells"
      " the number of pages."
    ),
    parameters=_object(
      properties | {"page": {"type": "integer", "minimum": 1, "maximum": 999}}
    ),
    sql=f"SELECT name FROM {quote(table.name)}{where} ORDER BY rowid",
    shape={"kind": "page", "size": PAGE_SIZE},
    exists=exists,
  )


def search_column(table: schema.Table) -> schema.Column | None:
  """Returns the column that a search asks for."""
  choices = [column for column in table.columns if column.kind == "choice"]
  return choices[0] if choices else None


def search(table: schema.Table) -> ToolSpec:
  """Names with one value of a column of choices."""
  column = search_column(table)
  _, properties, exists = _within(table)
  parent = f" AND {quote(table.parent)} = :{table.parent}"
  return ToolSpec(
    name=f"search_{table.plural}",
    description=f"Lists every {table.name}{_of(table)} by {column.label}.",
    parameters=_object(
      properties
      | {column.name: {"type": "string", "enum": list(column.choices)}}
    ),
    sql=(
      f"SELECT name FROM {quote(table.name)} WHERE {quote(column.name)} ="
      f" :{column.name}{parent} ORDER BY rowid"
    ),
    shape={"kind": "names"},
    exists=exists,
  )


def infos(table: schema.Table) -> list[ToolSpec]:
  """The columns that keywords name."""
  names = [column.name for column in table.columns]
  keywords = {
    "type": "array",
    "items": {"type": "string", "enum": names},
    "minItems": 1,
  }
  return [
    ToolSpec(
      name=f"get_infos_by_{table.name}",
      description=f"Tells what the keywords ask about one {table.name}.",
      parameters=_object(
        {"info_keywords": keywords, table.name: {"type": "string"}}
      ),
      sql=_row(table, names),
      shape={"kind": "keywords", "columns": names},
      exists=((table.name, table.name),),
    )
  ]


def describe(table: schema.Table) -> list[ToolSpec]:
  """All columns, the parent among them."""
  names = [column.name for column in table.columns]
  if table.parent is not None:
    names.insert(0, table.parent)
  return [
    ToolSpec(
      name=f"describe_{table.name}",
      description=f"Tells {', '.join(names)} about one {table.name}.",
      parameters=_object({table.name: {"type": "string"}}),
      sql=_row(table, names),
      shape={"kind": "row", "columns": names},
      exists=((table.name, table.name),),
    )
  ]


def single(table: schema.Table) -> list[ToolSpec]:
  """One tool a column."""
  return [
    ToolSpec(
      name=f"get_{column.name}_of_{table.name}",
      description=f"Tells {column.name} about one {table.name}.",
      parameters=_object({table.name: {"type": "string"}}),
      sql=_row(table, [column.name]),
      shape={"kind": "value", "column": column.name},
      exists=((table.name, table.name),),
    )
    for column in table.columns
  ]


def parent_of(table: schema.Table) -> ToolSpec:
  """The way up."""
  return ToolSpec(
    name=f"get_{table.parent}_by_{table.name}",
    description=f"Tells which {table.parent} a {table.name} belongs to.",
    parameters=_object({table.name: {"type": "string"}}),
    sql=_row(table, [table.parent]),
    shape={"kind": "value"},
    exists=((table.name, table.name),),
  )


def count(table: schema.Table) -> ToolSpec:
  """How many rows a parent has."""
  where, properties, exists = _within(table)
  return ToolSpec(
    name=f"count_{table.plural}_by_{table.parent}",
    description=f"Counts the {table.plural} of one {table.parent}.",
    parameters=_object(properties),
    sql=f"SELECT COUNT(*) FROM {quote(table.name)}{where}",
    shape={"kind": "value"},
    exists=exists,
  )


def grid(source: schema.Grid) -> ToolSpec:
  """A look-up in a table over combinations."""
  names = [column.name for column in source.columns]
  conditions = " AND ".join(f"{quote(c)} = :{c}" for c, _ in source.axes)
  return ToolSpec(
    name=source.tool,
    description=source.description,
    parameters=_object(
      {column: {"type": "string"} for column, _ in source.axes}
    ),
    sql=(
      f"SELECT {', '.join(map(quote, names))} FROM {quote(source.name)}"
      f" WHERE {conditions}"
    ),
    shape={"kind": "row", "columns": names},
    exists=tuple((c, table) for c, table in source.axes if table != "date"),
  )


def _object(properties):
  return {
    "type": "object",
    "properties": properties,
    "required": list(properties),
    "additionalProperties": False,
  }


SUBMIT = ToolSpec(
  name="submit_result",
  description="Submits the final answer as JSON text and ends the task.",
  parameters=_object({"answer_text": {"type": "string"}}),
  sql="SELECT 1",
  shape={"kind": "value"},
)
LISTERS = {"all": list_all, "pages": list_pages, "search": search}
INFORMERS = {"infos": infos, "describe": describe, "single": single}


def _within(table):
  """Condition, parameters and checks of what lies under one parent."""
  if table.parent is None:
    return "", {}, ()
  return (
    f" WHERE {quote(table.parent)} = :{table.parent}",
    {table.parent: {"type": "string"}},
    ((table.parent, table.parent),),
  )


def _of(table):
  return f" of one {table.parent}" if table.parent else ""


def _row(table, columns):
  return (
    f"SELECT {', '.join(map(quote, columns))} FROM {quote(table.name)}"
    f" WHERE name = :{table.name}"
  )


def _shape_names(rows, shape, arguments):
  return [row[0] for row in rows]


def _shape_page(rows, shape, arguments):
  size, page = shape["size"], int(arguments["page"])
  names = [row[0] for row in rows[size * (page - 1) : size * page]]
  return {"names": names, "pages": math.ceil(len(rows) / size)}


def _shape_row(rows, shape, arguments):
  if not rows:
    raise tools.ToolError("nothing is known about this combination")
  return dict(zip(shape["columns"], rows[0]))


def _shape_keywords(rows, shape, arguments):
  row = dict(zip(shape["columns"], rows[0]))
  return {keyword: row[keyword] for keyword in arguments["info_keywords"]}


def _shape_value(rows, shape, arguments):
  return rows[0][0]


_SHAPES = {
  "names": _shape_names,
  "page": _shape_page,
  "row": _shape_row,
  "keywords": _shape_keywords,
  "value": _shape_value,
}
