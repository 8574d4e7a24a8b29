"""Answers near a right one: most of them wrong, a few right in another way."""

import random

from tests.support import general_world as world


def near(record, task, rng: random.Random):
  """Changes a right answer in one place or two; it stays of its schema.

  Names become others of their table or take another case, numbers become
  others of the data, lists lose, gain, repeat or exchange items; the total of a
  bundle follows its names every second time.
  """
  answer = task["answer"]
  for _ in range(rng.randint(1, 2)):
    answer = _changed(answer, task, _Drawn(record, task, rng))
  if task["kind"] == "bundle" and rng.random() < 0.5:
    answer = _with_total(answer, record, task)
  return answer


class _Drawn:
  """Values of the data in the place of a value."""

  def __init__(self, record, task, rng):
    self.rng = rng
    rows = record["rows"].values()
    self._columns = [
      [row[column] for row in table] for table in rows for column in table[0]
    ]

  def text(self, value):
    same = [column for column in self._columns if value in column]
    others = self.rng.choice(same) if same else ["", value]
    spellings = (value.upper(), value + " ", "")
    return self.rng.choice([*self.rng.choices(others, k=5), *spellings])

  def number(self, value):
    other = self.rng.choice(self.rng.choice(self._columns))
    other = other if type(other) is int else value
    changes = (value + 1, value - 1, -value, value * 10, other, 0)
    return self.rng.choice(changes)


def _changed(value, task, drawn):
  if isinstance(value, dict):
    key = drawn.rng.choice(list(value))
    return {**value, key: _changed(value[key], task, drawn)}
  if isinstance(value, str):
    return drawn.text(value)
  if not isinstance(value, list):
    return drawn.number(value)
  if not value:
    return value
  place = drawn.rng.randrange(len(value))
  changed = _changed(value[place], task, drawn)
  replaced = [*value[:place], changed, *value[place + 1 :]]
  forms = [replaced, replaced, [*value, changed], [*value, value[place]]]
  forms += [value[:place] + value[place + 1 :], value[::-1], []]
  return drawn.rng.choice(
    [*forms, drawn.rng.sample(value, len(value)), value * 2]
  )


def _with_total(answer, record, task):
  understood = world.read(record, task)
  measure = understood.details["label"].replace(" ", "_")
  value = {
    row["name"]: row[measure] for row in record["rows"][understood.target]
  }
  names, _ = answer.values()
  plural, total = answer
  return {plural: names, total: sum(value.get(name, 0) for name in names)}
