"""The environment of a synthesised general task: SQLite behind tools.

The database is made in memory from the rows of the environment's record and
cannot be written to. Nothing waits, so a policy that runs in this process may
use `start`, `call` and `reward` in the place of the coroutines.
"""

from collections.abc import Callable, Mapping
import functools
import json
import sqlite3
from typing import Any

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import checked
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import read_only
from dsv32_jax.agents.synthesis.general import programs
from dsv32_jax.agents.synthesis.general import tool_specs

MAX_STEPS = 2000
MAX_ANSWER_CHARS = 100_000


class GeneralEnvironment(checked.CheckedEnvironment):
  """One task over one database; see protocol.Environment."""

  def __init__(
    self,
    record: Mapping[str, Any],
    task: Mapping[str, Any],
    *,
    max_steps: int = MAX_STEPS,
  ):
    """Makes the database.

    Args:
      record: of an environment, as the pipeline writes it.
      task: one of its tasks.
      max_steps: after as many calls an episode is done.

    Raises:
      ValueError: if max_steps is less than 1.
    """
    self.connection = read_only.connect(record["rows"])
    specs = [tool_specs.ToolSpec.load(spec) for spec in record["tools"]]
    self.tools = Tools(specs, self.connection)
    super().__init__(task["id"], self.tools, max_steps)
    self.task = task
    self.judge = Judge(task["answer_schema"], task["verifier"], self.connection)

  async def reset(self) -> protocol.Start:
    return self.start()

  async def verify(self) -> float:
    return self.reward()

  def snapshot(self) -> dict[str, Any]:
    return {"task": self.task["id"], "state": dict(self.state)}

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    self.check_snapshot(snapshot)
    self._state = dict(snapshot["state"])

  async def close(self) -> None:
    self.connection.close()

  async def carry_out(self, call: protocol.ToolCall) -> str:
    value = self.tools.value(call.name, call.arguments)
    if call.name == tool_specs.SUBMIT.name:
      self.state.update(done=True, answer=call.arguments["answer_text"])
      return "The answer is submitted."
    return json.dumps(value, ensure_ascii=False)

  def start(self) -> protocol.Start:
    """Is `reset` for callers without an event loop."""
    self.begin(answer=None)
    return protocol.Start(
      observation=prompt(self.task), tools=self.tools.schemas
    )

  def call(self, name: str, arguments: Any) -> protocol.Step:
    """Is `step` for callers without an event loop: nothing here waits."""
    step = self.step(protocol.ToolCall(name=name, arguments=arguments))
    try:
      step.send(None)
    except StopIteration as ended:
      return ended.value
    raise AssertionError("a general tool waits")

  def reward(self) -> float:
    """Returns 1 if the submitted answer fits its schema and is right."""
    text = self.state["answer"]
    if text is None:
      return 0.0
    try:
      return float(self.judge.accepts(parse_answer(text)))
    except ValueError:
      return 0.0


class Judge:
  """Tells which answers are right."""

  def __init__(
    self,
    schema: Mapping[str, Any],
    verifier: str,
    connection: sqlite3.Connection,
  ):
    """Takes schema and source; ValueError if one is not what it must be."""
    self._checker = answer_checker(schema)
    self._verify = load_verifier(verifier, connection)

  def fits(self, answer: Any) -> bool:
    """Tells if an answer is of the schema."""
    try:
      self._checker.check("answer", {"answer": answer})
    except tools.ToolError:
      return False
    return True

  def accepts(self, answer: Any) -> bool:
    """Tells if an answer is of the schema and right."""
    return self.fits(answer) and self._verify(answer)


class Tools(tools.CallChecker):
  """Tools of a database, by name."""

  def __init__(
    self, specs: list[tool_specs.ToolSpec], connection: sqlite3.Connection
  ):
    self.schemas = tuple(
      protocol.ToolSchema(
        name=spec.name,
        description=spec.description,
        parameters=spec.parameters,
      )
      for spec in specs
    )
    super().__init__(self.schemas)
    self._specs = {spec.name: spec for spec in specs}
    self._connection = connection

  def value(self, name: str, arguments: Mapping[str, Any]) -> Any:
    """Returns what a tool answers to a call that was checked.

    Raises:
      tools.ToolError: if the arguments name nothing.
    """
    try:
      return tool_specs.execute(self._specs[name], arguments, self._connection)
    except UnicodeEncodeError as error:
      raise tools.ToolError(f"{name}: text is no Unicode") from error

  def functions(self, calls: list[tuple[str, Any, Any]]):
    """Returns the tools as functions of keywords, each call noted.

    Args:
      calls: (name, arguments, value) of each call is appended here.
    """

    def function(name):
      def run(**arguments):
        self.check(name, arguments)
        value = self.value(name, arguments)
        calls.append((name, arguments, value))
        return value

      return run

    return {
      name: function(name)
      for name in self._specs
      if name != tool_specs.SUBMIT.name
    }


def prompt(task: Mapping[str, Any]) -> str:
  """Returns the user's message of a task."""
  schema = json.dumps(task["answer_schema"])
  return (
    f"{task['statement']}\n\nSubmit the answer with submit_result, as JSON of"
    f" this schema: {schema}"
  )


def load_verifier(
  source: str, connection: sqlite3.Connection
) -> Callable[[Any], bool]:
  """Returns the function of a checked verifier.

  Raises:
    ValueError: if the program does what a verifier must not.
  """

  def query(sql, *values):
    try:
      return [list(row) for row in connection.execute(sql, values)]
    # A name that is no Unicode is in no row.
    except UnicodeEncodeError:
      return []

  _check_verifier(source)
  return programs.load(source, "verify", {"query": query})


def parse_answer(text: str) -> Any:
  """Parses JSON that a policy wrote.

  Raises:
    ValueError: if it is none, has NaN or infinities, or is too long or deep.
  """
  if len(text) > MAX_ANSWER_CHARS:
    raise ValueError(f"the answer has more than {MAX_ANSWER_CHARS} characters")
  try:
    return json.loads(text, parse_constant=_refuse)
  except RecursionError as error:
    raise ValueError("the answer is nested too deeply") from error


def _refuse(constant):
  raise ValueError(f"JSON has no {constant}")


@functools.lru_cache(maxsize=4096)
def _check_verifier(source):
  programs.check(source, "verify", 1, ("query",))


def answer_checker(schema: Mapping[str, Any]) -> tools.CallChecker:
  """Returns what checks {"answer": value} under the name "answer".

  Raises:
    ValueError: it is no JSON schema.
  """
  parameters = {"type": "object", "properties": {"answer": schema}}
  return tools.CallChecker(
    [protocol.ToolSchema(name="answer", description="", parameters=parameters)]
  )
