"""Index scores over a paged cache in plain XLA.

A loop over chunks of about `CHUNK_KEYS` keys of all requests gathers their
pages, widens them and multiplies; it ends with the longest request. Per step it
holds the chunk in float32 and its products [B,keys,I]: little enough to stay in
a CPU's cache, where all keys at once would go through memory three times. A
key's score is the same, bit for bit, however long the tables are.
"""
# B requests, N pages of a request, P pages of the cache, Z keys of a page,
# S keys of a request (N*Z), C keys of a chunk, I index heads, K index width

import functools
import operator

from jax import lax
import jax.numpy as jnp

CHUNK_KEYS = 1024


def scores(query_BIK, weight_BI, page_PZK, scale_PZ, table_BN, lengths_B):
  """Returns float32 [B,N*Z]; see the front."""
  batch, num_pages = table_BN.shape
  page_size, width = page_PZK.shape[1:]
  # As many whatever N is: the shapes of a step decide its rounding.
  pages = max(1, CHUNK_KEYS // page_size)
  keys = pages * page_size
  chunks = -(-num_pages // pages)
  padded_BN = jnp.pad(table_BN, [(0, 0), (0, chunks * pages - num_pages)])
  query_BIK = query_BIK.astype(jnp.float32)
  weight_BI = weight_BI.astype(jnp.float32)

  def body(chunk, score_BS):
    own_BN = lax.dynamic_slice_in_dim(padded_BN, chunk * pages, pages, axis=1)
    key_BCK = page_PZK[own_BN].reshape(batch, keys, width)
    # Few rows against many: the keys go first, as the operand that streams.
    dot_BCI = jnp.einsum(
      "BCK,BIK->BCI",
      key_BCK.astype(jnp.float32),
      query_BIK,
      precision=lax.Precision.HIGHEST,
    )
    score_BC = _head_sum(dot_BCI, weight_BI)
    if scale_PZ is not None:
      score_BC = score_BC * scale_PZ[own_BN].reshape(batch, keys)
    return lax.dynamic_update_slice(score_BS, score_BC, (0, chunk * keys))

  score_BS = jnp.zeros((batch, chunks * keys), jnp.float32)
  used = (jnp.max(lengths_B) + keys - 1) // keys
  score_BS = lax.fori_loop(0, used, body, score_BS)
  score_BS = score_BS[:, : num_pages * page_size]
  seen_BS = jnp.arange(score_BS.shape[1]) < lengths_B[:, None]
  return jnp.where(seen_BS, score_BS, -jnp.inf)


def _head_sum(dot_BCI, weight_BI):
  """Applies ReLU and weights; the heads are added one by one, in order."""
  terms = [
    jnp.maximum(dot_BCI[..., i], 0.0) * weight_BI[:, i : i + 1]
    for i in range(dot_BCI.shape[-1])
  ]
  return functools.reduce(operator.add, terms)
