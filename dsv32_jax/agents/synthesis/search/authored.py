"""A whole synthesis of search questions that a model writes and verifies.

Four parts, each a policy: a constructor, which explores from a document of the
long tail; answerers, which differ in model or system prompt; a verifier, which
judges all answers in several passes, in another order each and without knowing
which is the constructor's. A question is kept if in every pass the
constructor's answer is right and every other is wrong. The files are those of
the procedural synthesis (`campaign`, `export`).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import pathlib
import random
from typing import Any

from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis import authoring
from dsv32_jax.agents.synthesis.search import answering
from dsv32_jax.agents.synthesis.search import campaign
from dsv32_jax.agents.synthesis.search import constructing
from dsv32_jax.agents.synthesis.search import desks
from dsv32_jax.agents.synthesis.search import verifying

# Agents that answer differ by what they are told.
ANSWERER_PROMPTS = {
  "plain": "",
  "thorough": "Look up every step of the question before you answer.",
  "hasty": "Answer after one or two searches at most.",
  "from_memory": "Answer at once from what you know, without a search.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchAuthoringConfig(authoring.AuthoringConfig):
  """What a model is asked to write.

  Attributes:
    seed: of what is drawn: documents, depth, breadth, orders.
    corpus: index of documents, as `search_index.build` writes it; "" for the
      documentation of Python.
    modules: top-level modules of that; none for all.
    most_mentions: documents that may mention one of the long tail.
    depths: numbers of steps to draw from.
    breadths: numbers of facts to draw from.
    passes: of the verification.
    num_helpful: prompts of the second source to try.
    prompts: see pipeline.SearchSynthesisConfig.
    least_gain: of score by which search must help a prompt.
  """

  seed: int = 0
  corpus: str = ""
  modules: tuple[str, ...] = ()
  most_mentions: int = 8
  depths: tuple[int, ...] = (1, 2, 3)
  breadths: tuple[int, ...] = (2, 3, 4)
  passes: int = 2
  num_helpful: int = 0
  prompts: str = ""
  least_gain: float = 0.3

  def __post_init__(self):
    super().__post_init__()
    for name in ("most_mentions", "passes"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    for name, least in (("depths", 0), ("breadths", 1)):
      values = getattr(self, name)
      if not values or min(values) < least or max(values) > 8:
        raise ValueError(f"{name}={values} must be numbers from {least} to 8")
    if self.num_helpful < 0 or not 0 < self.least_gain <= 1:
      raise ValueError(
        f"num_helpful={self.num_helpful} must not be negative, least_gain="
        f"{self.least_gain} above 0 and at most 1"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Team:
  """Who does what; one model may do all of it.

  Attributes:
    constructor: writes questions.
    answerers: name to what answers a question.
    verifier: judges answers.
  """

  constructor: policies.Policy
  answerers: Mapping[str, answering.Answerer]
  verifier: policies.Policy


def team_of_one(policy: policies.Policy, config: SearchAuthoringConfig) -> Team:
  """Returns a team of one model under several system prompts."""
  return Team(
    constructor=policy,
    answerers={
      name: answering.policy_answerer(
        policy, system_prompt=text, limits=config.limits()
      )
      for name, text in ANSWERER_PROMPTS.items()
    },
    verifier=policy,
  )


def run(
  config: SearchAuthoringConfig,
  workdir: pathlib.Path,
  make_team: Callable[[], Team],
  progress: authoring.Progress = iter,
) -> None:
  """Has questions written until there are enough; see authoring.fill.

  Raises:
    ValueError: besides, no document is of the long tail.
  """
  index = campaign.open_corpus(config, workdir)
  try:
    names = _long_tail(index, config)
    if not names:
      raise ValueError(
        f"config.most_mentions={config.most_mentions}: no document is mentioned"
        " by so few"
      )
    make = functools.partial(candidate, config, make_team(), index, names)
    authoring.fill(config, workdir, "search", make, progress)
  finally:
    index.close()


def _long_tail(index, config) -> list[str]:
  rng = random.Random(f"{config.seed}/tail")
  if not config.corpus:
    return constructing.long_tail(index, config.most_mentions, rng)
  names = [
    document.name
    for document in index.documents()
    if index.document_frequency(document.title) <= config.most_mentions
  ]
  rng.shuffle(names)
  return names


async def candidate(
  config: SearchAuthoringConfig,
  team: Team,
  index: search_index.LocalIndex,
  names: Sequence[str],
  row_id: str,
  number: int,
) -> dict[str, Any]:
  """Has one question written and verified; returns its row without the id.

  Args:
    config: what to make.
    team: who does it.
    index: that is searched.
    names: documents to start from.
    row_id: of the row.
    number: of the candidate.
  """
  rng = random.Random(f"{config.seed}/{number}")
  row: dict[str, Any] = {
    "entity": names[number % len(names)],
    "depth": rng.choice(config.depths),
    "breadth": rng.choice(config.breadths),
    "reason": "",
    "status": "kept",
  }
  try:
    await _fill(row, config, team, index, rng, row_id)
  except constructing.Rejection as rejection:
    row |= {"reason": str(rejection), "status": "rejected"}
  return row


async def _fill(row, config, team, index, rng, row_id):
  place = desks.QuestionDesk(
    index,
    index.open_now(row["entity"]),
    depth=row["depth"],
    breadth=row["breadth"],
  )
  made = await _hand_in(team.constructor, place, row_id, config)
  row["refusals"] = place.refusals
  if place.handed_in is None:
    raise constructing.Rejection(authoring.unfinished(made))
  row |= place.handed_in
  await verifying.check_evidence(index, row["evidence"])
  row["answers"] = {
    name: await answer_of(row["question"], index)
    for name, answer_of in team.answerers.items()
  }
  verifying.check_answers(row["answer"], row["answers"])
  row["verdicts"] = []
  for _ in range(config.passes):
    await _one_pass(row, config, team, index, rng, row_id)


async def _one_pass(row, config, team, index, rng, row_id):
  """Has all answers judged once; raises unless the truth alone is right."""
  answers = {search.normal(row["answer"]): row["answer"]}
  for text in row["answers"].values():
    if search.normal(text):
      answers.setdefault(search.normal(text), text)
  shown = list(answers.values())
  rng.shuffle(shown)
  place = desks.VerdictDesk(index, row["question"], shown)
  judged = await _hand_in(team.verifier, place, f"{row_id}/verdicts", config)
  if place.handed_in is None:
    told = authoring.unfinished(judged)
    raise constructing.Rejection(f"the verification: {told}")
  found = place.handed_in
  row["verdicts"].append(found)
  if found[row["answer"]] != "right":
    raise constructing.Rejection(
      f"the truth is judged {found[row['answer']]} in pass"
      f" {len(row['verdicts'])}"
    )
  for text, verdict in found.items():
    if text != row["answer"] and verdict != "wrong":
      raise constructing.Rejection(f"a candidate's answer is judged {verdict}")


async def _hand_in(policy, place, episode_id, config) -> loop.EpisodeResult:
  episode = await loop.run_episode(
    policy, lambda: place, episode_id=episode_id, limits=config.limits()
  )
  return episode.result
