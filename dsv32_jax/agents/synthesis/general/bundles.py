"""Tasks that choose several rows under a budget: many answers, few of them.

k rows of different parents, each meeting the item conditions, must stay within
a budget, and a conditional rule holds: as soon as one chosen row exceeds a
limit, every chosen row must reach a standard. The budget lies so low that few
of the choices that meet all else keep it.
"""

import dataclasses
import random
from typing import Any

from dsv32_jax.agents.environments import read_only
from dsv32_jax.agents.synthesis.general import conditions as conditions_lib
from dsv32_jax.agents.synthesis.general import queries
from dsv32_jax.agents.synthesis.general import schema
from dsv32_jax.agents.synthesis.general import tasks
from dsv32_jax.agents.synthesis.general import toolset as toolset_lib
from dsv32_jax.agents.synthesis.general import wrong

_TRIES = 60
_SAMPLES = 400
# Share of the random choices that may keep the budget.
_FEASIBLE = 0.02
quote = read_only.quote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
  """A task of choosing rows.

  Attributes:
    target: table whose rows are chosen.
    size: how many.
    conditions: that each must meet.
    measure: column that is added up.
    budget: what the sum may not exceed.
    limit: a row whose measure exceeds it makes the rule apply.
    standard: column that the rule asks of every row.
    required: least value of it.
  """

  target: str
  size: int
  conditions: tuple[conditions_lib.Condition, ...]
  measure: str
  budget: int
  limit: int
  standard: str
  required: float


def draw(
  data: conditions_lib.Data, num_conditions: int, rng: random.Random
) -> Bundle:
  """Draws a bundle that some choice fulfils.

  Raises:
    tasks.Rejection: if none is found.
  """
  for _ in range(_TRIES):
    table = rng.choice([t for t in data.domain.tables if t.parent])
    numbers = [c for c in table.columns if c.kind == "number"]
    whole = [c for c in numbers if float(c.step).is_integer()]
    if len(numbers) < 2 or not whole:
      continue
    measure = rng.choice(whole)
    standard = rng.choice([c for c in numbers if c is not measure])
    conditions = _item_conditions(
      data, table, (measure.name, standard.name), num_conditions, rng
    )
    bundle = _with_budget(
      data, table, conditions, measure.name, standard.name, rng
    )
    if bundle is not None:
      return bundle
  raise tasks.Rejection(f"no bundle of {num_conditions} conditions")


def fulfils(bundle: Bundle, rows: list[dict[str, Any]], parent: str) -> bool:
  """Tells if rows that meet the item conditions keep all else."""
  total = sum(row[bundle.measure] for row in rows)
  dear = any(row[bundle.measure] > bundle.limit for row in rows)
  good = all(row[bundle.standard] >= bundle.required for row in rows)
  parents = {row[parent] for row in rows}
  return (
    len(rows) == len(parents) == bundle.size
    and total <= bundle.budget
    and (good or not dear)
  )


def make(
  data: conditions_lib.Data,
  bundle: Bundle,
  toolset: toolset_lib.Toolset,
  rng: random.Random,
) -> tasks.Draft:
  """Writes the task of a bundle.

  Raises:
    toolset.MissingTool: if its solution needs another tool.
  """
  plural = data.domain.table(bundle.target).plural
  names = {"type": "string"}
  return tasks.Draft(
    kind="bundle",
    statement=_statement(data.domain, bundle),
    answer_schema=tasks.object_schema(
      {plural: {"type": "array", "items": names}, "total": {"type": "integer"}}
    ),
    solution=_solution(data.domain, bundle, toolset),
    verifier=_verifier(data.domain, bundle),
    wrong_answers=_wrong_answers(data, bundle, rng),
  )


def _item_conditions(data, table, taken, number, rng):
  rows, chosen = data.rows[table.name], []
  planted = rng.choice(rows)
  scopes = ["above", "own", "below"]
  for step in range(number * 6):
    if len(chosen) == number:
      break
    scope = scopes[step % 3]
    condition = conditions_lib.draw(data, table.name, planted, scope, rng)
    if condition is None or condition.column in taken:
      continue
    share = sum(condition.holds(data, table.name, row) for row in rows)
    if 0.4 <= share / len(rows) <= 0.9:
      chosen.append(condition)
      taken = (*taken, condition.column)
  return tuple(chosen)


