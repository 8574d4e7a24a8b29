"""The second source: helpfulness prompts, kept where search measurably helps.

A prompt comes with a rubric. It is answered once without and once with the
tools; it is kept if the second score is higher by `least_gain`. Paper section
3.2.3 filters existing prompts by a generative reward model over rubrics of
several dimensions; it publishes neither. A judge can be given as the scorer
(`verifiers.rubric`); offline a criterion names the phrases that show it is met.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
import dataclasses
import pathlib
import random
import re
from typing import Any

from dsv32_jax.agents import tables
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.search import browsing

_SHOWN_CHARS = 1500
_FUNCTION = re.compile(r"Function (\w+) of module ([\w.]+)\n\n  \w+\((.*)\)\n")
# Of these search is no help.
_SMALL_TALK = (
  ("Wish my sister a happy birthday in one line.", ["birthday", "sister"]),
  ("Say thanks to a reviewer, politely.", ["thanks", "reviewer"]),
  ("Name a good title for a talk on testing.", ["testing"]),
  ("Rewrite this in capitals: keep it simple.", ["KEEP IT SIMPLE"]),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criterion:
  """One thing that a good answer does, on one of the dimensions.

  Attributes:
    dimension: such as "correctness".
    text: what it is, for a judge.
    weight: how much it counts.
    phrases: of which an answer that does it has all; for the offline scorer.
    most_chars: of an answer that does it; 0 for any number.
  """

  dimension: str
  text: str
  weight: float = 1.0
  phrases: tuple[str, ...] = ()
  most_chars: int = 0

  def __post_init__(self):
    if not self.weight > 0:
      raise ValueError(f"weight={self.weight} of a criterion must be positive")
    if not self.phrases and not self.most_chars:
      raise ValueError(f"criterion {self.text!r} says nothing that can be seen")


Rubric = Sequence[Criterion]
Scorer = Callable[[str, str, Rubric], float]
Answerer = Callable[[str, search_index.Source], Awaitable[str]]


def phrase_score(question: str, answer: str, rubric: Rubric) -> float:
  """Scores by phrases: the weighted mean of how much of each criterion is met.

  What the question itself says counts as well: whoever repeats it gains by
  that with or without search. An empty answer meets nothing.
  """
  del question
  text = " ".join(answer.split()).casefold()
  if not text:
    return 0.0
  met = 0.0
  for criterion in rubric:
    phrases = [" ".join(x.split()).casefold() for x in criterion.phrases]
    share = sum(x in text for x in phrases) / len(phrases) if phrases else 1.0
    fits = not criterion.most_chars or len(answer) <= criterion.most_chars
    met += criterion.weight * share * fits
  return met / sum(criterion.weight for criterion in rubric)


async def without_search(prompt: str, source: search_index.Source) -> str:
  """Answers from nothing but the prompt."""
  del source
  return f"Here is my answer. {prompt} {prompt.upper()}"


async def with_search(prompt: str, source: search_index.Source) -> str:
  """Searches the prompt's words and tells the beginning of the first hit."""
  browser = browsing.Browser(source)
  quoted = re.findall(r"`(\w+)`", prompt)
  hits = await browser.search(" ".join(f'"{x}"' for x in quoted) or prompt)
  found = await browser.text(hits[0]) if hits else ""
  return f"Here is my answer. {prompt} {prompt.upper()} {found[:_SHOWN_CHARS]}"


def prompts(
  index: search_index.LocalIndex, rng: random.Random
) -> list[tuple[str, list[Criterion]]]:
  """Writes prompts with their rubrics about documented functions.

  One in ten is small talk, which no search helps.
  """
  made = []
  for document in index.documents():
    found = _FUNCTION.match(document.text)
    if found:
      sentence = document.text[found.end() :].strip().partition("\n")[0]
      parameters = [x.strip() for x in found[3].split(",") if "=" in x]
      words = re.findall(r"[A-Za-z]{4,}", sentence)
      words = [word for word in words if word != found[1]]
      if len(words) >= 3 and parameters:
        made.append(_about(found, parameters, sentence, words, rng))
  rng.shuffle(made)
  for place in range(0, len(made), 10):
    text, phrases = rng.choice(_SMALL_TALK)
    made[place] = (text, [_criterion("tone", "It says it.", phrases)])
  return made


