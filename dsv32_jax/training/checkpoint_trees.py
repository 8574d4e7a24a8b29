"""Pytrees as named leaves, the form in which checkpoints hold them."""

from typing import Any

import jax
import jax.numpy as jnp


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns leaves by path, such as "layers/0/scale".

  The value inside an nnx.Variable goes by the variable's own path.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  named = {_name(path): leaf for path, leaf in leaves}
  assert len(named) == len(leaves), "two leaves have the same path"
  return named


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
  """Turns paths into nested dicts with string keys."""
  nested: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, last = path.split("/")
    inner = nested
    for parent in parents:
      inner = inner.setdefault(parent, {})
    inner[last] = leaf
  return nested


def unflatten_like(
  target: Any, leaves: dict[str, jax.Array], saved: dict[str, Any]
) -> Any:
  """Puts arrays in the place of the target's leaves.

  Args:
    target: tree of arrays or of what describes them.
    leaves: arrays by path, a PRNG key as its words.
    saved: what `describe` said of them.
  """

  def take(path, wanted):
    name = _name(path)
    if not _is_key(wanted):
      return leaves[name]
    return jax.random.wrap_key_data(leaves[name], impl=saved[name]["key"])

  return jax.tree_util.tree_map_with_path(take, target)


def describe(leaf: jax.Array) -> dict[str, Any]:
  """Returns what the manifest says of an array, but for its checksum."""
  described = _form(leaf)
  if _is_key(leaf):
    described["key"] = str(jax.random.key_impl(leaf))
  return described


def check_fit(
  wanted: dict[str, Any], saved: dict[str, Any], where: str
) -> None:
  """Raises ValueError that names the first array which differs."""
  for path in wanted:
    if path not in saved:
      raise ValueError(f"{where}/{path} is not in the checkpoint")
  for path, entry in saved.items():
    if path not in wanted:
      raise ValueError(f"{where}/{path} is in the checkpoint but not wanted")
    have = _form(wanted[path])
    for key in have:
      if have[key] != entry[key]:
        raise ValueError(
          f"{where}/{path} has {key} {entry[key]} and {have[key]} is wanted"
        )


def key_bits(leaf: Any, name: str) -> jax.Array:
  """Returns an array that can be saved: a PRNG key's uint32 words, else itself.

  Raises:
    ValueError: with the leaf's name, if it is not a jax array or is empty.
  """
  if not isinstance(leaf, jax.Array):
    kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
    raise ValueError(f"{name} is a {kind}, only jax arrays can be saved")
  if leaf.size == 0:
    raise ValueError(f"{name} has no elements and cannot be saved")
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def key_bits_target(leaf: Any) -> jax.ShapeDtypeStruct:
  """Returns the target of what `key_bits` saves, with the leaf's sharding."""
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  bits = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
  return jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=sharding)


def _form(leaf: Any) -> dict[str, Any]:
  return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(path) -> str:
  if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator="/")
