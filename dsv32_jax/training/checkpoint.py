"""Checkpoints: saved in the background, committed whole, checked when read.

The one module that knows Orbax. A checkpoint is a folder named by its step with
one Orbax item for each named tree of arrays, and a manifest: shape, type and
checksum of every array, and JSON-able notes (configs, data position). Orbax
renames a finished step into place, so a killed save leaves the one before it.
The checksums find what Orbax would restore in silence: a flipped bit.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import logging
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from dsv32_jax.training import checkpoint_trees as trees_lib
from dsv32_jax.training import checksum
from dsv32_jax.training import processes

_MANIFEST = "manifest"
_log = logging.getLogger(__name__)


class DamagedError(Exception):
  """A checkpoint's files are not what was saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When checkpoints are made and which stay.

  Attributes:
    every_steps: steps between two saves.
    max_to_keep: newest checkpoints that stay; None: all.
    keep_period: steps divisible by it stay for ever; None: no such steps.
  """

  every_steps: int = 1000
  max_to_keep: int | None = 3
  keep_period: int | None = None

  def __post_init__(self):
    for name in ("every_steps", "max_to_keep", "keep_period"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"checkpoint.{name}={value} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
  """What `Checkpointer.restore` found.

  Attributes:
    step: the step of the checkpoint that was read.
    trees: by name, in the structure of the targets.
    notes: as given to `save`.
    process_notes: this process's own, as given to `save`.
    damaged: steps newer than `step` that could not be read, with the reason.
  """

  step: int
  trees: dict[str, Any]
  notes: Any
  process_notes: Any
  damaged: dict[int, str]


class Checkpointer:
  """Saves and restores the checkpoints of one folder; use it as a context.

  Leaving the context waits for a save under way. With several processes every
  method is called by all of them.
  """

  def __init__(
    self,
    folder,
    config: CheckpointConfig | None = None,
    *,
    read_only: bool = False,
  ):
    """Opens a folder; a writer makes it and removes what killed saves left.

    Args:
      folder: path, made absolute; gs:// works as well.
      config: what to keep.
      read_only: nothing in the folder is changed.

    Raises:
      FileNotFoundError: if read_only and there is no such folder.
    """
    self.folder = epath.Path(folder)
    if not str(self.folder).startswith("gs://"):
      self.folder = epath.Path(self.folder.expanduser().absolute())
    self.config = config or CheckpointConfig()
    self._damaged: dict[int, str] = {}
    if read_only:
      if not self.folder.is_dir():
        raise FileNotFoundError(f"checkpoint folder {self.folder} is missing")
      options = ocp.CheckpointManagerOptions(read_only=True)
    else:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=self.config.max_to_keep,
        keep_period=self.config.keep_period,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        # Where a folder cannot be made, `save` raises; made asynchronously,
        # it would leave threads behind that wait for it.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      )
    self._manager = ocp.CheckpointManager(self.folder, options=options)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def steps(self) -> list[int]:
    """Committed steps, oldest first."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """Newest committed step, or None."""
    return max(self.steps(), default=None)

  def save(
    self,
    step: int,
    trees: Mapping[str, Any],
    notes: Any = None,
    process_notes: Any = None,
  ) -> None:
    """Starts saving; returns when the arrays may change or be donated.

    Args:
      step: larger than every step saved so far.
      trees: named pytrees of jax arrays (PRNG keys too); nnx states are fine.
      notes: JSON-able, the same on every process.
      process_notes: JSON-able, this process's own (its data position).

    Raises:
      ValueError: if the step is not new, or a leaf cannot be saved.
      Exception: what went wrong in the save before, if it failed.
    """
    self._set_damaged_aside()
    newest = self.latest_step()
    if newest is not None and step <= newest:
      raise ValueError(f"{step=} is not newer than {newest} in {self.folder}")
    items, described = {}, {}
    for name, tree in trees.items():
      if name == _MANIFEST or not name.isidentifier():
        raise ValueError(f"{name=} cannot name a saved tree")
      leaves = trees_lib.named_leaves(tree)
      plain = {
        path: trees_lib.key_bits(leaf, f"{name}/{path}")
        for path, leaf in leaves.items()
      }
      sums = checksum.checksums(plain)
      described[name] = {
        path: trees_lib.describe(leaf) | {"checksum": sums[path]}
        for path, leaf in leaves.items()
      }
      if plain:
        items[name] = ocp.args.StandardSave(trees_lib.nest(plain))
    manifest = {
      "trees": described,
      "notes": notes,
      "process_notes": processes.gather(process_notes),
    }
    manifest = _as_json(manifest)
    manifest["digest"] = _digest(manifest)
    items[_MANIFEST] = ocp.args.JsonSave(manifest)
    if not self._manager.save(step, args=ocp.args.Composite(**items)):
      raise ValueError(f"{step=} was not saved in {self.folder}")

  def wait(self) -> None:
    """Blocks until the save under way is committed; raises if it failed."""
    self._manager.wait_until_finished()
    self._manager.check_for_errors()

  def close(self) -> None:
    """Waits as `wait` does and frees the threads."""
    self._manager.wait_until_finished()
    self._manager.close()

  def read_notes(self, step: int | None = None) -> tuple[int, Any]:
    """Returns (step, notes) of a step, or of the newest that can be read.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: if none can be read.
    """
    read = self._newest_readable(step, lambda _, manifest: manifest["notes"])
    return read[0], read[1]

  def restore(
    self, targets: Mapping[str, Any], step: int | None = None
  ) -> Restored:
    """Reads named trees into the shardings of the targets, all bytes checked.

    With no step given, a checkpoint that is damaged is reported in the log and
    the one before it is taken. The next `save` moves the damaged one aside.

    Args:
      targets: named pytrees of `jax.ShapeDtypeStruct` with shardings, or of
        arrays to be laid out like. Trees of the checkpoint not named here are
        not read. Shapes and types must agree; nothing is cast.
      step: a step, or None for the newest.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: naming the array, if a target does not fit the checkpoint; or
        if no checkpoint can be read.
    """

    def read(found, manifest):
      process_notes = manifest["process_notes"]
      if len(process_notes) != jax.process_count() and any(process_notes):
        raise ValueError(
          f"step {found} in {self.folder} was saved by {len(process_notes)}"
          f" processes with a data position each, and there are now"
          f" {jax.process_count()}"
        )
      trees = {
        name: self._read_tree(found, name, target, manifest["trees"])
        for name, target in targets.items()
      }
      own = min(jax.process_index(), len(process_notes) - 1)
      return trees, manifest["notes"], process_notes[own]

    found, (trees, notes, process_notes) = self._newest_readable(step, read)
    return Restored(
      step=found,
      trees=trees,
      notes=notes,
      process_notes=process_notes,
      damaged={k: v for k, v in self._damaged.items() if k > found},
    )

  def _newest_readable(self, step, read):
    """Returns (step, read(step, manifest)) of the newest undamaged step."""
    steps = self.steps()
    if not steps:
      raise FileNotFoundError(f"no checkpoint in {self.folder}")
    if step is not None and step not in steps:
      raise FileNotFoundError(
        f"no checkpoint of {step=} in {self.folder}, which has {steps}"
      )
    candidates = [step] if step is not None else steps[::-1]
    for candidate in candidates:
      reason, result = "", None
      try:
        result = read(candidate, self._read_manifest(candidate))
      except DamagedError as error:
        reason = str(error)
      # If any process cannot read it, all of them fall back.
      reason = next(filter(None, processes.gather(reason)), "")
      if not reason:
        return candidate, result
      self._damaged[candidate] = reason
      _log.warning(
        "checkpoint %d in %s is damaged and skipped: %s",
        candidate,
        self.folder,
        reason,
      )
    reasons = "; ".join(f"{k}: {self._damaged[k]}" for k in candidates)
    raise ValueError(f"no readable checkpoint in {self.folder}: {reasons}")

  def _read_manifest(self, step: int) -> dict[str, Any]:
    arguments = ocp.args.Composite(**{_MANIFEST: ocp.args.JsonRestore()})
    manifest = self._read_item(step, _MANIFEST, arguments)
    if not isinstance(manifest, dict) or "digest" not in manifest:
      raise DamagedError(f"{_MANIFEST} has no digest")
    digest = manifest.pop("digest")
    if digest != _digest(manifest):
      raise DamagedError(f"{_MANIFEST} does not match its digest")
    return manifest

  def _read_tree(self, step: int, name: str, target, described):
    if name not in described:
      raise ValueError(
        f"step {step} in {self.folder} has no {name}, only {list(described)}"
      )
    saved = described[name]
    wanted = trees_lib.named_leaves(target)
    trees_lib.check_fit(wanted, saved, f"step {step} in {self.folder}: {name}")
    if not wanted:
      return target
    plain = {path: trees_lib.key_bits_target(x) for path, x in wanted.items()}
    arguments = ocp.args.Composite(
      **{name: ocp.args.StandardRestore(trees_lib.nest(plain))}
    )
    nested = self._read_item(step, name, arguments)
    leaves = trees_lib.named_leaves(nested)
    if leaves.keys() != wanted.keys():
      raise DamagedError(f"{name} lacks arrays that its manifest lists")
    sums = checksum.checksums(leaves)
    for path, entry in saved.items():
      if sums[path] != entry["checksum"]:
        raise DamagedError(f"checksum of {name}/{path} is wrong")
    return trees_lib.unflatten_like(target, leaves, saved)

  def _read_item(self, step: int, name: str, arguments):
    try:
      return self._manager.restore(step, args=arguments)[name]
    except jax.errors.JaxRuntimeError:
      # Out of memory and the like: says nothing about the files.
      raise
    except Exception as error:
      # Orbax and TensorStore raise many types for unreadable files. The
      # arguments were checked against the manifest, so files are to blame.
      detail = " ".join(str(error).split())[:200]
      raise DamagedError(
        f"{name} cannot be read: {type(error).__name__}: {detail}"
      ) from error

  def _set_damaged_aside(self) -> None:
    """Renames damaged steps, which would stand in the way of their redoing."""
    if not self._damaged:
      return
    for step in self._damaged:
      source = self.folder / str(step)
      if jax.process_index() == 0 and source.exists():
        target = self.folder / f"damaged_{step}"
        if target.exists():
          target.rmtree()
        source.rename(target)
    self._damaged.clear()
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoints set aside")
    self._manager.reload()


def _as_json(value: Any) -> Any:
  """Returns what reading the value's JSON gives: lists, string keys."""
  try:
    return json.loads(json.dumps(value, allow_nan=False))
  except (TypeError, ValueError) as error:
    raise ValueError(f"notes must fit in JSON: {error}") from error


def _digest(manifest: dict[str, Any]) -> str:
  """SHA-256 of the manifest in canonical JSON."""
  text = json.dumps(manifest, sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()
