"""The folder of a run: the config and the tokenizer that it holds."""

from collections.abc import Callable
import json
import os
import pathlib

import jax
from jax.experimental import multihost_utils

from dsv32_jax import config_files
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.training import processes

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "config.json"


def check(config, workdir: str, may_change, root: str | None = None) -> None:
  """Checks that a run in the folder, if there is one, was the same.

  Process 0 does, and all of them learn what it found.

  Args:
    config: dataclass of the run.
    workdir: its folder.
    may_change: fields that a run may be continued with another value of.
    root: folder above it that may be moved as a whole: a path that leads to a
      place in there is the same if the place is, as seen from `workdir`.

  Raises:
    ValueError: naming a field that another run of this folder set otherwise.
  """
  path, problem = os.path.join(workdir, CONFIG_FILE), None
  if jax.process_index() == 0:
    now = _from_workdir(config_files.dump(config), workdir, root)
    problem = _changed_field(path, now, may_change, root)
  problem = processes.gather(problem)[0]
  if problem is not None:
    raise ValueError(
      f"{workdir} holds a run with another config.{problem}; give a new"
      " --workdir or the config of that run"
    )


def claim(config, workdir: str, may_change, root: str | None = None) -> None:
  """Writes config.json, where `check` finds nothing; see there."""
  check(config, workdir, may_change, root)
  if jax.process_index() == 0:
    path = os.path.join(workdir, CONFIG_FILE)
    now = _from_workdir(config_files.dump(config), workdir, root)
    with open(f"{path}.new", "w", encoding="utf-8") as file:
      json.dump(now, file, indent=2, sort_keys=True)
      file.write("\n")
    os.replace(f"{path}.new", path)


def _from_workdir(value, workdir: str, root: str | None):
  """Writes absolute paths below the root as seen from the workdir."""
  if root is None:
    return value
  if isinstance(value, dict):
    return {k: _from_workdir(x, workdir, root) for k, x in value.items()}
  if isinstance(value, list):
    return [_from_workdir(x, workdir, root) for x in value]
  is_path = isinstance(value, str) and os.path.isabs(value)
  if is_path and pathlib.Path(value).is_relative_to(os.path.abspath(root)):
    return os.path.relpath(value, workdir)
  return value


def _changed_field(path: str, now: dict, may_change, root) -> str | None:
  """Names a field that differs from the file's and may not; else None."""
  if not os.path.exists(path):
    return None
  with open(path, encoding="utf-8") as file:
    before = _from_workdir(json.load(file), os.path.dirname(path), root)
  changed = (name for name in now if before.get(name) != now[name])
  return next((name for name in changed if name not in may_change), None)


def _has_tokenizer(workdir) -> bool:
  """Whether a folder has the tokenizer of a run that has begun.

  One without config.json is what a command left that failed: its tokenizer may
  be another than the next command's.
  """
  names = (TOKENIZER_FILE, CONFIG_FILE)
  return all(os.path.exists(os.path.join(workdir, name)) for name in names)


def kept_tokenizer(
  workdir, make: Callable[[], tokenizer_lib.Tokenizer], *, vocab_size: int
) -> tokenizer_lib.Tokenizer:
  """Returns the folder's tokenizer; one process makes it for a first run.

  Args:
    workdir: the folder.
    make: called where no run has begun.
    vocab_size: of the model.

  Raises:
    ValueError: if the tokenizer has more ids than the model.
  """
  path = os.path.join(workdir, TOKENIZER_FILE)
  if jax.process_index() == 0 and not _has_tokenizer(workdir):
    make().save(path)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("tokenizer")
  tokenizer = tokenizer_lib.load(path)
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f"tokenizer.vocab_size={tokenizer.vocab_size} exceeds"
      f" model.vocab_size={vocab_size}"
    )
  return tokenizer
