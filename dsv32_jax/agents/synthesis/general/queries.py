"""Tasks about the rows that a conjunction of conditions leaves.

Four kinds: "find" the one row, the "extreme" row among several, the "total"
over several, their "ranking". The answer is unique, and no condition alone
leaves fewer than MIN_SINGLE rows, so that no single call gives it away.
"""

import dataclasses
import random
from typing import Any

from dsv32_jax.agents.environments import read_only
from dsv32_jax.agents.synthesis.general import conditions as conditions_lib
from dsv32_jax.agents.synthesis.general import schema
from dsv32_jax.agents.synthesis.general import tasks
from dsv32_jax.agents.synthesis.general import toolset as toolset_lib
from dsv32_jax.agents.synthesis.general import wrong

MIN_SINGLE = 3
KINDS = ("find", "extreme", "total", "ranking")
_MATCHES = {"find": (1, 1), "extreme": (3, 9), "total": (3, 9)}
_RANKED = (3, 6)
_TRIES = 60
quote = read_only.quote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
  """A query task.

  Attributes:
    target: table whose rows are asked for.
    kind: one of KINDS.
    conditions: that rows must meet.
    measure: column that is compared, summed, ranked or told.
    highest: for extreme and ranking, whether great values come first.
  """

  target: str
  kind: str
  conditions: tuple[conditions_lib.Condition, ...]
  measure: str
  highest: bool


def draw(
  data: conditions_lib.Data, kind: str, num_conditions: int, rng: random.Random
) -> Query:
  """Draws a query with at least `num_conditions` conditions that all matter.

  Raises:
    tasks.Rejection: if none is found.
  """
  low, high = _MATCHES.get(kind, _RANKED)
  targets = [table for table in data.domain.tables if table.parent is not None]
  for _ in range(_TRIES):
    table = rng.choice(targets)
    rows = data.rows[table.name]
    measures = [
      c.name
      for c in table.columns
      if c.kind == "number" and float(c.step).is_integer()
    ]
    if len(rows) < 12 or not measures:
      continue
    conjunction = _conjunction(
      data, table.name, num_conditions, (low, high), rng
    )
    if conjunction is None:
      continue
    query = Query(
      target=table.name,
      kind=kind,
      conditions=tuple(conjunction),
      measure=rng.choice(measures),
      highest=rng.random() < 0.5,
    )
    values = [row[query.measure] for row in matches(data, query)]
    # A tie would leave two answers.
    if kind in ("find", "total") or len(set(values)) == len(values):
      return query
  raise tasks.Rejection(f"no {kind} query of {num_conditions} conditions")


def matches(data, query) -> list[dict[str, Any]]:
  """Returns the rows that meet every condition, in the order of the answer."""
  rows = [
    row
    for row in data.rows[query.target]
    if all(c.holds(data, query.target, row) for c in query.conditions)
  ]
  return sorted(rows, key=lambda row: row[query.measure], reverse=query.highest)


def make(
  data: conditions_lib.Data,
  query: Query,
  toolset: toolset_lib.Toolset,
  rng: random.Random,
) -> tasks.Draft:
  """Writes the task of a query.

  Raises:
    toolset.MissingTool: if its solution needs another tool.
  """
  rows = matches(data, query)
  parent = data.domain.table(query.target).parent
  answer = _answer(query, rows, parent)
  table = data.domain.table(query.target)
  return tasks.Draft(
    kind=query.kind,
    statement=_statement(data.domain, query),
    answer_schema=_schema(query, parent),
    solution=_solution(data.domain, query, toolset),
    verifier=_verifier(data.domain, query),
    wrong_answers=wrong.of_query(
      query.kind,
      answer,
      [_record(row, query.measure, parent) for row in data.rows[table.name]],
      query.measure,
      query.target,
      rng,
    ),
  )


def _conjunction(data, target, least, bounds, rng):
  """Draws conditions around a row until few enough rows are left."""
  rows = data.rows[target]
  planted = rng.choice(rows)
  chosen, left = [], rows
  scopes = ["own", "above", "below"]
  for step in range(least + 4):
    scope = scopes[step] if step < 3 else rng.choices(scopes, (3, 1, 1))[0]
    condition = conditions_lib.draw(data, target, planted, scope, rng)
    if condition is None:
      condition = conditions_lib.draw(data, target, planted, "own", rng)
    if (condition.table, condition.column) in [
      (other.table, other.column) for other in chosen
    ]:
      continue
    alone = [row for row in rows if condition.holds(data, target, row)]
    kept = [row for row in left if condition.holds(data, target, row)]
    if MIN_SINGLE <= len(alone) < len(rows) and bounds[0] <= len(kept) < len(
      left
    ):
      chosen, left = [*chosen, condition], kept
  if not bounds[0] <= len(left) <= bounds[1]:
    return None
  held = [
    {id(row) for row in rows if c.holds(data, target, row)} for c in chosen
  ]
  for place in range(len(chosen) - 1, -1, -1):
    others = held[:place] + held[place + 1 :]
    if others and len(set.intersection(*others)) == len(left):
      del chosen[place], held[place]
  return chosen if len(chosen) >= least else None


def _record(row, measure, parent):
  return {"name": row["name"], "parent": row[parent], "value": row[measure]}


def _answer(query, rows, parent):
  if query.kind == "total":
    return {
      "count": len(rows),
      f"total_{query.measure}": sum(row[query.measure] for row in rows),
    }
  if query.kind == "ranking":
    return {"ranking": [row["name"] for row in rows]}
  return {
    query.target: rows[0]["name"],
    parent: rows[0][parent],
    query.measure: rows[0][query.measure],
  }


