"""Reads the items of one step of a checkpoint folder, every byte checked."""

from typing import Any

import jax
import orbax.checkpoint as ocp

from dsv32_jax.training import checkpoint_trees as trees_lib
from dsv32_jax.training import checksum
from dsv32_jax.training import manifest as manifest_lib

# Name of the item beside the trees.
MANIFEST = "manifest"


class DamagedError(Exception):
  """A checkpoint's files are not what was saved."""


def read_manifest(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """Reads what a step says of itself.

  Raises:
    DamagedError: if it is not what was saved.
  """
  arguments = ocp.args.Composite(**{MANIFEST: ocp.args.JsonRestore()})
  manifest = _read_item(manager, step, MANIFEST, arguments)
  try:
    return manifest_lib.unseal(manifest)
  except ValueError as error:
    raise DamagedError(f"{MANIFEST} {error}") from error


def read_tree(
  manager: ocp.CheckpointManager,
  step: int,
  name: str,
  target: Any,
  described: dict[str, Any],
) -> Any:
  """Reads one named tree into the shardings of its target.

  Args:
    manager: of the folder.
    step: of the checkpoint.
    name: of the tree.
    target: pytree of `jax.ShapeDtypeStruct` or of arrays.
    described: the manifest's `trees`.

  Raises:
    DamagedError: if the arrays are not what was saved.
    ValueError: if the target does not fit.
  """
  where = f"step {step} in {manager.directory}"
  if name not in described:
    raise ValueError(f"{where} has no {name}, only {list(described)}")
  saved = described[name]
  wanted = trees_lib.named_leaves(target)
  trees_lib.check_fit(wanted, saved, f"{where}: {name}")
  if not wanted:
    return target
  plain = {path: trees_lib.key_bits_target(x) for path, x in wanted.items()}
  arguments = ocp.args.Composite(
    **{name: ocp.args.StandardRestore(trees_lib.nest(plain))}
  )
  nested = _read_item(manager, step, name, arguments)
  leaves = trees_lib.named_leaves(nested)
  if leaves.keys() != wanted.keys():
    raise DamagedError(f"{name} lacks arrays that its manifest lists")
  sums = checksum.checksums(leaves)
  for path, entry in saved.items():
    if sums[path] != entry["checksum"]:
      raise DamagedError(f"checksum of {name}/{path} is wrong")
  return trees_lib.unflatten_like(target, leaves, saved)


def _read_item(manager, step: int, name: str, arguments):
  try:
    return manager.restore(step, args=arguments)[name]
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
