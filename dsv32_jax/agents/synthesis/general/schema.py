"""How a domain is declared: tables, columns and how names are made.

Tables form a tree by their `parent`. A row has a name that is unique in its
table, the name of its parent, and its columns. A grid holds one row for each
combination of its axes, such as a pair of cities.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
  """A column and how its values come about.

  Attributes:
    name: of the column; with blanks for underscores it is its label.
    kind: numbers have low, high and step; a date is low to high days after the
      domain's first day; a choice is one of `choices`.
    low: least value.
    high: greatest value.
    step: numbers and dates are low plus a multiple of it.
    unit: follows a number in a task's text.
    choices: values, the first ones more often than the last.
    grade: -1 to 1, how far a row's hidden quality decides the value, so that
      what is good is dear and its waiting list long.
    optional: an environment may lack the column.
  """

  name: str
  kind: Literal["number", "choice", "date"]
  low: float = 0
  high: float = 0
  step: float = 1
  unit: str = ""
  choices: Sequence[str] = ()
  grade: float = 0.0
  optional: bool = False

  @property
  def label(self) -> str:
    return self.name.replace("_", " ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """A table of named things.

  Attributes:
    name: singular.
    plural: of the name.
    rows: least and greatest number of rows for each row of the parent.
    pattern: of names; {parent} is the parent's name, {0}, {1}, ... a word of
      words[0], words[1], ...
    words: lists of words.
    columns: of the table, besides name and parent.
    parent: name of the table above.
    known: by name, true values of some columns, which are not drawn.
  """

  name: str
  plural: str
  rows: tuple[int, int]
  pattern: str
  words: Sequence[Sequence[str]]
  columns: Sequence[Column]
  parent: str | None = None
  known: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )

  def column(self, name: str) -> Column:
    return next(column for column in self.columns if column.name == name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """A table with one row for each combination of its axes.

  Attributes:
    name: of the table.
    axes: (column, table); "date" instead of a table runs over three days.
    columns: values.
    tool: name of the tool that looks rows up.
    description: of the tool.
    derive: from a row's axes, true values of some columns.
  """

  name: str
  axes: Sequence[tuple[str, str]]
  columns: Sequence[Column]
  tool: str
  description: str
  derive: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda row: {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
  """A kind of world: what stands in the database of an environment.

  Attributes:
    name: of the domain.
    setting: the sentence a task begins with.
    tables: parents before children.
    grids: tables over combinations.
    first_day: ISO date from which days count.
    fixed: every environment has every column, table and tool.
  """

  name: str
  setting: str
  tables: Sequence[Table]
  grids: Sequence[Grid] = ()
  first_day: str = "2025-10-01"
  fixed: bool = False

  def table(self, name: str) -> Table:
    return next(table for table in self.tables if table.name == name)

  def chain(self, name: str) -> list[Table]:
    """Returns the tables from the root down to the named one."""
    table = self.table(name)
    above = [] if table.parent is None else self.chain(table.parent)
    return [*above, table]

  def children(self, name: str) -> list[Table]:
    return [table for table in self.tables if table.parent == name]


def article(noun: str) -> str:
  """Returns the noun with a or an."""
  return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def number(name, low, high, step=1, unit="", grade=0.0, optional=False):
  """A column of numbers."""
  return Column(
    name=name,
    kind="number",
    low=low,
    high=high,
    step=step,
    unit=unit,
    grade=grade,
    optional=optional,
  )


def choice(name, *choices, optional=False):
  """A column of words."""
  return Column(name=name, kind="choice", choices=choices, optional=optional)


def flag(name, optional=True):
  """A column of yes and no."""
  return choice(name, "yes", "no", optional=optional)


def date(name, low, high, step=1, optional=False):
  """A column of ISO dates, by days after the domain's first day."""
  return Column(
    name=name, kind="date", low=low, high=high, step=step, optional=optional
  )


def table(name, plural, rows, pattern, words, columns, parent=None) -> Table:
  """A table, its fields in order."""
  return Table(
    name=name,
    plural=plural,
    rows=rows,
    pattern=pattern,
    words=words,
    columns=columns,
    parent=parent,
  )


def domain(name, setting, *tables, first_day="2025-10-01") -> Domain:
  """A domain without grids."""
  return Domain(name=name, setting=setting, tables=tables, first_day=first_day)