def read_prompts(path: pathlib.Path) -> list[tuple[str, list[Criterion]]]:
  """Reads existing prompts: rows of `prompt` and `rubric`.

  Raises:
    ValueError: naming file and line, if one is no prompt with a rubric.
  """
  found = []
  for number, row in enumerate(tables.read_jsonl(path), 1):
    try:
      prompt, rubric = row["prompt"], load(row["rubric"])
      if not isinstance(prompt, str) or not prompt.strip() or not rubric:
        raise ValueError("prompt or rubric is empty")
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f"{path}:{number}: no prompt: {error}") from error
    found.append((prompt, rubric))
  return found


def _about(found, parameters, sentence, words, rng):
  """Writes a prompt about the function of a document, and its rubric."""
  name, module = found[1], found[2]
  rubric = [
    _criterion("correctness", f"It says what {name} does.", words, 2.0),
    _criterion("completeness", "It gives all defaults.", parameters, 2.0),
    Criterion(
      dimension="concision",
      text="It is no longer than a page.",
      most_chars=4000,
    ),
  ]
  if rng.random() < 0.3:  # no name to search for
    where = _criterion("correctness", "It names it.", [f"{module}.{name}"], 3.0)
    return (
      "Is there something in Python's own library for this, and with which"
      f" options? {sentence}",
      [where, *rubric],
    )
  return (
    f"What does `{name}` in Python's `{module.split('.')[-1]}` do, and what"
    " are the defaults of its parameters?",
    rubric,
  )


def _criterion(dimension, text, phrases, weight=1.0):
  return Criterion(
    dimension=dimension, text=text, weight=weight, phrases=tuple(phrases)
  )


async def judge(
  prompt: str,
  rubric: Rubric,
  source: search_index.Source,
  least_gain: float,
  *,
  scorer: Scorer = phrase_score,
  plain: Answerer = without_search,
  searching: Answerer = with_search,
) -> dict[str, Any]:
  """Tells if search helps a prompt.

  Returns:
    `reason` why it is not kept or "", `score_without` and `score_with`, and
    both `answers`.
  """
  answers = {
    "without": await plain(prompt, source),
    "with": await searching(prompt, source),
  }
  # A scorer that asks a model waits.
  before, after = [
    await asyncio.to_thread(scorer, prompt, answers[name], rubric)
    for name in ("without", "with")
  ]
  reason = ""
  if after - before < least_gain:
    reason = "search does not help enough"
    if before > 1 - least_gain:
      reason = "it is answered well without search"
  return {
    "reason": reason,
    "score_without": round(before, 4),
    "score_with": round(after, 4),
    "answers": answers,
  }


def dump(rubric: Rubric) -> list[dict[str, Any]]:
  """Returns a rubric as JSON-able values."""
  return [dataclasses.asdict(x) | {"phrases": list(x.phrases)} for x in rubric]


def load(rows: Sequence[dict[str, Any]]) -> list[Criterion]:
  """Reads what `dump` wrote; TypeError or ValueError if it is another."""
  return [Criterion(**{**x, "phrases": tuple(x["phrases"])}) for x in rows]


def environment(
  source: search_index.Source,
  task: dict[str, Any],
  *,
  scorer: Scorer = phrase_score,
) -> search.SearchEnvironment:
  """Makes the environment of a prompt, scored by its rubric.

  Args:
    source: that is searched.
    task: with `id`, `question` and `rubric` as `dump` writes it.
    scorer: of question, answer and rubric.
  """
  rubric = load(task["rubric"])
  return search.SearchEnvironment(
    source, task, scorer=lambda question, text: scorer(question, text, rubric)
  )
