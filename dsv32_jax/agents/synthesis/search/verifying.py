"""Verification: the truth is right, and every candidate answer wrong.

Three ways, each able to refuse what another passes: the quoted evidence is
where it is said to be; a walk with the tools, from words alone and with its
clues in another order each pass, arrives at the truth and nowhere else; and a
scan of the whole corpus finds one class for the clues and for each hop.
"""

import ast
from collections.abc import Mapping, Sequence
import random

from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.search import browsing
from dsv32_jax.agents.synthesis.search import constructing
from dsv32_jax.agents.synthesis.search import questions
from dsv32_jax.agents.synthesis.search import reading

_PAGES = 6


async def check_evidence(
  source: search_index.Source, evidence: Sequence[Mapping[str, str]]
) -> None:
  """Raises constructing.Rejection unless each line is in its document."""
  browser = browsing.Browser(source)
  for quote in evidence:
    found = await browser.call(
      "find", document=quote["document"], text=quote["line"]
    )
    if found.startswith(("error: ", "0 lines")):
      raise constructing.Rejection("a quoted line is not in its document")


async def walk(
  source: search_index.Source,
  task: Mapping[str, str],
  rng: random.Random,
) -> browsing.Browser:
  """Answers a task by its words and submits the answer.

  Args:
    source: that is searched.
    task: with its question and answer.
    rng: orders the clues.

  Returns:
    The browser, with all calls.

  Raises:
    constructing.Rejection: it does not arrive, or not at the truth.
  """
  browser = browsing.Browser(source, task=dict(task))
  chain = questions.parse(task["question"])
  names: dict[str, int] = {}
  for clue in rng.sample(chain.clues, len(chain.clues)):
    if clue.kind != "methods":  # a number is no word to search for
      query = browsing.query_of(clue)
      for name in await browser.search(query, pages=_PAGES):
        names[name] = names.get(name, 0) + 1
  found = []
  most = max(names.values(), default=0)
  for name in [name for name in names if names[name] == most]:
    entity = await browser.entity(name)
    if entity is not None and questions.fits(chain.clues, entity):
      found.append(entity)
  for hop in (None, *chain.hops):
    if hop is not None:
      found = await browser.hop(hop, found[0])
    if len(found) != 1:
      raise constructing.Rejection(
        f"a walk finds {min(len(found), 2)} classes, not one"
      )
  answer = questions.asked(chain.ask, found[0]) or ""
  await browser.call("submit_result", answer_text=answer)
  if not search.is_right(answer, task):
    raise constructing.Rejection("a walk arrives at another answer")
  return browser


def scan(
  entities: Mapping[str, reading.Entity], chain: questions.Chain, answer: str
) -> None:
  """Checks a chain against all classes of the corpus.

  Raises:
    constructing.Rejection: not one class but several fit, or the answer is
      another.
  """
  found = [x for x in entities.values() if questions.fits(chain.clues, x)]
  for hop in (None, *chain.hops):
    if hop is not None:
      found = [
        end for end in entities.values() if browsing.leads(hop, found[0], end)
      ]
    if len(found) != 1:
      what = "clues" if hop is None else f"hop {hop.kind}"
      raise constructing.Rejection(
        f"{'no class fits' if not found else 'several classes fit'} the {what}"
      )
  if questions.asked(chain.ask, found[0]) != answer:
    raise constructing.Rejection("the corpus has another answer")


def check_answers(answer: str, candidates: Mapping[str, str]) -> None:
  """Raises constructing.Rejection unless every candidate is surely wrong."""
  task = {"answer": answer}
  for name, candidate in candidates.items():
    if search.is_right(candidate, task):
      raise constructing.Rejection(f"{name} answers it")
    if candidate and could_be(candidate, answer):
      raise constructing.Rejection(f"{name}'s answer may be right")


def could_be(candidate: str, answer: str) -> bool:
  """Tells if an answer may mean another: an equal value, a part of a name."""
  one, other = search.normal(candidate), search.normal(answer)
  if one.split(".")[-1] == other.split(".")[-1]:
    return True
  if one.startswith(f"{other}.") or other.startswith(f"{one}."):
    return True
  try:
    return ast.literal_eval(candidate) == ast.literal_eval(answer)
  except (ValueError, SyntaxError):
    return False
