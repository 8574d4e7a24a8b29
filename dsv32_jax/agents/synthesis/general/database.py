"""Rows of a domain, drawn from a seed."""

import datetime
import hashlib
import itertools
import json
import random
from typing import Any

from dsv32_jax.agents.synthesis.general import schema

Rows = dict[str, list[dict[str, Any]]]
NUM_DAYS = 3


def draw_variant(domain: schema.Domain, rng: random.Random) -> schema.Domain:
  """Leaves out optional columns, and a table at the leaves now and then."""
  if domain.fixed:
    return domain
  tables = [
    schema.Table(
      **vars(table)
      | {
        "columns": tuple(
          column
          for column in table.columns
          if not column.optional or rng.random() < 0.6
        )
      }
    )
    for table in domain.tables
  ]
  leaves = [
    table.name
    for table in tables
    if table.parent is not None and not domain.children(table.name)
  ]
  if len(leaves) > 1 and rng.random() < 0.3:
    dropped = rng.choice(leaves)
    tables = [table for table in tables if table.name != dropped]
  return schema.Domain(**vars(domain) | {"tables": tuple(tables)})


def draw_rows(domain: schema.Domain, rng: random.Random) -> Rows:
  """Draws every table's rows."""
  rows: Rows = {}
  for table in domain.tables:
    taken: set[str] = set()
    above = [None] if table.parent is None else rows[table.parent]
    rows[table.name] = [
      _draw_row(domain, table, parent, taken, rng)
      for parent in above
      for _ in range(rng.randint(*table.rows))
    ]
  for grid in domain.grids:
    axes = [_axis(domain, rows, source) for _, source in grid.axes]
    rows[grid.name] = []
    for values in itertools.product(*axes):
      if len(set(values)) < len(values):
        continue
      row = {column: value for (column, _), value in zip(grid.axes, values)}
      for column in grid.columns:
        row[column.name] = draw_value(column, domain, 0.5, rng)
      rows[grid.name].append(row | grid.derive(row))
  return rows


def draw_value(
  column: schema.Column,
  domain: schema.Domain,
  quality: float,
  rng: random.Random,
):
  """Draws a value; the hidden quality is 0 to 1."""
  if column.kind == "choice":
    weights = [1 / (2 + place) for place in range(len(column.choices))]
    return rng.choices(column.choices, weights)[0]
  weight = abs(column.grade)
  toward = quality if column.grade >= 0 else 1 - quality
  share = weight * toward + (1 - weight) * rng.random()
  steps = round((column.high - column.low) / column.step * share)
  value = column.low + column.step * steps
  if column.kind == "date":
    return _day(domain, int(value))
  return int(value) if float(column.step).is_integer() else round(value, 1)


def fingerprint(rows: Rows) -> str:
  """Returns a digest that equal data share."""
  text = json.dumps(rows, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:24]


def _draw_row(domain, table, parent, taken, rng):
  for _ in range(1000):
    words = [rng.choice(words) for words in table.words]
    name = table.pattern.format(*words, parent=parent and parent["name"])
    if name not in taken:
      break
  assert name not in taken, f"{table.name} of {domain.name} has too few names"
  taken.add(name)
  row = {"name": name}
  if parent is not None:
    row[table.parent] = parent["name"]
  quality = rng.random()
  for column in table.columns:
    row[column.name] = draw_value(column, domain, quality, rng)
  return row | table.known.get(name, {})


def _axis(domain, rows, source):
  if source == "date":
    return [_day(domain, day) for day in range(NUM_DAYS)]
  return [row["name"] for row in rows[source]]


def _day(domain, days):
  first = datetime.date.fromisoformat(domain.first_day)
  return (first + datetime.timedelta(days=days)).isoformat()
