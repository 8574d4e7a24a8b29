"""Which keys a query may see: causality by slot, documents by segment.

Query t sits at key slot `slots_BT[b, t]` (-1: a padding query, which sees
nothing). It sees key s iff s <= its slot and, where segments are given, both
are in the same one.
"""
# B batch, T queries, S keys

import jax.numpy as jnp


def allowed(slots_BT, num_keys, query_segments_BT=None, key_segments_BS=None):
  """Returns bool [B,T,S]: the keys that each query may see."""
  allowed_BTS = jnp.arange(num_keys, dtype=jnp.int32) <= slots_BT[..., None]
  if query_segments_BT is None:
    return allowed_BTS
  same_BTS = query_segments_BT[..., None] == key_segments_BS[:, None, :]
  return allowed_BTS & same_BTS


def check(slots_BT, num_keys, query_segments_BT, key_segments_BS):
  """Raises ValueError unless the arrays describe [B,T] queries, [B,S] keys."""
  if slots_BT.ndim != 2 or not jnp.issubdtype(slots_BT.dtype, jnp.integer):
    raise ValueError(f"{slots_BT=} must be an integer array [B,T]")
  if (query_segments_BT is None) != (key_segments_BS is None):
    raise ValueError(
      f"{query_segments_BT=} and {key_segments_BS=} must be given together"
    )
  if query_segments_BT is None:
    return
  if query_segments_BT.shape != slots_BT.shape:
    raise ValueError(
      f"{query_segments_BT.shape=} differs from {slots_BT.shape=}"
    )
  if key_segments_BS.shape != (slots_BT.shape[0], num_keys):
    raise ValueError(
      f"{key_segments_BS.shape=} must be {(slots_BT.shape[0], num_keys)}"
    )