def _with_budget(data, table, conditions, measure, standard, rng):
  """Sets the rule and the budget by sampling choices."""
  rows = [
    row
    for row in data.rows[table.name]
    if all(c.holds(data, table.name, row) for c in conditions)
  ]
  by_parent: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    by_parent.setdefault(row[table.parent], []).append(row)
  size = min(rng.choice((2, 3, 4)), len(by_parent) - 1)
  if size < 2 or len(rows) < 8:
    return None
  values = sorted(row[measure] for row in rows)
  levels = sorted(row[standard] for row in rows)
  bundle = Bundle(
    target=table.name,
    size=size,
    conditions=conditions,
    measure=measure,
    budget=sum(values),
    limit=values[rng.randrange(len(values) // 2)],
    standard=standard,
    required=levels[rng.randrange(len(levels) // 3, len(levels) * 2 // 3)],
  )
  totals = []
  for _ in range(_SAMPLES):
    parents = rng.sample(list(by_parent), size)
    rows_chosen = [rng.choice(by_parent[parent]) for parent in parents]
    if fulfils(bundle, rows_chosen, table.parent):
      totals.append(sum(row[measure] for row in rows_chosen))
  if not totals:
    return None
  totals.sort()
  place = min(int(_FEASIBLE * _SAMPLES), len(totals) - 1)
  least = sum(values[:size])
  if totals[place] <= least:
    return None
  return dataclasses.replace(bundle, budget=totals[place])


def _statement(domain, bundle):
  table = domain.table(bundle.target)
  measure = table.column(bundle.measure).label
  standard = table.column(bundle.standard).label
  listed = "".join(
    f"\n({place}) {condition.text(domain)}"
    for place, condition in enumerate(bundle.conditions, 1)
  )
  each = (
    f" The conditions on {schema.article(table.name)}:{listed}"
    if bundle.conditions
    else ""
  )
  return (
    f"{domain.setting} Choose {bundle.size} {table.plural}, no two of the same"
    f" {table.parent}. Their {measure} must add up to {bundle.budget} at most."
    f" If the {measure} of any of them exceeds {bundle.limit}, then the"
    f" {standard} of every one of them must be at least {bundle.required}."
    f" Tell their names and the total.{each}"
  )


def _solution(domain, bundle, toolset):
  columns = [bundle.measure, bundle.standard]
  lines = queries.gather(
    domain, bundle.target, bundle.conditions, columns, toolset
  )
  measure, plural = bundle.measure, domain.table(bundle.target).plural
  # The cheapest rows without the rule, then those that keep its standard.
  lines += [
    f'  modest = [row for row in found if row["{measure}"] <= {bundle.limit}]',
    f'  good = [row for row in found if row["{bundle.standard}"] >='
    f" {bundle.required}]",
    "  for rows in [modest, good]:",
    "    chosen, parents = [], []",
    f'    for row in sorted(rows, key=lambda row: row["{measure}"]):',
    f'      if len(chosen) < {bundle.size} and row["parent"] not in parents:',
    "        chosen.append(row)",
    '        parents.append(row["parent"])',
    f'    total = sum(row["{measure}"] for row in chosen)',
    f"    if len(chosen) == {bundle.size} and total <= {bundle.budget}:",
    f'      return {{"{plural}": [row["name"] for row in chosen],'
    ' "total": total}',
    "  return None",
  ]
  return "\n".join(["def solve():", *lines, ""])


def _verifier(domain, bundle):
  table = domain.table(bundle.target)
  target = quote(bundle.target)
  columns = (table.parent, bundle.measure, bundle.standard)
  selected = ", ".join(f"{target}.{quote(column)}" for column in columns)
  tail = queries.where(domain, bundle.target, bundle.conditions)
  joint = " AND " if bundle.conditions else ""
  sql = f"SELECT {selected} {tail}{joint}{target}.name = ?"
  return f"""def verify(answer):
  names = answer["{table.plural}"]
  rows = [row for name in names for row in query({sql!r}, name)]
  total = sum(row[1] for row in rows)
  dear = any(row[1] > {bundle.limit} for row in rows)
  good = all(row[2] >= {bundle.required} for row in rows)
  if len(names) != {bundle.size} or len(rows) != {bundle.size}:
    return False
  if len(set(row[0] for row in rows)) != {bundle.size}:
    return False
  if total != answer["total"] or total > {bundle.budget}:
    return False
  return good or not dear
"""


def _wrong_answers(data, bundle, rng):
  """Choices that break a rule, by plain arithmetic on the rows."""
  table = data.domain.table(bundle.target)
  rows = data.rows[bundle.target]
  found = []
  for _ in range(400):
    chosen = rng.sample(rows, bundle.size)
    meets = all(
      c.holds(data, bundle.target, row)
      for c in bundle.conditions
      for row in chosen
    )
    if not (meets and fulfils(bundle, chosen, table.parent)):
      found.append(_told(table, bundle, chosen, 0))
    if len(found) == wrong.NUM_WRONG - 2:
      break
  chosen = rng.sample(rows, bundle.size)
  found.append(_told(table, bundle, chosen, 1))
  found.append(_told(table, bundle, [chosen[0]] * bundle.size, 0))
  return wrong.different(found, None)


def _told(table, bundle, rows, off):
  return {
    table.plural: [row["name"] for row in rows],
    "total": sum(row[bundle.measure] for row in rows) + off,
  }
