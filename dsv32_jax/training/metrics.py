"""What a run reports: JSON lines, TensorBoard files and a progress bar.

`metrics.jsonl` holds what the computation gave and nothing else, so two equal
runs write equal bytes, and a resumed run the bytes of one that never stopped.
What the clock gave goes to `timings.jsonl`. Both go to `tensorboard/`.
"""

from collections.abc import Mapping
import json
import math
import os
import pathlib
import sys
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import tensorboardX
import tqdm

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
  """Appends rows of scalars to a run's folder; use it as a context.

  A row is one JSON object: `step`, `name` (which part of the run speaks, such
  as "train" or "eval"), then the values. JSON has no NaN and no infinities:
  they are the strings "NaN", "Infinity" and "-Infinity".
  """

  def __init__(self, folder, *, resume_step: int | None = None):
    """Opens the folder's files, which are made where they are missing.

    Args:
      folder: the run's folder.
      resume_step: the step a run was restored at: later rows of its former life
        are removed, as is a line that was cut short. None: start anew.

    Raises:
      ValueError: naming file and line, if a file that is resumed is not ours.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    last_step = -1 if resume_step is None else resume_step
    self._files = {}
    for name in (METRICS_FILE, TIMINGS_FILE):
      path = folder / name
      path.touch()
      _cut_after(path, last_step)
      self._files[name] = path.open("ab")
    self._board = tensorboardX.SummaryWriter(
      str(folder / TENSORBOARD_FOLDER), purge_step=last_step + 1
    )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def write(self, step: int, values: Mapping[str, Any], name: str = "train"):
    """Writes a row to metrics.jsonl.

    Args:
      step: of the run; rows come in the order of their steps.
      values: scalars: numbers, numpy or jax arrays of one element. A jax array
        that is still being computed is waited for.
      name: part of the run.

    Raises:
      ValueError: if a value is not a scalar.
    """
    self._write(METRICS_FILE, step, values, name)

  def write_timings(
    self, step: int, values: Mapping[str, Any], name: str = "train"
  ):
    """Writes a row to timings.jsonl: what differs from run to run."""
    self._write(TIMINGS_FILE, step, values, name)

  def flush(self) -> None:
    """Makes all rows so far outlive this process and the machine."""
    for file in self._files.values():
      file.flush()
      os.fsync(file.fileno())
    self._board.flush()

  def close(self) -> None:
    """Flushes and closes all files."""
    self.flush()
    for file in self._files.values():
      file.close()
    self._board.close()

  def _write(self, file_name, step, values, name):
    row = {"step": step, "name": name}
    for key, value in values.items():
      if key in row:
        raise ValueError(f"{key=} cannot name a metric")
      number = scalar(key, value)
      row[key] = _json_number(number)
      self._board.add_scalar(f"{name}/{key}", number, step)
    line = json.dumps(row, allow_nan=False) + "\n"
    file: BinaryIO = self._files[file_name]
    file.write(line.encode())
    # A line is whole on disk or, if the process dies here, cut on resuming.
    file.flush()


class SilentWriter:
  """What the other processes of a run write: nothing."""

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    pass

  def write(self, step: int, values: Mapping[str, Any], name: str = "train"):
    """Drops a row."""
    del step, values, name

  write_timings = write


def read_rows(path) -> list[dict[str, Any]]:
  """Reads a file that `MetricsWriter` wrote, NaN and infinities as floats.

  Raises:
    ValueError: naming file and line, if a whole line is not a row.
  """
  with pathlib.Path(path).open("rb") as file:
    return [row for row, _ in _rows(file, path)]


def scalar(key: str, value: Any) -> int | float:
  """Returns a Python number: ints stay ints, float32 gets its short form.

  Raises:
    ValueError: naming the key, if the value is not one real number.
  """
  if type(value) in (int, float):
    return value
  array = np.asarray(value)
  real = array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number)
  if not real or array.size != 1 or np.iscomplexobj(array):
    raise ValueError(f"{key}={value!r} must be a scalar")
  item = array.reshape(())[()]
  if array.dtype == bool or np.issubdtype(array.dtype, np.integer):
    return int(item)
  if array.dtype == np.float32:
    # The shortest decimal that reads back as the same float32.
    return float(str(item))
  return float(item)


def progress(
  total: int, *, initial: int = 0, title: str = "", shown: bool = True
) -> tqdm.tqdm:
  """Returns a progress bar on stderr; `update(1)` after each of `total` steps.

  On a terminal it moves twice a second; in a log it adds a line now and then.
  """
  interactive = sys.stderr.isatty()
  return tqdm.tqdm(
    total=total,
    initial=initial,
    desc=title,
    file=sys.stderr,
    dynamic_ncols=True,
    mininterval=0.5 if interactive else 15.0,
    ascii=True,
    disable=not shown,
  )


def _json_number(number: int | float) -> int | float | str:
  if isinstance(number, int) or math.isfinite(number):
    return number
  if math.isnan(number):
    return "NaN"
  return "Infinity" if number > 0 else "-Infinity"


def _rows(file: BinaryIO, path):
  """Yields (row, end offset) of each whole line."""
  end = 0
  for number, line in enumerate(file, start=1):
    if not line.endswith(b"\n"):
      return
    end += len(line)
    try:
      row = json.loads(line)
      row = {k: _from_json(k, value) for k, value in row.items()}
      row["step"] = int(row["step"])
    except (ValueError, AttributeError, KeyError, TypeError) as error:
      raise ValueError(f"{path}:{number} is not a row of metrics") from error
    yield row, end


def _from_json(key: str, value: Any) -> Any:
  if key != "name" and isinstance(value, str):
    return float(value)
  return value


def _cut_after(path: pathlib.Path, last_step: int) -> None:
  """Truncates a file behind the rows of steps up to `last_step`."""
  if last_step < 0:
    os.truncate(path, 0)
    return
  keep = 0
  with path.open("rb") as file:
    for row, end in _rows(file, path):
      if row["step"] > last_step:
        break
      keep = end
  os.truncate(path, keep)
