"""What programs share: flags, one-line errors, quiet logs, safe writes."""

from collections.abc import Callable, Mapping, Sequence
import logging
import os
import pathlib
import re
import sys
import tempfile
import traceback
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
from ml_collections import config_dict
from ml_collections import config_flags
import numpy as np

from dsv32_jax import config_files

_DEBUG = flags.DEFINE_bool(
  "debug", False, "Show tracebacks of mistakes and the libraries' own logs."
)
_OURS = ("dsv32_jax", "pallas_kernels", "experiments", "configs")
_ROOT = pathlib.Path(__file__).resolve().parents[1]


def define_common_flags() -> None:
  """Defines --config=FILE.py[:variant] and --workdir=DIR, both required.

  Doing it twice, as a notebook may, changes nothing.
  """
  if "config" in flags.FLAGS:
    return
  config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), and after a colon its variant."
  )
  define_workdir_flag()
  flags.mark_flags_as_required(["config", "workdir"])


def define_workdir_flag() -> None:
  """Defines --workdir=DIR, unless another program of this process did."""
  if "workdir" not in flags.FLAGS:
    flags.DEFINE_string("workdir", None, "Folder of the run; made if missing.")


def define_seeds_flag() -> None:
  """Defines --seeds=N, how often an experiment is repeated."""
  if "seeds" not in flags.FLAGS:
    flags.DEFINE_integer("seeds", 1, "Independent repetitions.")


def num_seeds() -> int:
  """Returns --seeds.

  Raises:
    ValueError: if it is not positive.
  """
  if flags.FLAGS.seeds < 1:
    raise ValueError(f"--seeds={flags.FLAGS.seeds} must be positive")
  return flags.FLAGS.seeds


def define_process_flags() -> None:
  """Defines the flags by which several processes become one program."""
  if "num_processes" in flags.FLAGS:
    return
  flags.DEFINE_bool(
    "distributed", False, "Join the processes of a pod or a cluster's job."
  )
  flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where JAX cannot find it."
  )
  flags.DEFINE_integer("num_processes", None, "With --coordinator.")
  flags.DEFINE_integer("process_id", None, "With --coordinator, from 0.")
  flags.DEFINE_integer(
    "heartbeat_seconds", 100, "After this silence a process counts as dead."
  )


def join_processes() -> None:
  """Makes this process one of several, if the flags say so.

  Call it before anything asks for devices. Should a process die, the others
  end with an error once its heartbeat is missed.

  Raises:
    ValueError: if the flags do not fit together.
  """
  given = flags.FLAGS
  count, number = given.num_processes, given.process_id
  if given.coordinator is None:
    if count is not None or number is not None:
      raise ValueError("--num_processes and --process_id need --coordinator")
    if not given.distributed:
      return
  elif count is None or number is None or not 0 <= number < count:
    raise ValueError(
      f"--coordinator={given.coordinator} needs --num_processes and a"
      f" --process_id below it, not {count} and {number}"
    )
  jax.distributed.initialize(
    given.coordinator,
    count,
    number,
    heartbeat_timeout_seconds=given.heartbeat_seconds,
  )


def require_workdir() -> pathlib.Path:
  """Returns --workdir, which exists from then on.

  Raises:
    ValueError: if it is a file.
  """
  workdir = pathlib.Path(flags.FLAGS.workdir).expanduser().absolute()
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"--workdir={workdir} is not a folder")
  workdir.mkdir(parents=True, exist_ok=True)
  return workdir


def require_writable(flag: str, path: str) -> None:
  """Raises unless the file of --`flag` can be written; leaves none behind.

  Raises:
    OSError: naming the path.
    ValueError: if no path is given.
  """
  if not path:
    raise ValueError(f"--{flag} is empty")
  present = os.path.exists(path)
  with open(path, "a"):
    pass
  if not present:
    os.unlink(path)


