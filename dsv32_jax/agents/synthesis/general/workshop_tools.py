"""What a model is told that builds an environment: the task and its tools."""

from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import search

_PROMPT = """Build an environment of the category "{category}" in which an agent
can be set tasks that are hard to solve and easy to verify.

1. With shell, make an SQLite file with consistent, realistic data: several
tables of related things, dozens of rows, numbers and text only. Take it.
2. Write tools over the data, each of which tells a little: what the agent knows
of the data it learns through them, so no tool may solve a task.
3. Propose a simple task with a solution and a verifier. The verifier reads the
data itself and must accept every right answer. The text must say all that
decides, and not the answer. Mend what is told to be wrong.
4. Make the task harder, up to {levels} times in all; add tools where those at
hand do not suffice. Then next_task. At most {most_tasks} tasks are wanted.
"""


def prompt(category: str, most_tasks: int, levels: int) -> str:
  """Returns the user's message of a workshop."""
  return _PROMPT.format(category=category, most_tasks=most_tasks, levels=levels)


_TEXT, _OBJECT = {"type": "string"}, {"type": "object"}
SCHEMAS = (
  protocol.tool(
    "shell",
    "Runs a command line with bash in your folder. Python with sqlite3 is"
    " there, a network is not. Files stay as it leaves them.",
    {"command": _TEXT},
  ),
  protocol.tool(
    "take_database",
    "Takes an SQLite file of your folder as the data of the environment, in"
    " the place of what was taken before; not after a task has passed.",
    {"path": _TEXT},
  ),
  protocol.tool(
    "set_tool",
    "Adds a tool to the environment: Python that defines a function of the"
    " tool's name, takes the parameters by name and returns what has a JSON"
    " form. It may call query(sql, *values), which returns a list of rows. A"
    " tool of that name is replaced, but not after a task has passed.",
    {
      "name": _TEXT,
      "description": _TEXT,
      "parameters": _OBJECT,
      "source": _TEXT,
    },
  ),
  protocol.tool(
    "try_tool",
    "Calls a tool of the environment.",
    {"name": _TEXT, "arguments": _OBJECT},
  ),
  protocol.tool(
    "propose_task",
    "Proposes a task over the environment. The solution is Python, `def"
    " solve():`, that only calls tools by keyword and computes. The verifier"
    " is `def verify(answer):` over query(sql, *values) and returns a bool."
    " wrong_answers are five or more that fit the schema and are wrong. Tells"
    " what is wrong with it, or that it has passed; then propose a harder one,"
    " whose solution needs more tool calls.",
    {
      "statement": _TEXT,
      "answer_schema": _OBJECT,
      "solution": _TEXT,
      "verifier": _TEXT,
      "wrong_answers": {"type": "array"},
    },
  ),
  protocol.tool(
    "next_task",
    "Keeps the hardest version of the current task and begins another.",
    {},
  ),
  protocol.tool("finish", "Ends the work on this environment.", {}),
)
SEARCHING = tuple(x for x in search.SCHEMAS if x.name != "submit_result")
