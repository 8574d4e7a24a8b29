"""Exact match of the final answer, after what does not matter is removed."""

from dsv32_jax.verifiers import format as format_lib
from dsv32_jax.verifiers import score


def normalized(text: str) -> str:
  """Text without outer or repeated white space, in lower case."""
  return " ".join(text.split()).casefold()


def exact_match(response: str, answer: str) -> score.Score:
  """1 if the last boxed expression of the answer part is the answer.

  Args:
    response: what the model wrote, its thinking included.
    answer: the truth.
  """
  found = format_lib.last_boxed(format_lib.answer_part(response))
  if found is None:
    return score.Score(value=0.0, error="no boxed answer")
  return score.Score(value=float(normalized(found) == normalized(answer)))
