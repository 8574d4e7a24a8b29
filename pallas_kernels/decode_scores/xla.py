"""Index scores over a paged cache in plain XLA.

A loop over chunks of about `CHUNK_KEYS` keys of all requests gathers their
pages, widens them and multiplies; it ends with the longest request. Per step it
holds the chunk in float32 and its products [B,keys,I]: little enough to stay in
a CPU's cache, where all keys at once would go through memory three times. A
key's score is the same, bit for bit, however long the tables are.

The chunk is written into a buffer that is a little longer and goes from step to
step. XLA's CPU compiler splits a gather among threads however small it is,
which for this one costs more than it saves, but never an update in place.
"""
# B requests, A requests of a run, N pages of a request, P pages of the cache,
# Z keys of a page, S keys of a request (N*Z), C keys of a chunk, X those and
# SPARE, I index heads, J heads of a run (A*I), K index width

import functools
import operator

from jax import lax
import jax.numpy as jnp

CHUNK_KEYS = 512
# An update as long as its buffer would be no update.
SPARE = 16


def scores(
  query_BIK, weight_BI, page_PZK, scale_PZ, table_BN, lengths_B, *, run=1
):
  """Returns float32 [B,N*Z]; see the front."""
  heads = query_BIK.shape[1]
  page_size, width = page_PZK.shape[1:]
  num_pages = table_BN.shape[1]
  # From here on B counts runs. An entry that a request does not reach is 0, so
  # the largest is the page for those that do.
  table_BN = jnp.max(table_BN.reshape(-1, run, num_pages), axis=1)
  batch = table_BN.shape[0]
  # As many whatever N is: the shapes of a step decide its rounding.
  pages = max(1, CHUNK_KEYS // page_size)
  keys = pages * page_size
  chunks = -(-num_pages // pages)
  padded_BN = jnp.pad(table_BN, [(0, 0), (0, chunks * pages - num_pages)])
  query_BJK = query_BIK.astype(jnp.float32).reshape(batch, run * heads, width)
  weight_BAI = weight_BI.astype(jnp.float32).reshape(batch, run, heads)
  lengths_BA = lengths_B.reshape(batch, run)

  def body(chunk, carry):
    score_BAS, key_BXK = carry
    own_BN = lax.dynamic_slice_in_dim(padded_BN, chunk * pages, pages, axis=1)
    own_BCK = page_PZK[own_BN].reshape(batch, keys, width).astype(jnp.float32)
    key_BXK = lax.dynamic_update_slice(key_BXK, own_BCK, (0, 0, 0))
    # Few rows against many: the keys go first, as the operand that streams.
    dot_BXJ = jnp.einsum(
      "BXK,BJK->BXJ", key_BXK, query_BJK, precision=lax.Precision.HIGHEST
    )
    dot_BCAI = dot_BXJ[:, :keys].reshape(batch, keys, run, heads)
    score_BAC = _head_sum(dot_BCAI, weight_BAI)
    if scale_PZ is not None:
      score_BAC = score_BAC * scale_PZ[own_BN].reshape(batch, 1, keys)
    start = chunk * keys
    score_BAS = lax.dynamic_update_slice(score_BAS, score_BAC, (0, 0, start))
    return score_BAS, key_BXK

  score_BAS = jnp.zeros((batch, run, chunks * keys), jnp.float32)
  key_BXK = jnp.zeros((batch, keys + SPARE, width), jnp.float32)
  used = (jnp.max(lengths_B) + keys - 1) // keys
  score_BAS, _ = lax.fori_loop(0, used, body, (score_BAS, key_BXK))
  score_BAS = score_BAS[..., : num_pages * page_size]
  seen_BAS = jnp.arange(score_BAS.shape[2]) < lengths_BA[..., None]
  score_BAS = jnp.where(seen_BAS, score_BAS, -jnp.inf)
  return score_BAS.reshape(batch * run, -1)


def _head_sum(dot_BCAI, weight_BAI):
  """Applies ReLU and weights; the heads are added one by one, in order."""
  terms = [
    jnp.maximum(dot_BCAI[..., i], 0.0) * weight_BAI[:, None, :, i]
    for i in range(dot_BCAI.shape[-1])
  ]
  return jnp.swapaxes(functools.reduce(operator.add, terms), 1, 2)
