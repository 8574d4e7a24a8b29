"""Checkpoints: saved in the background, committed whole, checked when read.

The one module, with checkpoint_reading, that uses Orbax. A checkpoint is a
folder named by its step with one Orbax item for each named tree of arrays, and
a manifest: shape, type and checksum of every array, the code that ran, and
JSON-able notes (configs, data position). Orbax renames a finished step into
place, so a killed save leaves the one before it. The checksums find what Orbax
would restore in silence: a flipped bit.
"""

from collections.abc import Mapping
import dataclasses
import logging
import math
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from dsv32_jax.training import checkpoint_reading as reading
from dsv32_jax.training import checkpoint_trees as trees_lib
from dsv32_jax.training import checksum
from dsv32_jax.training import manifest as manifest_lib
from dsv32_jax.training import processes

_LOSS = "loss"
_log = logging.getLogger(__name__)


class SaveError(OSError):
  """A checkpoint could not be written; those before it are whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When checkpoints are made and which stay.

  Attributes:
    every_steps: steps between two saves.
    max_to_keep: newest checkpoints that stay; None: all.
    keep_period: steps divisible by it stay for ever; None: no such steps.
    keep_best: checkpoints with the lowest loss that stay besides.
  """

  every_steps: int = 1000
  max_to_keep: int | None = 3
  keep_period: int | None = None
  keep_best: int = 0

  def __post_init__(self):
    if self.keep_best < 0:
      raise ValueError(
        f"checkpoint.keep_best={self.keep_best} must not be negative"
      )
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
    process_notes: as given to `save` by every process then, in their order.
    damaged: steps newer than `step` that could not be read, with the reason.
  """

  step: int
  trees: dict[str, Any]
  notes: Any
  process_notes: list[Any]
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
        preservation_policy=_preservation(self.config),
        best_fn=_loss if self.config.keep_best else None,
        best_mode="min",
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

  def best_step(self) -> int:
    """The readable step of lowest loss, the newest of equal ones.

    Raises:
      FileNotFoundError: if no checkpoint was saved with a loss.
    """
    losses = {}
    for step in self.steps():
      try:
        loss = reading.read_manifest(self._manager, step).get("loss")
      except reading.DamagedError:
        continue
      if loss is not None:
        losses[step] = loss
    if not losses:
      raise FileNotFoundError(f"no checkpoint in {self.folder} has a loss")
    return min(losses, key=lambda step: (losses[step], -step))

  def save(
    self,
    step: int,
    trees: Mapping[str, Any],
    notes: Any = None,
    process_notes: Any = None,
    *,
    loss: float | None = None,
  ) -> None:
    """Starts saving; returns when the arrays may change or be donated.

    Args:
      step: larger than every step saved so far.
      trees: named pytrees of jax arrays (PRNG keys too); nnx states are fine.
      notes: JSON-able, the same on every process.
      process_notes: JSON-able, this process's own (its data position).
      loss: by which `keep_best` and `best_step` compare, the same on every
        process; NaN and infinities count as none.

    Raises:
      ValueError: if the step is not new, or a leaf cannot be saved.
      SaveError: if the disk does not take it, or did not take the one before.
    """
    self._set_damaged_aside()
    newest = self.latest_step()
    if newest is not None and step <= newest:
      raise ValueError(f"{step=} is not newer than {newest} in {self.folder}")
    items, described = {}, {}
    for name, tree in trees.items():
      if name == reading.MANIFEST or not name.isidentifier():
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
    if loss is not None and not math.isfinite(loss):
      loss = None
    items[reading.MANIFEST] = ocp.args.JsonSave(
      manifest_lib.make(described, notes, processes.gather(process_notes), loss)
    )
    self._write(step, items, loss)

  def wait(self) -> None:
    """Blocks until the save under way is committed.

    Raises:
      SaveError: if it failed.
    """
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._save_error(error) from error

  def close(self) -> None:
    """Waits as `wait` does and frees the threads."""
    try:
      self.wait()
    finally:
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
      trees = {
        name: reading.read_tree(
          self._manager, found, name, target, manifest["trees"]
        )
        for name, target in targets.items()
      }
      return trees, manifest["notes"], manifest["process_notes"]

    found, (trees, notes, process_notes) = self._newest_readable(step, read)
    return Restored(
      step=found,
      trees=trees,
      notes=notes,
      process_notes=process_notes,
      damaged={k: v for k, v in self._damaged.items() if k > found},
    )

  def _write(self, step: int, items, loss: float | None) -> None:
    """Hands the items of a step to Orbax."""
    metrics = None if loss is None else {_LOSS: loss}
    try:
      arguments = ocp.args.Composite(**items)
      saved = self._manager.save(step, args=arguments, metrics=metrics)
    except Exception as error:
      # Orbax and TensorStore raise many types for a disk that fails.
      raise self._save_error(error) from error
    if not saved:
      raise SaveError(f"{step=} was not saved in {self.folder}")

  def _save_error(self, error: Exception) -> SaveError:
    detail = " ".join(str(error).split())
    return SaveError(
      f"a checkpoint could not be written in {self.folder}:"
      f" {type(error).__name__}: {detail[-200:]}"
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
        manifest = reading.read_manifest(self._manager, candidate)
        result = read(candidate, manifest)
      except reading.DamagedError as error:
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


def _loss(metrics: Mapping[str, float]) -> float:
  return metrics[_LOSS]


def _preservation(config: CheckpointConfig):
  """Orbax's rules for what stays; what one of them keeps does."""
  rules = ocp.checkpoint_managers
  kept = [rules.LatestN(config.max_to_keep)]
  if config.keep_period is not None:
    kept.append(rules.EveryNSteps(config.keep_period))
  if config.keep_best:
    best = rules.BestN(
      get_metric_fn=_loss,
      reverse=True,  # the last of its order stay
      n=config.keep_best,
      keep_checkpoints_without_metrics=False,
    )
    kept.append(best)
  return rules.AnyPreservationPolicy(kept)
