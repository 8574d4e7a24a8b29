"""A task's own solution as the calls that it makes."""

from collections.abc import Mapping
import json
from typing import Any

from dsv32_jax.agents.environments import general
from dsv32_jax.agents.synthesis.general import programs


def solution_calls(
  record: Mapping[str, Any], task: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
  """Runs a task's solution; returns its calls and the one that submits.

  Args:
    record: of a general environment.
    task: one of its tasks.

  Returns:
    Name and arguments of each.
  """
  environment = general.GeneralEnvironment(record, task)
  try:
    calls: list[tuple[str, Any, Any]] = []
    functions = environment.tools.functions(calls)
    answer = programs.load(task["solution"], "solve", functions)()
  finally:
    environment.connection.close()
  submitted = {"answer_text": json.dumps(answer, ensure_ascii=False)}
  return [
    *((name, arguments) for name, arguments, _ in calls),
    ("submit_result", submitted),
  ]
