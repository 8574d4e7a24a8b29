"""Where models build and verify questions over a source: two environments.

Both have the search tools and one more with which the result is handed in.
What can be checked without a model is, and a hand-in that does not pass is
told why: a question's evidence has to stand where it is said to, in documents
that were opened; so has the line that bears out a verdict. Paper section 3.2.3.
"""

from collections.abc import Mapping, Sequence
import re
from typing import Any

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis import authoring
from dsv32_jax.agents.synthesis import desk

MAX_STEPS = 300
VERDICTS = ("right", "wrong", "unsure")
_MOST_QUESTION, _MOST_ANSWER = 2000, 200
_TEXT = {"type": "string"}
_SEARCHING = tuple(x for x in search.SCHEMAS if x.name != "submit_result")


def _list_of(properties):
  items = protocol.tool("", "", properties).parameters
  return {"type": "array", "items": items, "minItems": 1, "maxItems": 40}


ASK = protocol.tool(
  "hand_in_question",
  "Hands the question in, with its short answer and the lines that bear it"
  " out, each as it stands in its document; the last of them answers.",
  {
    "question": _TEXT,
    "answer": _TEXT,
    "evidence": _list_of({"document": _TEXT, "line": _TEXT}),
  },
)
JUDGE = protocol.tool(
  "hand_in_verdicts",
  "Hands in a verdict on each answer, with a line of a document that shows it.",
  {
    "verdicts": _list_of(
      {
        "number": {"type": "integer", "minimum": 1},
        "verdict": {"type": "string", "enum": list(VERDICTS)},
        "document": _TEXT,
        "line": _TEXT,
      }
    )
  },
)
_PROMPTS = {
  "ask": """Write a question over the documents that the tools search. It starts
from "{entity}", which few documents mention: explore it first. The question
describes {entity} by {breadth} facts without its name, leads on from it by
{depth} steps, each from one document to another, and asks for one short fact
there. It has exactly one answer, which nobody guesses and no single document
tells. Hand it in with the lines that bear it out, of at least {documents}
documents that you have opened.""",
  "judge": """Which of these answers to the question are right? Look each up
with the tools; trust neither how they sound nor how many agree. An answer is
right if the documents bear it out, wrong if they contradict it, and else you
are unsure.

Question: {question}

Answers:
{answers}""",
}
_ASK_CHECKER = tools.CallChecker((*_SEARCHING, ASK))
_JUDGE_CHECKER = tools.CallChecker((*_SEARCHING, JUDGE))


class _SearchDesk(desk.Desk):
  """Search tools and a last one."""

  def __init__(self, source, name, prompt, last, checker):
    super().__init__(name, prompt, (*_SEARCHING, last), checker, MAX_STEPS)
    blank = {"id": name, "question": "", "answer": "-"}
    self._searching = search.SearchEnvironment(source, blank)
    self._source = source
    self._opened: set[str] = set()

  async def reset(self) -> protocol.Start:
    self._opened = set()
    return await super().reset()

  async def help(self, call: protocol.ToolCall) -> str:
    observation = await self._searching.carry_out(call)
    if call.name == "open":
      self._opened.add(call.arguments["document"])
    return observation

  async def _check_quote(self, document, line):
    """Raises unless a line of a document holds this text."""
    wanted = " ".join(line.split())
    found = await self._source.open(document)
    lines = (" ".join(x.split()) for x in found.text.splitlines())
    if not wanted or not any(wanted in x for x in lines):
      raise tools.ToolError(f"no line of {document!r:.100} is {line!r:.100}")


class QuestionDesk(_SearchDesk):
  """Where a question is built; see protocol.Environment."""

  def __init__(
    self,
    source: search_index.Source,
    entity: search_index.Document,
    *,
    depth: int,
    breadth: int,
  ):
    """Takes where the question starts.

    Args:
      source: that is explored.
      entity: document of the long tail.
      depth: steps from it to what is asked.
      breadth: facts that describe it.
    """
    prompt = _PROMPTS["ask"].format(
      entity=entity.title, depth=depth, breadth=breadth, documents=depth + 1
    )
    super().__init__(
      source, f"question-{entity.name}", prompt, ASK, _ASK_CHECKER
    )
    self._entity, self._depth, self._breadth = entity, depth, breadth

  async def check(self, question, answer, evidence) -> dict[str, Any]:
    if not question.strip() or len(question) > _MOST_QUESTION:
      raise tools.ToolError(f"a question has 1 to {_MOST_QUESTION} characters")
    if not search.normal(answer) or len(answer) > _MOST_ANSWER:
      raise tools.ToolError(f"an answer has 1 to {_MOST_ANSWER} characters")
    if authoring.tells_answer(question, answer):
      raise tools.ToolError("the question tells its answer")
    if search.normal(self._entity.title) in search.normal(question):
      raise tools.ToolError("the question names what it starts from")
    quoted = list(dict.fromkeys(x["document"] for x in evidence))
    if unread := [x for x in quoted if x not in self._opened]:
      raise tools.ToolError(f"{unread[0]!r:.100} was quoted and not opened")
    if self._entity.name not in quoted:
      raise tools.ToolError(f"nothing of {self._entity.name!r} is quoted")
    if len(quoted) < self._depth + 1:
      raise tools.ToolError(
        f"{len(quoted)} documents are quoted, not {self._depth + 1}"
      )
    about = [x for x in evidence if x["document"] == self._entity.name]
    if len(about) < self._breadth:
      raise tools.ToolError(
        f"{len(about)} lines describe what it starts from, not {self._breadth}"
      )
    for quote in evidence:
      await self._check_quote(**quote)
    if not _holds(evidence[-1], answer):
      raise tools.ToolError("the last line of the evidence lacks the answer")
    return {"question": question, "answer": answer, "evidence": evidence}


class VerdictDesk(_SearchDesk):
  """Where answers are judged; which is the truth is not told."""

  def __init__(
    self, source: search_index.Source, question: str, answers: Sequence[str]
  ):
    """Takes what is judged, in the order in which it is shown."""
    shown = "\n".join(f"{n}. {text}" for n, text in enumerate(answers, 1))
    prompt = _PROMPTS["judge"].format(question=question, answers=shown)
    super().__init__(source, "verdicts", prompt, JUDGE, _JUDGE_CHECKER)
    self._answers = answers

  async def check(self, verdicts) -> dict[str, str]:
    numbers = sorted(x["number"] for x in verdicts)
    if numbers != list(range(1, len(self._answers) + 1)):
      raise tools.ToolError(
        f"there must be one verdict on each of {len(self._answers)} answers"
      )
    for found in verdicts:
      if found["verdict"] == "unsure":
        continue
      await self._check_quote(found["document"], found["line"])
      answer = self._answers[found["number"] - 1]
      if found["verdict"] == "right" and not _holds(found, answer):
        raise tools.ToolError(
          f"answer {found['number']} is no part of the line that shows it"
        )
    return {self._answers[x["number"] - 1]: x["verdict"] for x in verdicts}


def _holds(quote: Mapping[str, str], answer: str) -> bool:
  """Tells if a quoted line, or its document's name, holds an answer."""
  text = re.sub(r"\s+", " ", f"{quote['document']} {quote['line']}")
  return search.normal(answer) in text.casefold()
