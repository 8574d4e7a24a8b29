"""The shape of a response: thinking, answer, boxed result."""

from dsv32_jax.verifiers import score

THINK_START = "<think>"
THINK_END = "</think>"
_BOX = "\\boxed{"


def answer_part(response: str) -> str:
  """What follows the thinking; all of it where there is none."""
  return response.rpartition(THINK_END)[2]


def thinking_part(response: str) -> str:
  """The thinking, empty where there is none."""
  before = response.rpartition(THINK_END)[0]
  return before.removeprefix(THINK_START)


def last_boxed(text: str) -> str | None:
  r"""The content of the last \boxed{...} with matching braces, or None.

  The last counts, closed or not: one that an early box was right about must
  not be saved by it. Escaped braces are no braces.
  """
  start = text.rfind(_BOX)
  if start < 0:
    return None
  start += len(_BOX)
  depth, place = 1, start
  while place < len(text):
    if text[place] == "\\":
      place += 2
      continue
    depth += {"{": 1, "}": -1}.get(text[place], 0)
    if depth == 0:
      return text[start:place]
    place += 1
  return None


def format_score(
  response: str, *, thinking: bool, boxed: bool = False
) -> score.Score:
  """1 if the response has the asked shape, else 0 and the reason.

  The prompt ends with the opening tag (or, in chat mode, the closing one), so
  that a response need not begin with it.

  Args:
    response: what the model wrote.
    thinking: it must close its thinking exactly once and then answer; where
      False, it must hold no tag of thinking.
    boxed: its answer must hold a boxed result.
  """
  body = response.removeprefix(THINK_START) if thinking else response
  ends = body.count(THINK_END)
  error = ""
  if body.count(THINK_START):
    error = "a second or misplaced <think>"
  elif thinking and ends != 1:
    error = f"{ends} closing </think> instead of 1"
  elif not thinking and ends:
    error = "</think> without thinking"
  elif not answer_part(response).strip():
    error = "no answer"
  elif boxed and last_boxed(answer_part(response)) is None:
    error = "no boxed answer"
  return score.Score(value=float(not error), error=error)