def config_variant(
  variants: Mapping[str, Callable[[], Any]], variant: str
) -> config_dict.ConfigDict:
  """Makes the dataclass of a variant and turns it into an editable config.

  Args:
    variants: by name, functions that return a frozen dataclass.
    variant: the name that followed the colon in --config.

  Raises:
    ValueError: if there is no such variant.
  """
  if variant not in variants:
    raise ValueError(
      f"config has no variant {variant!r}, only {', '.join(variants)}"
    )
  return config_files.editable(variants[variant]())


def run(main: Callable[[Sequence[str]], Any]) -> None:
  """Runs a program's main; a mistake of the user ends in one line and code 1.

  Such is whatever is wrong with the flags, an OSError, or a ValueError that
  this project raises. A ValueError from inside a library keeps its traceback.
  """

  def guarded(argv):
    _quieten()
    try:
      return main(argv)
    except (ValueError, OSError) as error:
      if _DEBUG.value:
        raise
      if isinstance(error, ValueError) and not _is_ours(error):
        traceback.print_exc()
      _fail(error)

  app.run(guarded, flags_parser=_parse)


def parse_flags(arguments: Sequence[str] = ()) -> None:
  """Parses flags where no program runs: in a notebook or a test.

  Raises:
    absl.flags.Error: naming the flag.
  """
  argv = ["notebook", *arguments]
  flags.FLAGS.unparse_flags()
  # Flags that an earlier parse made of its overrides.
  for name in [name for name in flags.FLAGS if name.startswith("config.")]:
    delattr(flags.FLAGS, name)
  # ml_collections looks for --config.field=value there, whatever is parsed.
  before, sys.argv = sys.argv, argv
  try:
    flags.FLAGS(argv)
  finally:
    sys.argv = before
  _quieten()


def write_npz(path: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays to a .npz file that appears when it is whole.

  Raises:
    FileNotFoundError: if its folder does not exist.
  """
  path = os.path.abspath(path)
  folder, name = os.path.split(path)
  with tempfile.NamedTemporaryFile(
    dir=folder, prefix=f".{name}.", delete=False
  ) as file:
    try:
      np.savez(file, **arrays)
      os.chmod(file.name, 0o644)
      os.replace(file.name, path)
    except BaseException:
      os.unlink(file.name)
      raise


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; app.run's own way of failing takes many lines."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise flags.Error(f"unexpected argument {rest[1]!r}")
    if "config" in flags.FLAGS:
      # A config file that is missing raises only when something is read.
      flags.FLAGS.config.keys()
    return rest
  # What a config file can raise while --config is parsed.
  except (
    flags.Error,
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
  ) as error:
    if "--debug" in argv:
      raise
    # What get_config raised is told with a traceback, its last line the cause.
    flag, traced, rest = str(error).partition("Traceback (most recent call")
    if traced:
      cause = rest.strip().splitlines()[-1]
      flag = flag.replace("Error whilst parsing config file:", "")
      error = ValueError(f"{flag.rstrip()} {cause.partition(': ')[2] or cause}")
    elif isinstance(error, (AttributeError, KeyError)):
      error = ValueError(_no_such_field(argv, str(error)))
    _fail(error)


def _no_such_field(argv: list[str], told: str) -> str:
  """Names the flag of a field that the config lacks, if one is told."""
  field = re.match(r"\W*(\w*)", told)[1]
  hint = re.search(r"Did you mean .*\?|$", told)[0]
  for argument in argv:
    flag = argument.partition("=")[0]
    if field in flag.split("."):
      return f"{flag}: the config has no field {field!r}. {hint}".strip()
  return told


def _fail(error: BaseException) -> None:
  sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
  sys.exit(1)


def _is_ours(error: BaseException) -> bool:
  """Tells if the innermost frame of the traceback is this project's."""
  frames = traceback.extract_tb(error.__traceback__)
  path = pathlib.Path(frames[-1].filename)
  return any(path.is_relative_to(_ROOT / folder) for folder in _OURS)


def _quieten() -> None:
  """Leaves errors of libraries and warnings of this project."""
  if _DEBUG.value or flags.FLAGS["verbosity"].present:
    return
  absl_logging.set_verbosity(absl_logging.ERROR)
  logging.getLogger("dsv32_jax").setLevel(logging.WARNING)
