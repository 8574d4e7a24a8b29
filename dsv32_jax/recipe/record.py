"""What a run has found so far: one JSON file a part, kept across restarts."""

from collections.abc import Callable
import json
import os
import time
from typing import Any

FOLDER = "records"


def write(workdir: str, name: str, found: Any, *, seconds: float) -> None:
  """Writes what a part of the run found; the file appears when whole."""
  folder = os.path.join(workdir, FOLDER)
  os.makedirs(folder, exist_ok=True)
  path = _path(workdir, name)
  partial = f"{path}.partial"
  with open(partial, "w", encoding="utf-8") as file:
    json.dump({"found": found, "seconds": seconds}, file, indent=1)
  os.replace(partial, path)


def exists(workdir: str, name: str) -> bool:
  """Whether this part is done."""
  return os.path.exists(_path(workdir, name))


def read(workdir: str, name: str) -> tuple[Any, float]:
  """Returns what a part found, and the seconds it took."""
  with open(_path(workdir, name), encoding="utf-8") as file:
    content = json.load(file)
  return content["found"], content["seconds"]


def once(workdir: str, name: str, find: Callable[[], Any]) -> Any:
  """Returns what `find` returns (JSON-able), calling it in one run only."""
  if not exists(workdir, name):
    start = time.perf_counter()
    found = find()
    write(workdir, name, found, seconds=time.perf_counter() - start)
  return read(workdir, name)[0]


def all_seconds(workdir: str) -> dict[str, float]:
  """Seconds of each part that is done, by name."""
  names = sorted(
    os.path.splitext(file)[0]
    for file in os.listdir(os.path.join(workdir, FOLDER))
    if file.endswith(".json")
  )
  return {name: read(workdir, name)[1] for name in names}


def _path(workdir: str, name: str) -> str:
  return os.path.join(workdir, FOLDER, f"{name}.json")
