"""The environment of a synthesised general task: SQLite behind tools.

The database is made in memory from the rows of the environment's record and
cannot be written to. `call` is the whole step without waiting; a policy that
runs in this process may use it directly.
"""

from collections.abc import Callable, Mapping
import functools
import json
import sqlite3
from typing import Any

import jsonschema

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import read_only
from dsv32_jax.agents.synthesis.general import programs
from dsv32_jax.agents.synthesis.general import tool_specs

MAX_STEPS = 2000
MAX_ANSWER_CHARS = 100_000


class GeneralEnvironment:
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
    if max_steps < 1:
      raise ValueError(f"{max_steps=} must be at least 1")
    self.task = task
    self._max_steps = max_steps
    self.connection = read_only.connect(record["rows"])
    self.tools = Tools(
      [tool_specs.ToolSpec.load(spec) for spec in record["tools"]],
      self.connection,
    )
    self._verify = load_verifier(task["verifier"], self.connection)
    self._state: dict[str, Any] | None = None

  async def reset(self) -> protocol.Start:
    return self.begin()

  async def step(self, call: protocol.ToolCall) -> protocol.Step:
    return self.call(call.name, call.arguments)

  async def verify(self) -> float:
    return self.reward()

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    if snapshot["task"] != self.task["id"]:
      raise ValueError(f"{snapshot['task']=} is not {self.task['id']=}")
    self._state = dict(snapshot["state"])

  async def close(self) -> None:
    self.connection.close()

  def snapshot(self) -> dict[str, Any]:
    return {
      "task": self.task["id"],
      "state": dict(self._running()),
    }

  def begin(self) -> protocol.Start:
    """Begins an episode."""
    self._state = {"steps": 0, "done": False, "answer": None}
    return protocol.Start(
      observation=prompt(self.task), tools=self.tools.schemas
    )

  def call(self, name: str, arguments: Any) -> protocol.Step:
    """Carries out a call; see protocol.Environment.step."""
    state = self._running()
    if state["done"]:
      raise RuntimeError("the episode is done")
    state["steps"] += 1
    try:
      value = self.tools.run(name, arguments)
    except tools.ToolError as error:
      text = f"error: {error}"
    else:
      text = json.dumps(value, ensure_ascii=False)
      if name == tool_specs.SUBMIT.name:
        state |= {"done": True, "answer": arguments["answer_text"]}
        text = "The answer is submitted."
    state["done"] = state["done"] or state["steps"] >= self._max_steps
    return protocol.Step(observation=text, done=state["done"])

  def reward(self) -> float:
    """Returns 1 if the submitted answer fits its schema and is right."""
    text = self._running()["answer"]
    return float(text is not None and self.accepts(text))

  def accepts(self, answer_text: str) -> bool:
    """Tells if an answer, as JSON text, is right."""
    try:
      answer = parse_answer(answer_text)
    except ValueError:
      return False
    schema = json.dumps(self.task["answer_schema"], sort_keys=True)
    return validator(schema).is_valid(answer) and self._verify(answer)

  def _running(self):
    if self._state is None:
      raise RuntimeError("no episode runs: call reset first")
    return self._state


class Tools:
  """Tools of a database, by name; arguments are checked before they run."""

  def __init__(
    self, specs: list[tool_specs.ToolSpec], connection: sqlite3.Connection
  ):
    self.connection = connection
    self._specs = {
      spec.name: (spec, validator(json.dumps(spec.parameters)))
      for spec in specs
    }
    self.schemas = tuple(
      protocol.ToolSchema(
        name=spec.name,
        description=spec.description,
        parameters=spec.parameters,
      )
      for spec in specs
    )

  def run(self, name: str, arguments: Any) -> Any:
    """Returns what a tool answers.

    Raises:
      tools.ToolError: if there is no such tool, or the arguments are not
        of its schema or name nothing.
    """
    if name not in self._specs:
      raise tools.ToolError(f"there is no tool {name!r}")
    spec, validator = self._specs[name]
    if not validator.is_valid(arguments):
      wrong = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
      where = "".join(f".{part}" for part in wrong.absolute_path)
      raise tools.ToolError(f"{name}: arguments{where}: {wrong.message[:200]}")
    try:
      return tool_specs.execute(spec, arguments, self.connection)
    except UnicodeEncodeError as error:
      raise tools.ToolError(f"{name}: text is no Unicode") from error

  def functions(self, calls: list[tuple[str, Any, Any]]):
    """Returns the tools as functions of keywords, each call noted.

    Args:
      calls: (name, arguments, value) of each call is appended here.
    """

    def function(name):
      def run(**arguments):
        value = self.run(name, arguments)
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


@functools.lru_cache(maxsize=4096)
def validator(schema: str) -> jsonschema.Draft202012Validator:
  """Returns the validator of a JSON schema, given as text."""
  return jsonschema.Draft202012Validator(json.loads(schema))
