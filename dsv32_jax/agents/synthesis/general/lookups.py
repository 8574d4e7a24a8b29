"""Environments small enough for a tiny model: a question, one or two look-ups.

Two tables of a domain, a few rows and columns of each, and the tools that tell
one column, the parent or the number of children. Data, tools, solution and
verifier are made of the same parts as those of the whole synthesis.
"""

import dataclasses
import random
from typing import Any

from dsv32_jax.agents.environments import read_only
from dsv32_jax.agents.synthesis.general import database
from dsv32_jax.agents.synthesis.general import domains
from dsv32_jax.agents.synthesis.general import schema
from dsv32_jax.agents.synthesis.general import tasks
from dsv32_jax.agents.synthesis.general import toolset as toolset_lib

KINDS = ("own", "parent", "count", "above")
_PARENTS, _CHILDREN = (2, 3), (1, 3)
_OWN_COLUMNS, _PARENT_COLUMNS = 2, 1
# Of words that are made up.
_CONSONANTS = (*"bcdfghjklmnprstvwz", "ch", "sh", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u", "an", "er", "in", "or")
quote = read_only.quote

# A domain with a fixed toolset has too many tools.
DOMAINS = {one.name: one for one in domains.DOMAINS if not one.fixed}


def draw(
  domain_name: str, rng: random.Random, renamed: bool = False
) -> dict[str, Any]:
  """Draws an environment's record with one task.

  Args:
    domain_name: a key of DOMAINS.
    rng: source of choices.
    renamed: whether words made up for this environment alone stand in the place
      of the domain's, in tools and data.

  Returns:
    A record that `general.GeneralEnvironment` takes, as of the pipeline.
  """
  domain = _variant(DOMAINS[domain_name], rng)
  if renamed:
    domain = _renamed(domain, rng)
  rows = database.draw_rows(domain, rng)
  child = domain.tables[1]
  toolset = toolset_lib.Toolset(
    domain=domain,
    styles={table.name: ("all", "single") for table in domain.tables},
    parts={
      ("parent", child.name),
      ("count", child.name),
      *(("info", table.name) for table in domain.tables),
    },
  )
  task = _task(domain, rows, rng)
  fingerprint = database.fingerprint(rows)
  return {
    "id": fingerprint,
    "domain": domain_name,
    "fingerprint": fingerprint,
    "rows": rows,
    "tools": [spec.dump() for spec in toolset.specs()],
    "tasks": [{"id": f"{fingerprint}-0", **dataclasses.asdict(task)}],
  }


def _variant(domain: schema.Domain, rng: random.Random) -> schema.Domain:
  """The root table, one of its children, and few columns of both."""
  root = domain.tables[0]
  child = rng.choice(domain.children(root.name))

  def small(table, count, rows):
    columns = tuple(rng.sample(list(table.columns), count))
    return dataclasses.replace(table, columns=columns, rows=rows)

  tables = (
    small(root, _PARENT_COLUMNS, _PARENTS),
    small(child, _OWN_COLUMNS, _CHILDREN),
  )
  return dataclasses.replace(domain, tables=tables, grids=())


def _renamed(domain: schema.Domain, rng: random.Random) -> schema.Domain:
  """Another word for every table, column, choice and name of a row."""
  taken: set[str] = set()

  def word():
    while True:
      syllables = rng.choices(_CONSONANTS, k=rng.randint(2, 3))
      found = "".join(a + rng.choice(_VOWELS) for a in syllables)
      if found not in taken:
        taken.add(found)
        return found

  def column(one):
    choices = tuple(word() for _ in one.choices)
    return dataclasses.replace(one, name=word(), unit="", choices=choices)

  names = {table.name: word() for table in domain.tables}
  tables = tuple(
    dataclasses.replace(
      table,
      name=names[table.name],
      plural=f"{names[table.name]}s",
      parent=table.parent and names[table.parent],
      pattern="{0} {1}",
      words=tuple([word().title() for _ in range(4)] for _ in range(2)),
      columns=tuple(map(column, table.columns)),
    )
    for table in domain.tables
  )
  return dataclasses.replace(domain, tables=tables)


def _task(domain, rows, rng) -> tasks.Draft:
  root, child = domain.tables
  kind = rng.choice(KINDS)
  row = rng.choice(rows[root.name if kind == "count" else child.name])
  name = row["name"]
  above = f"get_{root.name}_by_{child.name}({child.name}={name!r})"
  if kind == "own":
    column = rng.choice(child.columns)
    ask = f"the {column.label} of the {child.name} {name}"
    answer = row[column.name]
    call = f"get_{column.name}_of_{child.name}({child.name}={name!r})"
    sql = _select(column.name, child.name)
  elif kind == "parent":
    ask = f"the {root.name} of the {child.name} {name}"
    answer, call = row[root.name], above
    sql = _select(root.name, child.name)
  elif kind == "count":
    ask = f"the number of {child.plural} of the {root.name} {name}"
    answer = sum(one[root.name] == name for one in rows[child.name])
    call = f"count_{child.plural}_by_{root.name}({root.name}={name!r})"
    sql = (
      f"SELECT COUNT(*) FROM {quote(child.name)} WHERE {quote(root.name)} = ?"
    )
  else:
    (column,) = root.columns
    ask = f"the {column.label} of the {root.name} of the {child.name} {name}"
    parent = next(r for r in rows[root.name] if r["name"] == row[root.name])
    answer = parent[column.name]
    call = f"get_{column.name}_of_{root.name}({root.name}={above})"
    inner = _select(root.name, child.name)
    sql = f"SELECT {quote(column.name)} FROM {quote(root.name)}"
    sql += f" WHERE name = ({inner})"
  return tasks.Draft(
    kind=f"lookup_{kind}",
    statement=f"Tell {ask}.",
    answer_schema=tasks.object_schema({"answer": _schema(answer)}),
    solution=f'def solve():\n  return {{"answer": {call}}}\n',
    verifier=(
      f"def verify(answer):\n  rows = query({sql!r}, {name!r})\n"
      '  return rows[0][0] == answer["answer"]\n'
    ),
    wrong_answers=(),
  )


def _select(column: str, table: str) -> str:
  return f"SELECT {quote(column)} FROM {quote(table)} WHERE name = ?"


def _schema(answer: Any) -> dict[str, str]:
  names = {str: "string", int: "integer", float: "number"}
  return {"type": names[type(answer)]}
