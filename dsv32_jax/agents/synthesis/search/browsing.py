"""The tools of a search environment as functions, for scripts.

Whatever builds, answers or verifies a question goes through the environment's
own tools and pages, as a model would.
"""

from collections.abc import Mapping
import json
import re
from typing import Any

from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.search import questions
from dsv32_jax.agents.synthesis.search import reading

_TASK = {"id": "browsing", "question": "", "answer": "-"}


class Browser:
  """One episode of calls.

  Attributes:
    calls: (tool, arguments, observation) of each.
  """

  def __init__(
    self,
    source: search_index.Source,
    limits: search.SearchLimits = search.SearchLimits(),
    task: dict[str, Any] | None = None,
  ):
    """Takes what is searched; a task only where an answer is submitted."""
    self.environment = search.SearchEnvironment(
      source, task or _TASK, limits=limits
    )
    self.calls: list[tuple[str, dict[str, Any], str]] = []
    self._begun = False
    self._texts: dict[str, str] = {}

  async def call(self, name: str, **arguments: Any) -> str:
    """Carries out a call and returns the observation."""
    if not self._begun:
      await self.environment.reset()
      self._begun = True
    step = await self.environment.step(
      protocol.ToolCall(name=name, arguments=arguments)
    )
    self.calls.append((name, arguments, step.observation))
    return step.observation

  async def search(self, query: str, pages: int = 1) -> list[str]:
    """Returns the names of the hits of the first pages."""
    names = []
    for page in range(1, pages + 1):
      observation = await self.call("search", query=query, page=page)
      if observation.startswith(("error: ", "no hits")):
        break
      hits = observation.split("\n\n")
      names += [hit.partition("\n")[0] for hit in hits]
    return names

  async def text(self, name: str) -> str:
    """Returns a document page by page, "" if there is none."""
    if name not in self._texts:
      first = await self.call("open", document=name)
      if first.startswith("error: "):
        self._texts[name] = ""
        return ""
      count = int(re.search(r"\(page 1 of (\d+)\)\n", first)[1])
      pages = [first]
      for page in range(2, count + 1):
        pages.append(await self.call("open", document=name, page=page))
      bodies = (page.partition("\n\n")[2] for page in pages)
      self._texts[name] = "".join(bodies)
    return self._texts[name]

  async def entity(self, name: str) -> reading.Entity | None:
    """Returns the class of a document, None if it is none."""
    return reading.read(await self.text(name))

  async def hop(
    self, hop: questions.Part, entity: reading.Entity
  ) -> list[reading.Entity]:
    """Returns all classes that a hop leads to from one."""
    if hop.kind == "base":
      names = list(entity.bases)
    elif hop.kind == "child":
      names = await self.search(f'"{entity.name}"', pages=3)
    else:
      names = reading.classes(await self.text(entity.module))
    found = [await self.entity(name) for name in names if name != entity.name]
    return [x for x in found if x is not None and leads(hop, entity, x)]

  def messages(self, task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the calls of a task as `chat.encode_messages` takes them."""
    from_calls: list[dict[str, Any]] = []
    for name, arguments, observation in self.calls:
      text = json.dumps(arguments, ensure_ascii=False)
      call = {"type": "function", "function": {"name": name, "arguments": text}}
      from_calls += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": observation},
      ]
    shown = search.descriptions()
    return [
      {"role": "system", "content": "", "tools": shown},
      {"role": "user", "content": search.prompt(task)},
      *from_calls,
    ]


def leads(
  hop: questions.Part, start: reading.Entity, end: reading.Entity
) -> bool:
  """Tells if a hop leads from one class to another."""
  if hop.kind == "base":
    return start.bases == (end.name,)
  if hop.kind == "child":
    return start.name in end.bases
  return (
    end.module == start.module
    and end.name != start.name
    and end.function(hop.values[0]) is not None
  )


def query_of(clue: questions.Part) -> str:
  """Returns what to search for a clue."""
  return f'"{clue.values[0]}"'
