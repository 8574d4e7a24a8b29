"""A whole synthesis in one folder, which a killed run continues.

`environments.jsonl` has a line an environment, in order, and is all there is
to know: a line cut short by a crash is dropped, and the rest is made anew from
the seed. So an interrupted run ends with the bytes of an uninterrupted one.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import fcntl
import functools
import json
import multiprocessing
from multiprocessing import connection
import os
import pathlib
import threading
from typing import Any

from dsv32_jax import config_files
from dsv32_jax.agents.synthesis.general import pipeline

ENVIRONMENTS_FILE = "environments.jsonl"
SECONDS_FILE = "seconds.jsonl"
CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
# They change what is made besides the environments, or how fast.
_FREE = ("workers", "num_trajectories")


def run(
  config: pipeline.SynthesisConfig,
  workdir: pathlib.Path,
  progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> pathlib.Path:
  """Makes the environments that the folder lacks.

  Args:
    config: what to make.
    workdir: folder of this synthesis.
    progress: wraps the indices that are still to be made.

  Returns:
    The path of environments.jsonl.

  Raises:
    ValueError: if the folder holds another synthesis, or one runs in it.
  """
  with (workdir / LOCK_FILE).open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"another synthesis runs in {workdir}") from error
    return _run(config, workdir, progress)


def _run(config, workdir, progress):
  check_config(config, workdir, _FREE, ENVIRONMENTS_FILE)
  path = workdir / ENVIRONMENTS_FILE
  drop_partial_line(path)
  drop_partial_line(workdir / SECONDS_FILE)
  known = {record["fingerprint"] for record in read(path)}
  waiting = range(len(known), config.num_environments)
  if not waiting:
    return path
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(path.open("a", encoding="utf-8"))
    seconds = stack.enter_context(
      (workdir / SECONDS_FILE).open("a", encoding="utf-8")
    )
    make = functools.partial(pipeline.synthesize, config)
    made = stack.enter_context(in_order(make, waiting, config.workers))
    for index in progress(waiting):
      record, timings = next(made)
      if record["fingerprint"] in known:
        record, timings = pipeline.synthesize(
          config, index, known=frozenset(known)
        )
      known.add(record["fingerprint"])
      write_line(seconds, {"index": index, **dataclasses.asdict(timings)})
      write_line(file, record)
  return path


def read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the records of a JSONL file; none if it is not there.

  Raises:
    ValueError: naming file and line, if one is no JSON object.
  """
  if path.exists():
    with path.open(encoding="utf-8") as file:
      for number, line in enumerate(file, 1):
        yield _object(line, f"{path}:{number}")


def _object(text: str, where: str) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{where} is not a JSON object")
  return value


def write_line(file, record: Any) -> None:
  """Appends a record as one line and hands it to the system."""
  file.write(json.dumps(record, ensure_ascii=False) + "\n")
  file.flush()


def drop_partial_line(path: pathlib.Path) -> None:
  """Cuts off what follows a file's last line end."""
  if not path.exists():
    return
  with path.open("rb+") as file:
    end = file.seek(0, os.SEEK_END)
    while end > 0:
      begin = max(0, end - 65536)
      file.seek(begin)
      place = file.read(end - begin).rfind(b"\n")
      if place >= 0:
        end = begin + place + 1
        break
      end = begin
    file.truncate(end)


@contextlib.contextmanager
def in_order(
  make: Callable[[int], Any], indices: Iterable[int], workers: int
) -> Iterator[Iterator[Any]]:
  """Gives an iterator over what is made of indices, in their order.

  Args:
    make: function of an index that other processes can import.
    indices: of what is to be made.
    workers: processes; 1 makes it here, each one when it is asked for.
  """
  if workers == 1:
    yield map(make, indices)
    return
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(
    workers, context, initializer=_end_with_parent
  ) as pool:
    try:
      yield pool.map(make, indices, chunksize=4)
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent():
  """Ends this worker when the run is killed; it would wait for ever."""
  sentinel = multiprocessing.parent_process().sentinel

  def watch():
    connection.wait([sentinel])
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def check_config(
  config: Any, workdir: pathlib.Path, free: Iterable[str], product: str
) -> None:
  """Writes the config, or compares it with what the folder was made by.

  Args:
    config: dataclass.
    workdir: folder.
    free: fields that may change between the runs of one synthesis.
    product: file that is there only if a config was.

  Raises:
    ValueError: naming the field, if the folder is of another config.
  """
  path = workdir / CONFIG_FILE
  wanted = {
    key: value
    for key, value in config_files.dump(config).items()
    if key not in free
  }
  if path.exists():
    made = _object(path.read_text(encoding="utf-8"), str(path))
    for key, value in wanted.items():
      if made.get(key) != value:
        raise ValueError(
          f"{workdir} was made with {key}={made.get(key)!r}, not {value!r}"
        )
    return
  if (workdir / product).exists():
    raise ValueError(f"{workdir} has {product} and no {CONFIG_FILE}")
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
  os.replace(partial, path)
