"""Rewards for proofs: verifier, meta-verifier and generator.

DeepSeekMath-V2. Scores are 0 (fatal gaps), 0.5 (sound with minor errors) and
1 (complete and rigorous). The paper publishes neither the number of analyses
nor how many must agree in automatic labelling: both are arguments here.
"""

from collections.abc import Sequence
import dataclasses
import re

from dsv32_jax.verifiers import format as format_lib
from dsv32_jax.verifiers import score

SCORES = (0.0, 0.5, 1.0)
# The phrases that make an analysis well formed.
EVALUATION = "Here is my evaluation of the solution:"
FINAL_SCORE = "Based on my evaluation, the final overall score should be:"
# The sections of a generator's response.
SOLUTION = "## Solution"
SELF_EVALUATION = "## Self Evaluation"
# Weights of the proof's score and of the self-evaluation's (equation 5).
PROOF_WEIGHT = 0.76
SELF_WEIGHT = 0.24


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorResponse:
  """A proof and what its author says of it.

  Attributes:
    solution: the proof.
    evaluation: the self-evaluation.
    self_score: the score that the author gives, one of SCORES.
  """

  solution: str
  evaluation: str
  self_score: float


def read_score(analysis: str) -> float | None:
  """The score of a well-formed analysis, or None.

  It holds the opening phrase, then the closing phrase once, and the last
  boxed text after that is 0, 0.5 or 1.
  """
  before, phrase, after = analysis.partition(FINAL_SCORE)
  if not phrase or FINAL_SCORE in after or EVALUATION not in before:
    return None
  boxed = format_lib.last_boxed(after)
  if boxed is None or not re.fullmatch(r"\s*(0|1|[01]\.0|0?\.5)\s*", boxed):
    return None
  return float(boxed)


def verifier_reward(
  analysis: str, truth: float, *, meta_score: float | None = None
) -> score.Score:
  """Reward of a verifier, or of a meta-verifier: format times score.

  Equations 1 to 3: 1 - |s' - s|, times the meta-verifier's score of the
  analysis where given, and 0 where the analysis is not well formed.

  Args:
    analysis: what the model wrote.
    truth: the expert's score of the proof (of the analysis, for a
      meta-verifier).
    meta_score: R_meta of the analysis.

  Raises:
    ValueError: if a given score is none of SCORES.
  """
  _check_score("truth", truth)
  if meta_score is not None:
    _check_score("meta_score", meta_score)
  found = read_score(format_lib.answer_part(analysis))
  if found is None:
    return score.Score(value=0.0, error="analysis without phrases and score")
  value = 1.0 - abs(found - truth)
  return score.Score(value=value * (1.0 if meta_score is None else meta_score))


def read_response(response: str) -> GeneratorResponse | None:
  """Reads a generator's response, or None where it is not well formed."""
  text = format_lib.answer_part(response)
  lines = [line.strip() for line in text.split("\n")]
  if lines.count(SOLUTION) != 1 or lines.count(SELF_EVALUATION) != 1:
    return None
  first, second = lines.index(SOLUTION), lines.index(SELF_EVALUATION)
  raw = text.split("\n")
  solution = "\n".join(raw[first + 1 : second]).strip()
  evaluation = "\n".join(raw[second + 1 :]).strip()
  self_score = read_score(evaluation)
  if first > second or not solution or self_score is None:
    return None
  return GeneratorResponse(
    solution=solution, evaluation=evaluation, self_score=self_score
  )


def generator_reward(
  response: str, proof_score: float, meta_score: float
) -> score.Score:
  """Reward of a generator (equations 5 and 6).

  0.76 of the verifier's score of the proof, and 0.24 of how close the author
  came to it, times the meta-verifier's score of the self-evaluation.

  Raises:
    ValueError: if a given score is none of SCORES.
  """
  _check_score("proof_score", proof_score)
  _check_score("meta_score", meta_score)
  read = read_response(response)
  if read is None:
    return score.Score(value=0.0, error="response without its two sections")
  self_reward = (1.0 - abs(read.self_score - proof_score)) * meta_score
  return score.Score(
    value=PROOF_WEIGHT * proof_score + SELF_WEIGHT * self_reward
  )


def automatic_label(
  scores: Sequence[float],
  confirmations: Sequence[Sequence[bool]],
  *,
  needed: int,
) -> float | None:
  """Labels a proof from several analyses and meta-verifications of them.

  An analysis that finds fault is valid if more than half of its
  meta-verifications confirm it.

  Args:
    scores: of the analyses.
    confirmations: for each analysis, whether each meta-verification found its
      faults real; those of an analysis that scores 1 are not read.
    needed: valid analyses with the lowest score that make it the label.

  Returns:
    The lowest score of all analyses, if so many valid ones give it; 1 if no
    analysis that finds fault is valid; otherwise None: a case for experts.

  Raises:
    ValueError: if the arguments do not fit.
  """
  if len(scores) != len(confirmations) or not scores:
    raise ValueError(f"{len(scores)=} and {len(confirmations)=} must be equal")
  if needed < 1:
    raise ValueError(f"{needed=} must be positive")
  for value in scores:
    _check_score("scores", value)
  valid = [
    value
    for value, votes in zip(scores, confirmations)
    if value < 1 and 2 * sum(votes) > len(votes)
  ]
  if not valid:
    return 1.0
  lowest = min(scores)
  return lowest if valid.count(lowest) >= needed else None


def _check_score(name, value):
  if value not in SCORES:
    raise ValueError(f"{name}={value} must be one of {SCORES}")
