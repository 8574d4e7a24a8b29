"""Outcome reward of mathematics: is the boxed answer equal to the truth.

math-verify parses and compares. Its own timeouts are signals, which work in no
thread and stop no loop inside sympy; here the process is killed instead.
"""

from collections.abc import Sequence

import math_verify

from dsv32_jax.verifiers import format as format_lib
from dsv32_jax.verifiers import score
from dsv32_jax.verifiers import workers

# Longer ones are no answers, and cost the parser much.
MAX_ANSWER_CHARACTERS = 2000
_MEMORY_BYTES = 4 * 2**30


def equal_answers(pair: tuple[str, str]) -> bool:
  """Tells if (answer found, truth) are the same; may hang or crash.

  Raises:
    ValueError: if the truth cannot be parsed.
  """
  found, truth = (_parse(text) for text in pair)
  if not truth:
    raise ValueError(f"truth={pair[1]!r} cannot be parsed")
  # The order matters to math-verify: the truth comes first.
  return math_verify.verify(
    truth, found, timeout_seconds=None, raise_on_error=True
  )


def _parse(text):
  # The text alone decides, whatever stands around it.
  return math_verify.parse(
    f"$\\boxed{{{text}}}$",
    extraction_config=[
      math_verify.LatexExtractionConfig(boxed_match_priority=0)
    ],
    fallback_mode="no_fallback",
    parsing_timeout=None,
  )


class MathVerifier:
  """Compares many answers at once, each in a process that may be killed."""

  def __init__(self, *, num_workers: int = 2, timeout_seconds: float = 10.0):
    self._pool = workers.WorkerPool(
      equal_answers,
      num_workers=num_workers,
      timeout_seconds=timeout_seconds,
      memory_bytes=_MEMORY_BYTES,
    )

  def score(
    self, responses: Sequence[str], truths: Sequence[str]
  ) -> list[score.Score]:
    """1 for each response whose last boxed answer equals the truth, else 0.

    Only what follows the thinking counts. A timeout, a crash and an answer
    that cannot be read are zeros with their reason.

    Raises:
      ValueError: if there are not as many truths as responses.
    """
    if len(responses) != len(truths):
      raise ValueError(f"{len(responses)=} differs from {len(truths)=}")
    scores = [score.Score(value=0.0, error="no boxed answer")] * len(responses)
    pairs = {}
    for place, (response, truth) in enumerate(zip(responses, truths)):
      found = format_lib.last_boxed(format_lib.answer_part(response))
      if found is None:
        continue
      if len(found) > MAX_ANSWER_CHARACTERS:
        error = f"an answer of {len(found)} characters"
        scores[place] = score.Score(value=0.0, error=error)
      else:
        pairs[place] = (found, truth)
    for place, outcome in zip(pairs, self._pool.map(list(pairs.values()))):
      scores[place] = score.Score(
        value=float(bool(outcome.value)), error=outcome.error
      )
    return scores

  def close(self) -> None:
    """Ends the workers."""
    self._pool.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()
