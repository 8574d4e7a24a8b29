"""A long computation whose result is kept, so that it is not done twice."""

from collections.abc import Callable
import json
import os
from typing import Any


def once(path: str, compute: Callable[[], Any]) -> Any:
  """The JSON result in a file, computed and written there if it is missing."""
  if os.path.exists(path):
    with open(path, encoding="utf-8") as file:
      return json.load(file)
  result = compute()
  with open(f"{path}.new", "w", encoding="utf-8") as file:
    json.dump(result, file, indent=1)
    file.write("\n")
  os.replace(f"{path}.new", path)
  return result
