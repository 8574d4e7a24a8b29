"""Answers that are well formed and wrong.

Where the answer is unique, whatever differs from it is wrong. The near ones
are the most telling: another row told truly, a right row with a wrong detail.
"""

import copy
import random
from typing import Any

NUM_WRONG = 8


def of_query(
  kind: str,
  answer: dict[str, Any],
  records: list[dict[str, Any]],
  measure: str,
  target: str,
  rng: random.Random,
) -> list[dict[str, Any]]:
  """Returns up to NUM_WRONG answers unlike the right one, and each other.

  Args:
    kind: of the query.
    answer: the right one.
    records: name, parent and value of every row of the target table.
    measure: column of the value.
    target: table asked for.
    rng: source of choices.
  """
  if kind == "total":
    candidates = _totals(answer, measure, records, rng)
  elif kind == "ranking":
    candidates = _rankings(answer["ranking"], records, rng)
  else:
    parent = next(k for k in answer if k not in (target, measure))
    candidates = _rows(answer, records, (target, parent, measure), rng)
  return different(candidates, answer)


def different(candidates, answer) -> list[Any]:
  """Drops repetitions and the right answer."""
  found: list[Any] = []
  for candidate in candidates:
    if candidate != answer and candidate not in found:
      found.append(candidate)
  return found[:NUM_WRONG]


def _totals(answer, measure, records, rng):
  count, total = answer["count"], answer[f"total_{measure}"]
  extra = [record["value"] for record in rng.sample(records, 4)]
  changes = [(1, 0), (0, 1), (-1, 0), (0, -1)]
  changes += [(1, value) for value in extra] + [(-1, -value) for value in extra]
  for more, much in changes:
    yield {"count": count + more, f"total_{measure}": total + much}


def _rankings(ranking, records, rng):
  names = [record["name"] for record in records]
  yield {"ranking": ranking[::-1]}
  yield {"ranking": ranking[:-1]}
  yield {"ranking": ranking[1:] + ranking[:1]}
  yield {"ranking": [ranking[1], ranking[0], *ranking[2:]]}
  for name in rng.sample([n for n in names if n not in ranking], 2):
    yield {"ranking": [*ranking, name]}
    yield {"ranking": [*ranking[:-1], name]}


def _rows(answer, records, keys, rng):
  target, parent, measure = keys
  yield {**answer, measure: answer[measure] + 1}
  others = [r for r in records if r["name"] != answer[target]]
  for record in rng.sample(others, 5):
    yield {
      target: record["name"],
      parent: record["parent"],
      measure: record["value"],
    }
    changed = copy.copy(answer)
    changed[target] = record["name"]
    yield changed
