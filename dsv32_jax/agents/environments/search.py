"""The environment of a search task: search, open, find, submit an answer.

Pages of hits, of a document and of matches are numbered from 1. The reward is
1 if the submitted answer equals the task's answer or one of its aliases once
case, white space and enclosing marks are left aside; a task with a rubric has
a scorer instead (a function of question and answer to 0 to 1).
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import checked
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import search_index

Scorer = Callable[[str, str], float]

MAX_ANSWER_CHARS = 20_000
_MAX_FOUND_LINE = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchLimits:
  """Sizes of pages, and the length of an episode.

  Attributes:
    hits: a page of `search`.
    page_chars: a page of `open`, cut at line ends.
    matches: a page of `find`.
    max_steps: after as many calls an episode is done.
  """

  hits: int = 10
  page_chars: int = 4000
  matches: int = 20
  max_steps: int = 2000

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise ValueError(
          f"{field.name}={getattr(self, field.name)} must be at least 1"
        )


def _schema(name, description, *required):
  text, page = {"type": "string"}, {"type": "integer", "minimum": 1}
  properties = {**dict.fromkeys(required, text), "page": page}
  return protocol.tool(name, description, properties, required)


SCHEMAS = (
  _schema(
    "search",
    "Finds documents by words; a phrase stands in double quotes. Returns a"
    " page of names, titles and snippets, best first.",
    "query",
  ),
  _schema("open", "Returns a page of a document.", "document"),
  _schema(
    "find",
    "Returns the lines of a document that hold a text, whatever the case, with"
    " the page each is on.",
    "document",
    "text",
  ),
  protocol.tool(
    "submit_result",
    "Submits the answer and ends the task.",
    {"answer_text": {"type": "string"}},
  ),
)

_CHECKER = tools.CallChecker(SCHEMAS)


class SearchEnvironment(checked.CheckedEnvironment):
  """One question over one source; see protocol.Environment."""

  def __init__(
    self,
    source: search_index.Source,
    task: Mapping[str, Any],
    *,
    limits: SearchLimits = SearchLimits(),
    scorer: Scorer | None = None,
  ):
    """Takes a task.

    Args:
      source: that is searched; it stays open when the environment closes.
      task: `id`, `question`, and `answer` with `aliases`, if any; `corpus`,
        if any, is the identity that the source must have.
      limits: sizes of pages.
      scorer: of question and answer, in the place of the task's answer.

    Raises:
      ValueError: the source is not the task's, or nothing says what is right.
    """
    wanted = task.get("corpus")
    if wanted and getattr(source, "identity", wanted) != wanted:
      raise ValueError(f"task {task['id']}: its corpus is {wanted}, not this")
    if scorer is None and not task.get("answer"):
      raise ValueError(f"task {task['id']} has neither an answer nor a scorer")
    super().__init__(task["id"], _CHECKER, limits.max_steps)
    self.task = task
    self._source, self._limits, self._scorer = source, limits, scorer
    self._functions = {
      "search": self._search,
      "open": self._open,
      "find": self._find,
      "submit_result": self._submit,
    }

  async def reset(self) -> protocol.Start:
    self.begin(answer=None)
    return protocol.Start(observation=prompt(self.task), tools=SCHEMAS)

  async def verify(self) -> float:
    answer = self.state["answer"]
    if answer is None:
      return 0.0
    if self._scorer is not None:
      return float(self._scorer(self.task["question"], answer))
    return float(is_right(answer, self.task))

  def snapshot(self) -> dict[str, Any]:
    return {"task": self.task["id"], "state": dict(self.state)}

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    self.check_snapshot(snapshot)
    self._state = dict(snapshot["state"])

  async def close(self) -> None:
    """The source is shared, so there is nothing to give back."""

  async def carry_out(self, call: protocol.ToolCall) -> str:
    return await self._functions[call.name](**call.arguments)

  async def _search(self, query: str, page: int = 1) -> str:
    count = self._limits.hits
    hits = await self._source.search(
      query, offset=(page - 1) * count, count=count
    )
    if not hits:
      return f"no hits on page {page}"
    return "\n\n".join(
      f"{hit.name}\n{hit.title}\n{' '.join(hit.snippet.split())}"
      for hit in hits
    )

  async def _open(self, document: str, page: int = 1) -> str:
    found = await self._source.open(document)
    pages = search_index.split(found.text, self._limits.page_chars)
    if page > len(pages):
      raise tools.ToolError(f"the document has {len(pages)} pages")
    return f"{found.title} (page {page} of {len(pages)})\n\n{pages[page - 1]}"

  async def _find(self, document: str, text: str, page: int = 1) -> str:
    if not text.strip():
      raise tools.ToolError("the text to find is empty")
    found = await self._source.open(document)
    wanted, matches = text.casefold(), []
    pages = search_index.split(found.text, self._limits.page_chars)
    for number, content in enumerate(pages, 1):
      for line in content.splitlines():
        if wanted in line.casefold():
          matches.append(f"page {number}: {line.strip()[:_MAX_FOUND_LINE]}")
    count = self._limits.matches
    shown = matches[(page - 1) * count : page * count]
    if not shown:
      return f"{len(matches)} lines hold it, none on page {page}"
    return "\n".join([f"{len(matches)} lines hold it", *shown])

  async def _submit(self, answer_text: str) -> str:
    if len(answer_text) > MAX_ANSWER_CHARS:
      raise tools.ToolError(
        f"the answer has more than {MAX_ANSWER_CHARS} characters"
      )
    self.state.update(done=True, answer=answer_text)
    return "The answer is submitted."


def descriptions() -> list[dict[str, Any]]:
  """Returns the tools as a system message has them."""
  return _CHECKER.descriptions()


def prompt(task: Mapping[str, Any]) -> str:
  """Returns the user's message of a task."""
  return (
    f"{task['question']}\n\nFind the answer with the tools and submit it with"
    " submit_result."
  )


def is_right(answer: str, task: Mapping[str, Any]) -> bool:
  """Tells if an answer is the task's, or one of its aliases."""
  right = (task["answer"], *task.get("aliases", ()))
  return normal(answer) in {normal(text) for text in right}


def normal(text: str) -> str:
  """Returns an answer without case, outer white space, marks and full stop."""
  text = re.sub(r"\s+", " ", text).strip().casefold()
  return text.strip("`'\"").rstrip(".").strip("`'\" ")
