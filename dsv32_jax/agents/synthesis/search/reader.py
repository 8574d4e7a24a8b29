"""A scripted policy for search tasks whose only memory is its context.

Each turn it looks at the messages that are there, works out what it knows from
them, and takes the next step. What context management removed it has to find
again, unless its own summary says so: that makes it a subject for studies of
context management that needs no model. It draws at random where it has a
choice, so attempts differ.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import random
from typing import Any

from dsv32_jax.agents import chat
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents.synthesis.search import browsing
from dsv32_jax.agents.synthesis.search import questions
from dsv32_jax.agents.synthesis.search import reading

_PAGES = 6
_NOTES = "Found: "
_RULED_OUT = " Not it: "
_MOST_NOTED = 100


@dataclasses.dataclass
class _Memory:
  """What the messages tell.

  Attributes:
    hits: names by (query, page).
    classes: opened ones by name.
    lists: classes that an opened module lists, by its name.
    ruled_out: documents that are not what the clues say.
    path: classes found so far, the first by clues and each next by a hop.
  """

  hits: dict[tuple[str, int], list[str]] = dataclasses.field(
    default_factory=dict
  )
  classes: dict[str, reading.Entity] = dataclasses.field(default_factory=dict)
  lists: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  ruled_out: dict[str, None] = dataclasses.field(default_factory=dict)
  path: list[str] = dataclasses.field(default_factory=list)


def script(rng: random.Random) -> policies.Script:
  """Makes a script of one attempt; see policy.ScriptedPolicy.

  Args:
    rng: of its choices.
  """
  return lambda messages: _reply(messages, rng)


def _reply(messages: Sequence[Mapping[str, Any]], rng: random.Random):
  users = [x["content"] for x in messages if x["role"] == "user"]
  chain = questions.parse(users[0].partition("\n\n")[0])
  memory = _remember(messages, chain, users[0])
  if len(users) > 1:  # asked to sum up
    return {
      "role": "assistant",
      "content": _notes(memory),
      "reasoning_content": "I write down what is known.",
    }
  thought, name, arguments = _next_step(memory, chain, rng)
  return policies.call(name, json.dumps(arguments), reasoning=thought)


def _notes(memory: _Memory) -> str:
  """Sums up, what matters most first: a limit may cut the end off."""
  ruled_out = list(memory.ruled_out)[:_MOST_NOTED]
  return f"{_NOTES}{' '.join(memory.path)}{_RULED_OUT}{' '.join(ruled_out)}"


def _remember(messages, chain, task) -> _Memory:
  memory = _Memory()
  path, _, ruled_out = task.partition(_NOTES)[2].partition(_RULED_OUT)
  memory.path = path.split()
  memory.ruled_out |= dict.fromkeys(ruled_out.split())
  for call, result in itertools.pairwise(messages):
    if call["role"] == "assistant" and result["role"] == "tool":
      ((name, text),) = chat.tool_calls(call)
      _note_result(memory, name, json.loads(text), result["content"])
  for entity in memory.classes.values():
    if not questions.fits(chain.clues, entity):
      memory.ruled_out[entity.name] = None
  _extend_path(memory, chain)
  return memory


def _note_result(memory, name, arguments, content) -> None:
  if name == "search":
    names = []
    if not content.startswith(("error: ", "no hits")):
      names = [hit.partition("\n")[0] for hit in content.split("\n\n")]
    memory.hits[arguments["query"], arguments["page"]] = names
  elif name == "open":
    document = arguments["document"]
    text = content.partition("\n\n")[2]
    entity = reading.read(text)
    if entity is not None and entity.name == document:
      memory.classes[document] = entity
    else:
      memory.ruled_out[document] = None
      memory.lists[document] = reading.classes(text)


def _extend_path(memory: _Memory, chain: questions.Chain) -> None:
  """Adds classes to the path as far as the open documents lead."""
  if not memory.path:
    memory.path = [
      x.name for x in memory.classes.values() if questions.fits(chain.clues, x)
    ][:1]
  while 0 < len(memory.path) <= len(chain.hops):
    start = memory.classes.get(memory.path[-1])
    if start is None:
      return
    hop = chain.hops[len(memory.path) - 1]
    ends = [
      x.name
      for x in memory.classes.values()
      if x.name != start.name and browsing.leads(hop, start, x)
    ]
    if not ends:
      return
    memory.path.append(ends[0])


def _next_step(memory, chain, rng):
  """Returns a thought, a tool and its arguments."""
  if not memory.path:
    return _find_first(memory, chain, rng)
  current = memory.classes.get(memory.path[-1])
  if current is None:
    return _open(memory.path[-1], "I know it is this one; I read it again.")
  if len(memory.path) > len(chain.hops):
    answer = questions.asked(chain.ask, current) or "unknown"
    return "That answers it.", "submit_result", {"answer_text": answer}
  hop = chain.hops[len(memory.path) - 1]
  return _follow(memory, hop, current, rng)


def _find_first(memory, chain, rng):
  queries = [
    browsing.query_of(clue) for clue in chain.clues if clue.kind != "methods"
  ]
  counts: dict[str, int] = {}
  for (query, _), names in memory.hits.items():
    if query in queries:
      for name in names:
        counts[name] = counts.get(name, 0) + 1
  fresh = [x for x in queries if (x, 1) not in memory.hits]
  waiting = [
    x for x in counts if x not in memory.ruled_out and x not in memory.classes
  ]
  if waiting and (not fresh or rng.random() < 0.3):
    best = sorted(waiting, key=lambda x: (-counts[x], rng.random()))
    return _open(rng.choice(best[:3]), "This may be the class.")
  if fresh:
    return _search(rng.choice(fresh), 1, "I look for a clue.")
  further = [
    (query, page)
    for query in queries
    for page in range(2, _PAGES + 1)
    if memory.hits.get((query, page - 1)) and (query, page) not in memory.hits
  ]
  if further:
    return _search(*rng.choice(further), "None of these; I look further.")
  return "I give up.", "submit_result", {"answer_text": "unknown"}


def _follow(memory, hop, current, rng):
  if hop.kind == "base":
    names = list(current.bases)
  elif hop.kind == "child":
    query = f'"{current.name}"'
    names = []
    for page in range(1, _PAGES + 1):
      if (query, page) not in memory.hits:
        break
      names += memory.hits[query, page]
    fresh = [x for x in names if x not in memory.classes]
    fresh = [x for x in fresh if x not in memory.lists]
    if not fresh and page <= 3 and (page == 1 or memory.hits[query, page - 1]):
      return _search(query, page, "Who mentions it?")
  else:
    names = memory.lists.get(current.module)
    if names is None:
      return _open(current.module, "What else is in this module?")
  seen = memory.classes.keys() | memory.lists.keys() | {current.name}
  names = [x for x in names if x not in seen]
  if names:
    return _open(rng.choice(names), "It may lead on to this one.")
  return "I give up.", "submit_result", {"answer_text": "unknown"}


def _open(document, thought):
  return thought, "open", {"document": document, "page": 1}


def _search(query, page, thought):
  return thought, "search", {"query": query, "page": page}
