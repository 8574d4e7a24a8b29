"""The definition of index scores over a paged cache."""
# B requests, N pages of a request, P pages of the cache, Z keys of a page,
# S keys of a request (N*Z), I index heads, K index width

import jax
import jax.numpy as jnp


def scores(query_BIK, weight_BI, page_PZK, scale_PZ, table_BN, lengths_B):
  """Gathers all keys of all requests; see the front for what it returns."""
  batch, _, width = query_BIK.shape
  key_BSK = page_PZK[table_BN].reshape(batch, -1, width)
  dot_BIS = jnp.einsum(
    "BIK,BSK->BIS",
    query_BIK.astype(jnp.float32),
    key_BSK.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  weight_BI1 = weight_BI.astype(jnp.float32)[..., None]
  score_BS = jnp.sum(jnp.maximum(dot_BIS, 0.0) * weight_BI1, axis=1)
  if scale_PZ is not None:
    score_BS = score_BS * scale_PZ[table_BN].reshape(batch, -1)
  seen_BS = jnp.arange(score_BS.shape[1]) < lengths_B[:, None]
  return jnp.where(seen_BS, score_BS, -jnp.inf)
