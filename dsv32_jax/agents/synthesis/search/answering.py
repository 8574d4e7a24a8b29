"""Answer-generation agents that differ: what each may see and do.

Each gets a question's words and a browser. Paper section 3.2.3 has agents with
other checkpoints and prompts; offline these are scripts that stop at what a
hasty agent stops at. `policy_answerer` makes one of any policy.
"""

from collections.abc import Awaitable, Callable
import functools

from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.search import browsing
from dsv32_jax.agents.synthesis.search import questions

Answerer = Callable[[str, search_index.Source], Awaitable[str]]

_GUESSES = {
  "default": "None",
  "last": "timeout",
  "taking": "__init__",
  "module": "collections",
}


async def guess(question: str, source: search_index.Source) -> str:
  """Says what is most often right, without a look."""
  del source
  return _GUESSES[questions.parse(question).ask.kind]


async def top_document(question: str, source: search_index.Source) -> str:
  """Searches the question as it is and asks the first class it finds."""
  browser, chain = browsing.Browser(source), questions.parse(question)
  parts = (*chain.clues, chain.ask)
  words = " ".join(value for part in parts for value in part.values)
  for name in await browser.search(words):
    entity = await browser.entity(name)
    if entity is not None:
      return questions.asked(chain.ask, entity) or ""
  return ""


async def first_clue(question: str, source: search_index.Source) -> str:
  """Believes the first class that fits the first clue, then reasons well."""
  browser, chain = browsing.Browser(source), questions.parse(question)
  return await _follow(browser, chain, num_clues=1, num_hops=None)


async def no_hops(question: str, source: search_index.Source) -> str:
  """Finds the class by all clues and asks there, whatever follows."""
  browser, chain = browsing.Browser(source), questions.parse(question)
  return await _follow(browser, chain, num_clues=None, num_hops=0)


async def one_hop(question: str, source: search_index.Source) -> str:
  """Finds the class by two clues and goes one hop on."""
  browser, chain = browsing.Browser(source), questions.parse(question)
  return await _follow(browser, chain, num_clues=2, num_hops=1)


async def _follow(browser, chain, *, num_clues, num_hops):
  clues = chain.clues[:num_clues]
  for name in await browser.search(" ".join(map(browsing.query_of, clues))):
    entity = await browser.entity(name)
    if entity is not None and questions.fits(clues, entity):
      break
  else:
    return ""
  for hop in chain.hops[:num_hops]:
    found = await browser.hop(hop, entity)
    if not found:
      return ""
    entity = found[0]
  return questions.asked(chain.ask, entity) or ""


ANSWERERS: dict[str, Answerer] = {
  "guess": guess,
  "top_document": top_document,
  "first_clue": first_clue,
  "no_hops": no_hops,
  "one_hop": one_hop,
}


def policy_answerer(
  policy: policies.Policy,
  *,
  system_prompt: str = "",
  limits: loop.EpisodeLimits = loop.EpisodeLimits(),
) -> Answerer:
  """Makes an answerer of a policy; what its episode submits is the answer."""
  return functools.partial(_ask_policy, policy, system_prompt, limits)


async def _ask_policy(policy, system_prompt, limits, question, source) -> str:
  submitted: list[str] = []

  def note(question, answer):
    submitted.append(answer)
    return 0.0

  task = {"id": "answering", "question": question}
  await loop.run_episode(
    policy,
    lambda: search.SearchEnvironment(source, task, scorer=note),
    episode_id="answering",
    limits=limits,
    system_prompt=system_prompt,
  )
  return submitted[-1] if submitted else ""


def policy_without_tools(policy: policies.Policy) -> Answerer:
  """Makes an answerer that replies once and has nothing to search with."""
  return lambda question, source: policies.ask(policy, question)
