"""A tree of files that commands change, each in a sandbox of its own.

Between two commands there is nothing but the tree: no process, no open file.
So a tree can be kept, compared and gone back to, a command that breaks its
sandbox costs only what it did itself, and thousands of episodes need memory
only for what they changed. A tree is an image, a tar that many episodes share,
and a `Delta` to it. Neither is ever unpacked outside a sandbox.
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import io
import json
import os
import pathlib
import secrets
import sys
import tarfile
from typing import Any
import zlib

from dsv32_jax.agents.sandbox import limits as limits_lib
from dsv32_jax.agents.sandbox import run

# What runs inside: no module of this project can be found there.
_PROGRAM = """import sys, types
package, folders = types.ModuleType("package"), types.ModuleType("folders")
package.folders = folders
sys.modules["dsv32_jax.agents.repository"] = package
exec({folders!r}, folders.__dict__)
exec({inside!r})
"""
# Tells the program its channel, and nobody after it.
_START = 'fd=$RESULT_FD; unset RESULT_FD; exec "$0" -I -c "$1" "$fd"'
# To unpack the tree, and to pack what has changed.
_AROUND_SECONDS = 60.0


def default_limits() -> limits_lib.Limits:
  """Returns limits that a compiler or a test runner fits in."""
  return limits_lib.Limits(
    cpu_seconds=None,
    memory_bytes=4 << 30,
    processes=128,
    output_bytes=256 << 20,
    disk_bytes=256 << 20,
    files=50_000,
    open_files=1024,
  )


def sandbox(
  backend,
  *,
  readable: Sequence[str | os.PathLike] = (),
  path: Sequence[str | os.PathLike] = (),
  environment: Mapping[str, str] | None = None,
) -> run.Sandbox:
  """Returns a sandbox in which commands find programs.

  Args:
    backend: as `probe().require()` gives it.
    readable: files and folders outside the system that commands may read: a
      virtual environment, packages of another language.
    path: folders of programs; before the system's come these, then those of
      this Python.
    environment: variables of every command.
  """
  programs = [*map(os.fspath, path), os.path.dirname(sys.executable)]
  settings = {
    "PATH": ":".join([*programs, "/usr/bin", "/bin"]),
    # No settings of a user or a machine.
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1",
    # /etc is not there; Node does not start without its settings of TLS.
    "OPENSSL_CONF": "/dev/null",
    **(environment or {}),
  }
  return run.Sandbox(backend, readable=readable, environment=settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
  """What was done to an image.

  Attributes:
    archive: tar of the files, links and folders that are new or changed.
    removed: paths that the image has and the tree has not.
  """

  archive: bytes = b""
  removed: tuple[str, ...] = ()

  def dump(self) -> dict[str, Any]:
    """Returns the delta as JSON-able values."""
    packed = base64.b64encode(zlib.compress(self.archive)).decode()
    return {"archive": packed, "removed": list(self.removed)}

  @classmethod
  def load(cls, value: Mapping[str, Any]) -> "Delta":
    """Returns the delta that `dump` wrote; ValueError if it is none."""
    try:
      archive = zlib.decompress(base64.b64decode(value["archive"]))
      return cls(archive=archive, removed=tuple(map(str, value["removed"])))
    except (KeyError, TypeError, ValueError, zlib.error) as error:
      raise ValueError(f"no delta of a tree: {error}") from error

  def texts(self) -> dict[str, str | None]:
    """Returns the changed files as text, the removed ones as None.

    Raises:
      ValueError: a changed file is no UTF-8, or a link.
    """
    found: dict[str, str | None] = dict.fromkeys(self.removed)
    if not self.archive:
      return found
    with tarfile.open(fileobj=io.BytesIO(self.archive)) as archive:
      for member in archive:
        if member.isdir():
          continue
        if not member.isreg():
          raise ValueError(f"{member.name} is a link")
        try:
          found[member.name] = archive.extractfile(member).read().decode()
        except UnicodeDecodeError:
          raise ValueError(f"{member.name} is no text") from None
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """What became of an order.

  Attributes:
    values: what the program inside says; its `output` and `reports` come from
      untrusted commands. Empty where there is `error`.
    delta: of the tree after it, None where nothing was kept or went wrong.
    archive: the whole tree, where that was asked for.
    error: empty, or one line a model may read.
    reason: how the sandbox ended, one of limits.REASONS.
  """

  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  delta: Delta | None = None
  archive: bytes = b""
  error: str = ""
  reason: str = "exit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workspace:
  """Carries out orders on trees of one image.

  Attributes:
    box: where commands run; see `sandbox`.
    image: tar of the tree.
    limits: of each order; `wall_seconds` is not used, an order has its own.
    seconds: that a command may take.
    characters: kept of what it says.
  """

  box: run.Sandbox
  image: bytes
  limits: limits_lib.Limits = dataclasses.field(default_factory=default_limits)
  seconds: float = 120.0
  characters: int = 20_000

  def __post_init__(self):
    if not self.seconds > 0 or not self.characters > 0:
      raise ValueError(
        f"seconds={self.seconds} and characters={self.characters} must be"
        " positive"
      )

  def run(self, order: Mapping[str, Any], delta: Delta = Delta()) -> Answer:
    """Carries out an order; SandboxError if there is no sandbox for it.

    Args:
      order: its `operation` with what that takes (see `inside.py`), and
        `keep`: "changes" (the default), "everything" or "nothing".
      delta: of the tree it is carried out on.
    """
    given, nonce = self._given(order, delta)
    return _answer(self.box.run(**given), order, nonce)

  async def run_async(
    self, order: Mapping[str, Any], delta: Delta = Delta()
  ) -> Answer:
    """Is `run` in a thread; cancelling it ends the processes first."""
    given, nonce = self._given(order, delta)
    return _answer(await self.box.run_async(**given), order, nonce)

  def _given(self, order, delta):
    nonce = secrets.token_hex(16)
    whole = {
      "keep": "changes",
      "seconds": self.seconds,
      "characters": self.characters,
      "removed": list(delta.removed),
      "nonce": nonce,
      **order,
    }
    files = {"image.tar": self.image}
    if delta.archive:
      files["delta.tar"] = delta.archive
    commands = len(whole.get("batches", whole.get("commands", [0])))
    wall = _AROUND_SECONDS + commands * whole["seconds"]
    given = {
      "argv": [
        "/bin/sh",
        "-c",
        _START,
        sys.executable,
        _program(),
      ],
      "files": files,
      "stdin": json.dumps(whole),
      "limits": dataclasses.replace(self.limits, wall_seconds=wall),
    }
    return given, nonce


@functools.cache
def _program() -> str:
  here = pathlib.Path(__file__)
  return _PROGRAM.format(
    folders=here.with_name("folders.py").read_text(),
    inside=here.with_name("inside.py").read_text(),
  )


def _answer(result: limits_lib.Result, order, nonce: str) -> Answer:
  """Reads what came over the channel; only one who knows the nonce wrote it."""
  line, _, archive = result.results.partition(b"\n")
  try:
    values = json.loads(line)
    is_ours = values["nonce"] == nonce
  except (ValueError, TypeError, KeyError, RecursionError):
    is_ours = False
  if not is_ours:
    how = "ended" if result.reason == "exit" else f"limit: {result.reason}"
    error = f"the sandbox was stopped ({how}); what the command did is lost"
    return Answer(error=error, reason=result.reason)
  if "error" in values:
    return Answer(error=str(values["error"]), values=values)
  keep = order.get("keep", "changes")
  delta = None
  if keep == "changes":
    delta = Delta(archive=archive, removed=tuple(values["removed"]))
  return Answer(
    values=values,
    delta=delta,
    archive=archive if keep == "everything" else b"",
  )
