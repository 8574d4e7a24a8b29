"""What a synthesis leaves for others: tasks, rejections, trajectories.

Each file is derived from environments.jsonl.

`tasks.jsonl` and `tasks.parquet`: a row a task.
  id, environment, domain, kind: text; level: 1 to 4;
  prompt: the user's message; tools: JSON list of {name, description,
  parameters}; answer_schema, answer, wrong_answers: JSON;
  solution, verifier: Python; solution_calls: tool calls of the solution;
  attempts_until_solved: of the filter's policy; history: JSON list of the
  levels passed, {level, solution_calls, added_tools}.
`rejections.jsonl`: environment, try, kind, level (0: before the first), reason.
`trajectories.jsonl` and `trajectories.parquet`: a row a solution.
  id: of the task; reward: what the environment gave; messages: JSON list as
  `chat.encode_messages` takes it: a system message with the tools, then user,
  assistant (content empty, tool_calls) and tool messages.
"""

from collections.abc import Iterator
import json
import pathlib
from typing import Any

import pyarrow as pa

from dsv32_jax.agents import tables
from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import general
from dsv32_jax.agents.synthesis.general import campaign
from dsv32_jax.agents.synthesis.general import solving

_TEXT, _NUMBER = pa.string(), pa.int64()
TASK_SCHEMA = pa.schema(
  {
    "id": _TEXT,
    "environment": _TEXT,
    "domain": _TEXT,
    "kind": _TEXT,
    "level": _NUMBER,
    "prompt": _TEXT,
    "tools": _TEXT,
    "answer_schema": _TEXT,
    "answer": _TEXT,
    "wrong_answers": _TEXT,
    "solution": _TEXT,
    "verifier": _TEXT,
    "solution_calls": _NUMBER,
    "attempts_until_solved": _NUMBER,
    "history": _TEXT,
  }
)
TRAJECTORY_SCHEMA = pa.schema(
  {"id": _TEXT, "reward": pa.float64(), "messages": _TEXT}
)


def export(workdir: pathlib.Path, num_trajectories: int) -> None:
  """Writes every derived file; each appears when it is whole."""
  source = workdir / campaign.ENVIRONMENTS_FILE
  rejections = (
    rejection
    for record in campaign.read(source)
    for rejection in record["rejections"]
  )
  tables.write_jsonl(workdir / "rejections.jsonl", rejections)
  tables.write(workdir / "tasks", task_rows(source), TASK_SCHEMA)
  tables.write(
    workdir / "trajectories",
    trajectory_rows(source, num_trajectories),
    TRAJECTORY_SCHEMA,
  )


def task_rows(source: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the rows of tasks.parquet."""
  for record in campaign.read(source):
    shown = ("name", "description", "parameters")
    schemas = [{k: tool[k] for k in shown} for tool in record["tools"]]
    for task in record["tasks"]:
      row = {
        "environment": record["id"],
        "domain": record["domain"],
        "prompt": general.prompt(task),
        "tools": json.dumps(schemas),
      }
      for name in TASK_SCHEMA.names:
        if name not in row:
          value = task[name]
          plain = isinstance(value, (str, int))
          row[name] = value if plain else json.dumps(value, ensure_ascii=False)
      yield {name: row[name] for name in TASK_SCHEMA.names}


def trajectory_rows(
  source: pathlib.Path, number: int
) -> Iterator[dict[str, Any]]:
  """Yields the rows of trajectories.parquet, played in the environment."""
  for record in campaign.read(source):
    for task in record["tasks"]:
      if number == 0:
        return
      number -= 1
      messages, reward = trajectory(record, task)
      text = json.dumps(messages, ensure_ascii=False)
      yield {"id": task["id"], "reward": reward, "messages": text}


def trajectory(record, task) -> tuple[list[dict[str, Any]], float]:
  """Plays a task's solution; returns its messages and the reward."""
  environment = general.GeneralEnvironment(record, task)
  start = environment.start()
  shown = tools.CallChecker(start.tools).descriptions()
  messages = [
    {"role": "system", "content": "", "tools": shown},
    {"role": "user", "content": start.observation},
  ]
  for name, arguments in solving.solution_calls(record, task):
    step = environment.call(name, arguments)
    text = json.dumps(arguments, ensure_ascii=False)
    call = {"type": "function", "function": {"name": name, "arguments": text}}
    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    messages.append({"role": "tool", "content": step.observation})
  reward = environment.reward()
  environment.connection.close()
  return messages, reward
