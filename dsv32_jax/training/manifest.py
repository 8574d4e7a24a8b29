"""What a checkpoint says of itself: arrays, notes, the code that made it.

The manifest is one JSON object, saved beside the arrays and sealed by a digest
of its own text.
"""

import functools
import hashlib
import json
import pathlib
import platform
from typing import Any

import flax
import jax
import jaxlib
import optax
import orbax.checkpoint as ocp

import pallas_kernels

_PACKAGES = (
  pathlib.Path(__file__).parents[1],
  pathlib.Path(pallas_kernels.__file__).parent,
)


def make(
  trees: dict[str, Any], notes: Any, process_notes: list[Any], loss: Any
) -> dict[str, Any]:
  """Makes a sealed manifest.

  Args:
    trees: by name and path, what `checkpoint_trees.describe` says of an array
      and its checksum.
    notes: JSON-able.
    process_notes: JSON-able, one a process.
    loss: by which checkpoints are compared, or None.

  Raises:
    ValueError: if something does not fit in JSON.
  """
  manifest = {
    "trees": trees,
    "notes": notes,
    "process_notes": process_notes,
    "loss": loss,
    "code": code(),
  }
  try:
    # What reading it will give: lists, string keys.
    manifest = json.loads(_text(manifest))
  except (TypeError, ValueError) as error:
    raise ValueError(f"notes must fit in JSON: {error}") from error
  return manifest | {"digest": _digest(manifest)}


def unseal(manifest: Any) -> dict[str, Any]:
  """Returns a manifest that was read, without its digest.

  Raises:
    ValueError: if it is not what `make` made.
  """
  if not isinstance(manifest, dict) or "digest" not in manifest:
    raise ValueError("has no digest")
  content = {k: v for k, v in manifest.items() if k != "digest"}
  if manifest["digest"] != _digest(content):
    raise ValueError("does not match its digest")
  return content


@functools.cache
def code() -> dict[str, str]:
  """Says which code runs: versions, and a SHA-256 over this project's sources.

  The digest is that of the names and contents of all .py files of both
  packages, so it tells changes that were never committed as well.
  """
  total = hashlib.sha256()
  for folder in _PACKAGES:
    for path in sorted(folder.rglob("*.py")):
      content = hashlib.sha256(path.read_bytes()).hexdigest()
      name = path.relative_to(folder.parent).as_posix()
      total.update(f"{name} {content}\n".encode())
  return {
    "sources": total.hexdigest(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "flax": flax.__version__,
    "optax": optax.__version__,
    "orbax": ocp.__version__,
  }


def _text(manifest: dict[str, Any]) -> str:
  return json.dumps(manifest, sort_keys=True, allow_nan=False)


def _digest(manifest: dict[str, Any]) -> str:
  """SHA-256 of the manifest in canonical JSON."""
  return hashlib.sha256(_text(manifest).encode()).hexdigest()
