"""Search tasks small enough for a tiny model: few short pages about one world.

People live in towns and work for firms, which people lead. Each task has its
own world, so that an answer cannot be remembered. Pages are named by numbers,
so that the first one has to be searched for, and name the pages of what they
mention.
"""

import dataclasses
import itertools
import random

from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index

_STEMS = (
  "Bar",
  "Den",
  "Fel",
  "Gor",
  "Hal",
  "Jin",
  "Kor",
  "Lum",
  "Mar",
  "Nel",
  "Pol",
  "Ris",
  "Sol",
  "Tam",
  "Vor",
  "Wen",
)
_ENDINGS = {"person": ("a", "o"), "town": ("ton", "by"), "firm": ("ex", "ix")}
NAMES = {
  kind: tuple(
    f"{stem}{ending}" for stem, ending in itertools.product(_STEMS, endings)
  )
  for kind, endings in _ENDINGS.items()
}
MOST_NAMES = min(map(len, NAMES.values()))
_COUNTS = {"person": 4, "town": 2, "firm": 2}
_HITS = 2
_MAX_STEPS = 20
TOOLS = (
  protocol.tool(
    "search",
    "Returns the names and titles of the pages that hold words, best first.",
    {"query": {"type": "string"}},
  ),
  protocol.tool("open", "Returns a page.", {"document": {"type": "string"}}),
  *(one for one in search.SCHEMAS if one.name == "submit_result"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relation:
  """Something that a page tells.

  Attributes:
    kind: of what the page is about.
    of: kind of what it tells.
    says: a sentence with both, the page's first.
    ask: a question with what the page is about.
    phrase: what is told, as a part of another question.
  """

  kind: str
  of: str
  says: str
  ask: str
  phrase: str


RELATIONS = {
  "lives": Relation(
    kind="person",
    of="town",
    says="{} lives in {}.",
    ask="In which town does {} live?",
    phrase="the town of {}",
  ),
  "works": Relation(
    kind="person",
    of="firm",
    says="{} works for {}.",
    ask="For which firm does {} work?",
    phrase="the firm of {}",
  ),
  "mayor": Relation(
    kind="town",
    of="person",
    says="The mayor of {} is {}.",
    ask="Who is the mayor of {}?",
    phrase="the mayor of {}",
  ),
  "head": Relation(
    kind="firm",
    of="person",
    says="The head of {} is {}.",
    ask="Who is the head of {}?",
    phrase="the head of {}",
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchTask:
  """A question over a world.

  Attributes:
    question: that is asked.
    entity: that it begins with.
    path: names of RELATIONS that lead from there to the answer.
    pages: names of the pages on the way, the first one's first.
    answer: the truth.
    documents: the world.
  """

  question: str
  entity: str
  path: tuple[str, ...]
  pages: tuple[str, ...]
  answer: str
  documents: tuple[search_index.Document, ...]

  @property
  def content(self) -> str:
    """What makes it the same to whoever would answer from memory."""
    return f"{self.question} {self.answer}"

  def solution(self) -> list[tuple[str, dict[str, str], str]]:
    """Name, arguments and thought of each call that earns the reward."""
    actions = [("search", {"query": self.entity}, f"I look for {self.entity}.")]
    for page in self.pages:
      actions.append(("open", {"document": page}, f"I read {page}."))
    submitted = {"answer_text": self.answer}
    thought = f"The answer is {self.answer}."
    return [*actions, ("submit_result", submitted, thought)]


def draw(depth: int, largest: int, generator: random.Random) -> SearchTask:
  """Draws a world and a question.

  Args:
    depth: relations between question and answer, 1 or 2.
    largest: names of each kind that there are, up to MOST_NAMES.
    generator: source of choices.
  """
  while True:
    world = _World(largest, generator)
    path = [generator.choice(list(RELATIONS))]
    if depth == 2:
      kind = RELATIONS[path[0]].of
      path.append(
        generator.choice(
          [n for n, one in RELATIONS.items() if one.kind == kind]
        )
      )
    entity = generator.choice(world.names[RELATIONS[path[0]].kind])
    visited = [entity]
    for name in path:
      visited.append(world.facts[visited[-1], name])
    # The way back to where it began needs no page.
    if len(set(visited)) == len(visited):
      return _task(world, path, visited)


def _task(world, path, visited):
  asked = visited[0]
  for name in path[:-1]:
    asked = RELATIONS[name].phrase.format(asked)
  return SearchTask(
    question=RELATIONS[path[-1]].ask.format(asked),
    entity=visited[0],
    path=tuple(path),
    pages=tuple(world.pages[name] for name in visited[:-1]),
    answer=visited[-1],
    documents=world.documents(),
  )


class _World:
  """Entities, the page of each, and what each relation leads to."""

  def __init__(self, largest: int, generator: random.Random):
    self.names = {
      kind: generator.sample(NAMES[kind][:largest], count)
      for kind, count in _COUNTS.items()
    }
    everything = list(itertools.chain(*self.names.values()))
    generator.shuffle(everything)
    self.pages = {
      name: f"p{number}" for number, name in enumerate(everything, 1)
    }
    self.facts = {
      (name, relation): generator.choice(self.names[one.of])
      for relation, one in RELATIONS.items()
      for name in self.names[one.kind]
    }

  def documents(self) -> tuple[search_index.Document, ...]:
    return tuple(
      search_index.Document(name=page, title=name, text=self._text(name))
      for name, page in self.pages.items()
    )

  def _text(self, name):
    said = []
    for (about, relation), told in self.facts.items():
      if about == name:
        linked = f"{told} ({self.pages[told]})"
        said.append(RELATIONS[relation].says.format(name, linked))
    return " ".join(said)


class SmallSearchEnvironment(search.SearchEnvironment):
  """A task's question over its own world; hits are titles, pages are whole."""

  def __init__(self, task: SearchTask):
    """Makes the index, which closes with the environment."""
    self._index = search_index.MemoryIndex(task.documents)
    super().__init__(
      self._index,
      {"id": task.content, "question": task.question, "answer": task.answer},
      limits=search.SearchLimits(max_steps=_MAX_STEPS),
    )

  async def reset(self) -> protocol.Start:
    await super().reset()
    return protocol.Start(observation=self.task["question"], tools=TOOLS)

  async def close(self) -> None:
    self._index.close()

  async def carry_out(self, call: protocol.ToolCall) -> str:
    match call.name:
      case "search":
        query = call.arguments["query"]
        hits = self._index.search_now(query, offset=0, count=_HITS)
        told = [f"{hit.name} {hit.title}" for hit in hits]
        return "\n".join(told) or "no hits"
      case "open":
        return self._index.open_now(call.arguments["document"]).text
    return await super().carry_out(call)
