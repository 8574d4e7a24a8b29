"""Tools over a domain's tables: which exist, and how a solution calls them.

Each table has two ways in, a lister and an informer, each in one of three
styles. A toolset starts with some of them; a solution that needs another one
raises MissingTool, and the pipeline adds it.

Listers of a table: "all" gives every name (of one parent), "pages" gives some
at a time, "search" wants the value of a column of choices as well. Informers:
"infos" takes the keywords wanted, "describe" gives all columns, "single" is
one tool a column.
"""

from collections.abc import Sequence
import dataclasses
import random

from dsv32_jax.agents.synthesis.general import schema
from dsv32_jax.agents.synthesis.general import tool_specs

PART_CHANCE = 0.75


class MissingTool(Exception):
  """The toolset lacks the part (kind, table) that a solution needs."""

  def __init__(self, part: tuple[str, str]):
    super().__init__(f"no tool for {part}")
    self.part = part


@dataclasses.dataclass
class Toolset:
  """Styles by table, and the parts that exist so far.

  Attributes:
    domain: whose tables the tools speak about.
    styles: (lister, informer) by table.
    parts: (kind, table): kind is list, info, parent or count.
  """

  domain: schema.Domain
  styles: dict[str, tuple[str, str]]
  parts: set[tuple[str, str]]

  def specs(self) -> list[tool_specs.ToolSpec]:
    """Returns every tool, submit_result last."""
    found: list[tool_specs.ToolSpec] = []
    for table in self.domain.tables:
      lister, informer = self.styles[table.name]
      if ("list", table.name) in self.parts:
        found.append(tool_specs.LISTERS[lister](table))
      if ("info", table.name) in self.parts:
        found += tool_specs.INFORMERS[informer](table)
      if ("parent", table.name) in self.parts:
        found.append(tool_specs.parent_of(table))
      if ("count", table.name) in self.parts:
        found.append(tool_specs.count(table))
    found += [tool_specs.grid(grid) for grid in self.domain.grids]
    return [*found, tool_specs.SUBMIT]

  def list_expression(self, table: schema.Table) -> str:
    """Python that gives the names of a table under a loop over its parent."""
    self._require("list", table)
    style = self.styles[table.name][0]
    spec = tool_specs.LISTERS[style](table)
    parent = table.parent
    given = f"{parent}={parent}" if parent else ""
    if style == "all":
      return f"{spec.name}({given})"
    comma = ", " if given else ""
    if style == "pages":
      first = f"{spec.name}({given}{comma}page=1)"
      return (
        f'[name for page in range(1, {first}["pages"] + 1)'
        f' for name in {spec.name}({given}{comma}page=page)["names"]]'
      )
    column = tool_specs.search_column(table)
    return (
      f"[name for value in {list(column.choices)!r}"
      f" for name in {spec.name}({given}{comma}{column.name}=value)]"
    )

  def info_expression(
    self, table: schema.Table, columns: Sequence[str], variable: str
  ) -> str:
    """Python that gives a dict with the columns of the row in a variable."""
    self._require("info", table)
    style = self.styles[table.name][1]
    specs = tool_specs.INFORMERS[style](table)
    key = f"{table.name}={variable}"
    if style == "infos":
      return f"{specs[0].name}(info_keywords={list(columns)!r}, {key})"
    if style == "describe":
      return f"{specs[0].name}({key})"
    names = {spec.shape["column"]: spec.name for spec in specs}
    items = ", ".join(f'"{c}": {names[c]}({key})' for c in columns)
    return f"{{{items}}}"

  def _require(self, kind: str, table: schema.Table):
    if (kind, table.name) not in self.parts:
      raise MissingTool((kind, table.name))


def draw(domain: schema.Domain, rng: random.Random) -> Toolset:
  """Draws the styles and the parts that a toolset starts with."""
  styles, parts = {}, set()
  for table in domain.tables:
    searchable = table.parent and tool_specs.search_column(table) is not None
    listers = ["all", "pages", *(["search"] if searchable else [])]
    style = (rng.choice(listers), rng.choice(list(tool_specs.INFORMERS)))
    styles[table.name] = ("all", "infos") if domain.fixed else style
    kinds = ["list", "info"]
    if table.parent is not None:
      kinds += ["parent"] if domain.fixed else ["parent", "count"]
    parts |= {
      (kind, table.name)
      for kind in kinds
      if domain.fixed or rng.random() < PART_CHANCE
    }
  return Toolset(domain, styles, parts)