def _schema(query, parent):
  text, integer = {"type": "string"}, {"type": "integer"}
  if query.kind == "total":
    return tasks.object_schema(
      {"count": integer, f"total_{query.measure}": integer}
    )
  if query.kind == "ranking":
    return tasks.object_schema({"ranking": {"type": "array", "items": text}})
  return tasks.object_schema(
    {query.target: text, parent: text, query.measure: integer}
  )


def _statement(domain, query):
  table = domain.table(query.target)
  label = table.column(query.measure).label
  order = "descending" if query.highest else "ascending"
  extreme = "highest" if query.highest else "lowest"
  ask = {
    "find": f"Find the one {table.name} that meets all conditions, and tell"
    f" its {table.parent} and its {label}.",
    "extreme": f"Among the {table.plural} that meet all conditions, find the"
    f" one with the {extreme} {label}, and tell its {table.parent} and that"
    " value.",
    "total": f"Count the {table.plural} that meet all conditions, and add up"
    f" their {label}.",
    "ranking": f"List the {table.plural} that meet all conditions by"
    f" {order} {label}.",
  }[query.kind]
  listed = "".join(
    f"\n({place}) {condition.text(domain)}"
    for place, condition in enumerate(query.conditions, 1)
  )
  subject = schema.article(table.name)
  return f"{domain.setting} {ask} The conditions on {subject}:{listed}"


def gather(domain, target, conditions, columns, toolset) -> list[str]:
  """Python lines that collect the rows meeting the conditions in `found`."""
  lines, indent = ["  found = []"], "  "
  chain = domain.chain(target)
  for table in chain:
    name = table.name
    lines.append(f"{indent}for {name} in {toolset.list_expression(table)}:")
    indent += "  "
    here = [c for c in conditions if c.table == name and c.scope != "below"]
    wanted = [c.column for c in here]
    wanted += columns if name == target else []
    wanted = list(dict.fromkeys(wanted))
    if wanted:
      infos = toolset.info_expression(table, wanted, name)
      lines.append(f"{indent}{name}_infos = {infos}")
    for condition in here:
      test = condition.python(f"{name}_infos")
      lines += [f"{indent}if not {test}:", f"{indent}  continue"]
  for place, condition in enumerate(
    c for c in conditions if c.scope == "below"
  ):
    child = domain.table(condition.table)
    count, infos = f"count_{place}", f"{child.name}_infos"
    given = toolset.info_expression(child, [condition.column], child.name)
    lines += [
      f"{indent}{count} = 0",
      f"{indent}for {child.name} in {toolset.list_expression(child)}:",
      f"{indent}  {infos} = {given}",
      f"{indent}  {count} += {condition.python(infos)}",
      f"{indent}if {count} < {condition.least}:",
      f"{indent}  continue",
    ]
  record = [f'"name": {target}', f'"parent": {chain[-2].name}']
  record += [f'"{c}": {target}_infos["{c}"]' for c in columns]
  return [*lines, f"{indent}found.append({{{', '.join(record)}}})"]


def _solution(domain, query, toolset):
  measure = query.measure
  lines = gather(domain, query.target, query.conditions, [measure], toolset)
  if query.kind == "total":
    lines.append(
      f'  return {{"count": len(found), "total_{measure}":'
      f' sum(row["{measure}"] for row in found)}}'
    )
  else:
    lines.append(
      f'  found = sorted(found, key=lambda row: row["{measure}"],'
      f" reverse={query.highest})"
    )
    parent = domain.table(query.target).parent
    lines.append(
      '  return {"ranking": [row["name"] for row in found]}'
      if query.kind == "ranking"
      else f'  return {{"{query.target}": found[0]["name"], "{parent}":'
      f' found[0]["parent"], "{measure}": found[0]["{measure}"]}}'
    )
  return "\n".join(["def solve():", *lines, ""])


def where(domain, target, conditions) -> str:
  """The FROM and WHERE of the rows that meet the conditions."""
  joins = "".join(
    f" JOIN {quote(table.parent)} ON {quote(table.parent)}.name ="
    f" {quote(table.name)}.{quote(table.parent)}"
    for table in reversed(domain.chain(target)[1:])
  )
  tests = " AND ".join(c.sql(target) for c in conditions)
  return f"FROM {quote(target)}{joins} WHERE {tests}"


def _verifier(domain, query):
  target, measure = quote(query.target), quote(query.measure)
  parent = domain.table(query.target).parent
  tail = where(domain, query.target, query.conditions)
  order = "DESC" if query.highest else "ASC"
  if query.kind == "total":
    sql = f"SELECT COUNT(*), SUM({target}.{measure}) {tail}"
    test = f'rows[0] == [answer["count"], answer["total_{query.measure}"]]'
  elif query.kind == "ranking":
    sql = f"SELECT {target}.name {tail} ORDER BY {target}.{measure} {order}"
    test = '[row[0] for row in rows] == answer["ranking"]'
  else:
    # Found again from the answer: no row but the named one may come out.
    sql = f"SELECT {target}.name, {target}.{quote(parent)}, {target}.{measure}"
    sql += f" {tail} ORDER BY {target}.{measure} {order}"
    single = "len(rows) == 1 and " if query.kind == "find" else ""
    test = (
      f'{single}rows[0] == [answer["{query.target}"], answer["{parent}"],'
      f' answer["{query.measure}"]]'
    )
  return (
    f"def verify(answer):\n  rows = query({sql!r})\n  return bool({test})\n"
  )
