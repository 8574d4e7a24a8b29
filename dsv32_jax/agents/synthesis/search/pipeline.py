"""One candidate from a class of the long tail to a task, or a rejection."""

import asyncio
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import random
import time
from typing import Any

from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.search import answering
from dsv32_jax.agents.synthesis.search import browsing
from dsv32_jax.agents.synthesis.search import constructing
from dsv32_jax.agents.synthesis.search import questions
from dsv32_jax.agents.synthesis.search import reading
from dsv32_jax.agents.synthesis.search import verifying


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSynthesisConfig:
  """What to synthesise; the paper's number of search tasks is 50,275.

  Attributes:
    seed: equal seeds give equal files.
    num_tasks: to keep.
    max_candidates: after as many it ends, however many are kept.
    most_mentions: documents that may mention a class of the long tail.
    depths: numbers of hops to draw from.
    breadths: numbers of clues to draw from.
    passes: walks of the verification.
    modules: top-level modules whose documentation is searched; none for all.
    num_helpful: prompts of the second source to try.
    prompts: JSONL of existing prompts, each with its rubric as
      `helpful.dump` writes it; "" for prompts about the documentation.
    least_gain: of score by which search must help a prompt.
    workers: processes; they do not change what is written.
  """

  seed: int = 0
  num_tasks: int = 400
  max_candidates: int = 20_000
  most_mentions: int = 8
  depths: tuple[int, ...] = (1, 2, 3)
  breadths: tuple[int, ...] = (2, 3, 4)
  passes: int = 2
  modules: tuple[str, ...] = ()
  num_helpful: int = 400
  prompts: str = ""
  least_gain: float = 0.3
  workers: int = 2

  def __post_init__(self):
    positive = ("num_tasks", "max_candidates", "most_mentions")
    for name in (*positive, "passes", "workers"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    if self.num_helpful < 0:
      raise ValueError(f"num_helpful={self.num_helpful} must not be negative")
    if not self.depths or min(self.depths) < 0 or max(self.depths) > 8:
      raise ValueError(f"depths={self.depths} must be numbers from 0 to 8")
    if not self.breadths or min(self.breadths) < 1 or max(self.breadths) > 8:
      raise ValueError(f"breadths={self.breadths} must be numbers from 1 to 8")
    if not 0 < self.least_gain <= 1:
      raise ValueError(
        f"least_gain={self.least_gain} must be above 0 and at most 1"
      )


@functools.lru_cache(maxsize=1)
def library(
  path: str,
) -> tuple[search_index.LocalIndex, dict[str, reading.Entity]]:
  """Opens an index and reads all its classes, once a process."""
  index = search_index.LocalIndex(path)
  entities = (reading.read(document.text) for document in index.documents())
  return index, {x.name: x for x in entities if x is not None}


def synthesize(
  config: SearchSynthesisConfig,
  path: str,
  tail: Sequence[str],
  index: int,
  answerers: Mapping[str, answering.Answerer] = answering.ANSWERERS,
) -> dict[str, Any]:
  """Makes one candidate.

  Args:
    config: seed and numbers.
    path: of the index.
    tail: classes to ask about.
    index: of the candidate.
    answerers: whose answers must all be wrong.

  Returns:
    A row of candidates.jsonl: `id`, `entity`, `depth`, `breadth`, `reason`
    why it is not kept or "", and as far as it came `question`, `answer`,
    `chain`, `evidence`, `answers`, `messages` of the first walk (of a task
    that is kept), and `seconds`.
  """
  rng = random.Random(f"{config.seed}/{index}")
  row: dict[str, Any] = {
    "id": f"search-{index:06d}",
    "entity": tail[index % len(tail)],
    "depth": rng.choice(config.depths),
    "breadth": rng.choice(config.breadths),
    "reason": "",
  }
  begun = time.process_time()
  try:
    asyncio.run(_fill(row, config, path, answerers, rng))
  except constructing.Rejection as rejection:
    row["reason"] = str(rejection)
    row.pop("messages", None)
  row["seconds"] = round(time.process_time() - begun, 3)
  return row


async def _fill(row, config, path, answerers, rng):
  index, entities = library(path)
  chain, answer, evidence = await constructing.construct(
    browsing.Browser(index),
    row["entity"],
    depth=row["depth"],
    breadth=row["breadth"],
    rng=rng,
  )
  row |= {
    "question": questions.write(chain),
    "answer": answer,
    "chain": json.loads(json.dumps(dataclasses.asdict(chain))),
    "evidence": evidence,
  }
  verifying.scan(entities, chain, answer)
  await verifying.check_evidence(index, evidence)
  for _ in range(config.passes):
    browser = await verifying.walk(index, row, rng)
    row.setdefault("messages", browser.messages(row))
  row["answers"] = {
    name: await answer_of(row["question"], index)
    for name, answer_of in answerers.items()
  }
  verifying.check_answers(answer, row["answers"])
