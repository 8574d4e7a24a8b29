"""A condition of a task: its text, its SQL, its Python, and how it is drawn.

A condition speaks of a column of the target row itself, of a row above it, or
of how many rows below it have a property.
"""

import dataclasses
import random
from typing import Any

from dsv32_jax.agents.environments import read_only
from dsv32_jax.agents.synthesis.general import database
from dsv32_jax.agents.synthesis.general import schema

quote = read_only.quote

WORDINGS = {
  "ge": ("{label} at least {value}", "{label} not below {value}"),
  "le": ("{label} at most {value}", "{label} not above {value}"),
  "eq": ("{label} equal to {value}", "{label} given as {value}"),
  "ne": ("{label} other than {value}", "{label} anything but {value}"),
  "from": ("{label} on or after {value}", "{label} no earlier than {value}"),
  "until": ("{label} on or before {value}", "{label} no later than {value}"),
}
SYMBOLS = {
  "ge": ">=",
  "le": "<=",
  "eq": "==",
  "ne": "!=",
  "from": ">=",
  "until": "<=",
}
_HOLDS = {
  ">=": lambda a, b: a >= b,
  "<=": lambda a, b: a <= b,
  "==": lambda a, b: a == b,
  "!=": lambda a, b: a != b,
}


class Data:
  """Rows with the tree between them, for drawing tasks.

  Attributes:
    domain: whose rows.
    rows: by table.
  """

  def __init__(self, domain: schema.Domain, rows: database.Rows):
    self.domain = domain
    self.rows = rows
    self._by_name = {
      table.name: {row["name"]: row for row in rows[table.name]}
      for table in domain.tables
    }
    self._below: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for table in domain.tables:
      for row in rows[table.name] if table.parent else ():
        key = (table.name, row[table.parent])
        self._below.setdefault(key, []).append(row)

  def above(self, target: str, row: dict[str, Any], table: str):
    """Returns the row of `table` that lies over a row of `target`."""
    for step in reversed(self.domain.chain(target)):
      if step.name == table:
        return row
      row = self._by_name[step.parent][row[step.parent]]
    raise KeyError(table)

  def below(self, row: dict[str, Any], child: str) -> list[dict[str, Any]]:
    return self._below.get((child, row["name"]), [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
  """One condition on a target row.

  Attributes:
    scope: "own", "above" or "below".
    table: of the column; for "own" the target's.
    column: that is compared.
    op: key of SYMBOLS.
    value: compared with.
    wording: which of the op's wordings the text takes.
    least: for "below", how many rows must have the property.
  """

  scope: str
  table: str
  column: str
  op: str
  value: Any
  wording: int = 0
  least: int = 1

  def compares(self, row: dict[str, Any]) -> bool:
    return _HOLDS[SYMBOLS[self.op]](row[self.column], self.value)

  def holds(self, data: Data, target: str, row: dict[str, Any]) -> bool:
    if self.scope == "below":
      below = data.below(row, self.table)
      return sum(map(self.compares, below)) >= self.least
    return self.compares(data.above(target, row, self.table))

  def text(self, domain: schema.Domain) -> str:
    table = domain.table(self.table)
    column = table.column(self.column)
    value = f"{self.value} {column.unit}".strip()
    text = WORDINGS[self.op][self.wording].format(
      label=column.label, value=value
    )
    if self.scope == "above":
      return f"belonging to {schema.article(table.name)} with {text}"
    if self.scope == "below":
      return f"has {self.least} or more {table.plural} with {text}"
    return text

  def sql(self, target: str) -> str:
    op = SYMBOLS[self.op].replace("==", "=")
    test = f"{quote(self.table)}.{quote(self.column)} {op} {self.value!r}"
    if self.scope == "below":
      return (
        f"(SELECT COUNT(*) FROM {quote(self.table)} WHERE"
        f" {quote(self.table)}.{quote(target)} = {quote(target)}.name"
        f" AND {test}) >= {self.least}"
      )
    return test

  def python(self, variable: str) -> str:
    return f'{variable}["{self.column}"] {SYMBOLS[self.op]} {self.value!r}'


def draw(
  data: Data, target: str, row: dict[str, Any], scope: str, rng: random.Random
) -> Condition | None:
  """Draws a condition that holds for a row, or None where there is none."""
  domain = data.domain
  if scope == "own":
    table, seen = domain.table(target), row
  elif scope == "above":
    above = domain.chain(target)[:-1]
    if not above:
      return None
    table = rng.choice(above)
    seen = data.above(target, row, table.name)
  else:
    below = [t for t in domain.children(target) if data.below(row, t.name)]
    if not below:
      return None
    table = rng.choice(below)
    seen = rng.choice(data.below(row, table.name))
  column = rng.choice(table.columns)
  op, value = _around(column, seen[column.name], data.rows[table.name], rng)
  condition = Condition(
    scope=scope,
    table=table.name,
    column=column.name,
    op=op,
    value=value,
    wording=rng.randrange(2),
  )
  if scope != "below":
    return condition
  least = sum(map(condition.compares, data.below(row, table.name)))
  return dataclasses.replace(condition, least=rng.randint(1, min(least, 3)))


def _around(column, value, rows, rng):
  """Returns an op and a value on this side of it that `value` fulfils."""
  if column.kind == "choice":
    if len(column.choices) > 2 and rng.random() < 0.3:
      return "ne", rng.choice([c for c in column.choices if c != value])
    return "eq", value
  upward = rng.random() < 0.5
  values = sorted({row[column.name] for row in rows})
  place = values.index(value)
  reach = max(1, len(values) // 3)
  near = (
    values[max(0, place - reach) : place + 1]
    if upward
    else values[place : place + reach + 1]
  )
  ops = ("from", "until") if column.kind == "date" else ("ge", "le")
  return ops[0 if upward else 1], rng.choice(near)
