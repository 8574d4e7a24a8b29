"""What a run has found so far: one JSON file a part, kept across restarts."""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import time
from typing import Any

FOLDER = "records"
SECONDS_FILE = "seconds.json"


def exists(workdir: str, name: str) -> bool:
  """Whether this part is done."""
  return os.path.exists(_path(workdir, name))


def read(workdir: str, name: str) -> Any:
  """Returns what a part found."""
  return _read(_path(workdir, name))


def write(workdir: str, name: str, found: Any) -> None:
  """Writes what a part found; the part is done."""
  _write(_path(workdir, name), found)


def once(workdir: str, name: str, find: Callable[[], Any]) -> Any:
  """Returns what `find` returns (JSON-able), calling it in one run only."""
  if not exists(workdir, name):
    with clock(workdir, name):
      found = find()
    write(workdir, name, found)
  return read(workdir, name)


@contextlib.contextmanager
def clock(workdir: str, name: str) -> Iterator[None]:
  """Adds the time spent inside to the part's, also if it is cut short."""
  start = time.perf_counter()
  try:
    yield
  finally:
    spent = all_seconds(workdir)
    spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
    _write(os.path.join(workdir, SECONDS_FILE), spent)


def all_seconds(workdir: str) -> dict[str, float]:
  """Seconds spent on each part so far, over all restarts."""
  path = os.path.join(workdir, SECONDS_FILE)
  return _read(path) if os.path.exists(path) else {}


def _path(workdir: str, name: str) -> str:
  return os.path.join(workdir, FOLDER, f"{name}.json")


def _read(path: str) -> Any:
  with open(path, encoding="utf-8") as file:
    return json.load(file)


def _write(path: str, content: Any) -> None:
  """Writes a file that appears when it is whole."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  partial = f"{path}.partial"
  with open(partial, "w", encoding="utf-8") as file:
    json.dump(content, file, indent=1)
  os.replace(partial, path)
