"""A task as it is proposed and as it is kept."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

MIN_WRONG_ANSWERS = 5


class Rejection(Exception):
  """A proposal that is not kept; the message is the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
  """A proposed task.

  Attributes:
    kind: of task.
    statement: what is asked, in natural language.
    answer_schema: JSON schema of the answer.
    solution: source of `def solve()`.
    verifier: source of `def verify(answer)`.
    wrong_answers: well-formed, and wrong for a reason other than the verifier.
  """

  kind: str
  statement: str
  answer_schema: Mapping[str, Any]
  solution: str
  verifier: str
  wrong_answers: Sequence[Any]


def object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
  """The schema of an object with just these properties, all required."""
  return {
    "type": "object",
    "properties": dict(properties),
    "required": list(properties),
    "additionalProperties": False,
  }
