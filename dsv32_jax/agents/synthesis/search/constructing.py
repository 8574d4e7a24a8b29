"""Which classes to ask about, and building a chain that starts from one.

The builder explores with the tools of the environment, sees what it opened and
no more, and guesses what is unique. Whether it is, verification tells.
"""

from collections.abc import Iterable
import random

from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.search import browsing
from dsv32_jax.agents.synthesis.search import questions
from dsv32_jax.agents.synthesis.search import reading

_PART = questions.Part


class Rejection(Exception):
  """A candidate that is not kept; the message is the reason."""


def long_tail(
  index: search_index.LocalIndex, most: int, rng: random.Random
) -> list[str]:
  """Returns the informative classes that few documents mention.

  Informative is one with two public methods and a description.

  Args:
    index: of the corpus.
    most: documents that may mention the class, its own among them.
    rng: shuffles, within each top-level module and between them.

  Returns:
    Names, the modules taking turns, so that no domain rules.
  """
  by_domain: dict[str, list[str]] = {}
  for document in index.documents():
    entity = reading.read(document.text)
    if entity is None or len(entity.functions) < 2 or not entity.words:
      continue
    if index.document_frequency(entity.label) <= most:
      by_domain.setdefault(entity.module.split(".")[0], []).append(entity.name)
  domains = sorted(by_domain)
  rng.shuffle(domains)
  for domain in domains:
    rng.shuffle(by_domain[domain])
  return [
    by_domain[domain][turn]
    for turn in range(max(map(len, by_domain.values()), default=0))
    for domain in domains
    if turn < len(by_domain[domain])
  ]


async def construct(
  browser: browsing.Browser,
  name: str,
  *,
  depth: int,
  breadth: int,
  rng: random.Random,
) -> tuple[questions.Chain, str, list[dict[str, str]]]:
  """Builds a chain of `depth` hops whose first class `breadth` clues describe.

  Returns:
    The chain, the answer, and its evidence: documents and lines of them.

  Raises:
    Rejection: nothing leads on, or there is nothing to ask.
  """
  entity = await browser.entity(name)
  if entity is None:
    raise Rejection("the document describes no class")
  evidence = [_quote(entity, "Class ")]
  visited, hops = [entity], []
  for _ in range(depth):
    hop, entity = await _lead_on(browser, entity, visited, rng)
    hops.append(hop)
    visited.append(entity)
    evidence.append(_quote(entity, "Class "))
  ask = _choose_ask(entity, len(hops), rng)
  avoided = {ask.values[-1] if ask.values else "", visited[0].label}
  clues = await _choose_clues(browser, visited[0], breadth, avoided, rng)
  answer = questions.asked(ask, entity)
  if answer is None:
    raise Rejection("what is asked has no single answer")
  evidence.append(_proof(entity, ask))
  chain = questions.Chain(clues=clues, hops=tuple(hops), ask=ask)
  return chain, answer, evidence


async def _lead_on(browser, entity, visited, rng):
  """Returns a hop from a class, and the class it leads to."""
  hops = [_PART("child")]
  if entity.bases != ("builtins.object",):
    hops.append(_PART("base"))
  siblings = []
  for name in reading.classes(await browser.text(entity.module))[:30]:
    other = await browser.entity(name)
    if other is not None and other.name != entity.name:
      siblings += [x.name for x in other.functions if x.name != "__init__"]
  own = {x.name for x in entity.functions}
  once = [x for x in siblings if siblings.count(x) == 1 and x not in own]
  hops += [_PART("sibling", (x,)) for x in rng.sample(once, min(2, len(once)))]
  rng.shuffle(hops)
  known = {x.name for x in visited}
  for hop in hops:
    found = await browser.hop(hop, entity)
    if len(found) == 1 and found[0].name not in known:
      return hop, found[0]
  raise Rejection("no hop leads on from a class")


def _choose_ask(entity, depth, rng):
  """Returns something that has one answer; of places only after a hop."""
  asks = []
  for function in entity.functions:
    known = [p for p, value in function.defaults.items() if value is not None]
    asks += [_PART("default", (function.name, p)) for p in known]
    if len(function.defaults) > 1:
      asks.append(_PART("last", (function.name,)))
    asks += [_PART("taking", (p,)) for p in function.defaults]
  asks = [x for x in asks if questions.asked(x, entity) is not None]
  if depth and entity.module != "builtins":
    asks.append(_PART("module"))
  if not asks:
    raise Rejection("nothing can be asked of the last class")
  kind = rng.choice(sorted({ask.kind for ask in asks}))
  return rng.choice([ask for ask in asks if ask.kind == kind])


async def _choose_clues(browser, entity, breadth, avoided, rng):
  """Returns clues about a class, such as few other documents bear out."""
  candidates = [
    _PART("method", (x.name,)) for x in entity.functions if x.name != "__init__"
  ]
  parameters = {p for x in entity.functions for p in x.defaults}
  candidates += [_PART("parameter", (p,)) for p in sorted(parameters)]
  words = [x for x in entity.words if x != entity.label]
  candidates += [_PART("word", (x,)) for x in words[:20]]
  candidates = [x for x in candidates if x.values[0] not in avoided]
  rng.shuffle(candidates)
  if len(candidates) < breadth:
    raise Rejection(f"fewer than {breadth} clues")
  hits = {}
  for clue in candidates[: 5 * breadth]:
    names = await browser.search(browsing.query_of(clue), pages=3)
    if entity.name in names:  # else the word is too common to search for
      hits[clue] = set(names)
  # Common clues first, each next one the one that leaves the fewest classes.
  # One that alone gives the class away is taken where nothing else is left.
  telling = [clue for clue in hits if len(hits[clue]) == 1]
  others = sorted(set(hits) - set(telling), key=lambda x: (-len(hits[x]), x))
  chosen, left = [], None
  while len(chosen) < breadth and others:
    clue = min(others, key=lambda x: len(left & hits[x]) if left else 0)
    others.remove(clue)
    chosen.append(clue)
    left = hits[clue] if left is None else left & hits[clue]
  chosen += telling[: breadth - len(chosen)]
  if len(chosen) < breadth:
    raise Rejection(f"fewer than {breadth} clues")
  if rng.random() < 0.25 and len(chosen) > 2:
    chosen[0] = _PART("methods", (str(len(entity.functions)),))
  rng.shuffle(chosen)
  return tuple(chosen)


def _quote(entity: reading.Entity, line: str) -> dict[str, str]:
  text = f"Class {entity.label} of module {entity.module}"
  return {"document": entity.name, "line": text if line == "Class " else line}


def _proof(entity: reading.Entity, ask: questions.Part) -> dict[str, str]:
  """Returns the line that answers."""
  if ask.kind == "module":
    return _quote(entity, "Class ")
  name = ask.values[0]
  if ask.kind == "taking":
    name = questions.asked(ask, entity)
  return _quote(entity, entity.function(name).line.strip())


def domains(names: Iterable[str]) -> dict[str, int]:
  """Counts names by their top-level module."""
  counts: dict[str, int] = {}
  for name in names:
    domain = name.split(".")[0]
    counts[domain] = counts.get(domain, 0) + 1
  return dict(sorted(counts.items()))
