"""Index scores of one query a request against its pages of keys.

score[s] = scale[s] * sum_i weight[i] * relu(query[i] . key[s]) in float32
(DeepSeek-V3.2 eq. 1) for every key of a request, through its page table.
"""
# B requests, N pages of a request, P pages of the cache, Z keys of a page,
# S keys of a request (N*Z), I index heads, K index width

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import implementations
from pallas_kernels.decode_scores import ref
from pallas_kernels.decode_scores import tpu
from pallas_kernels.decode_scores import xla

__all__ = ["decode_scores"]


def decode_scores(
  query_BIK,
  weight_BI,
  page_PZK,
  scale_PZ,
  table_BN,
  lengths_B,
  *,
  run=1,
  implementation=None,
):
  """Scores all cached keys of each request.

  Args:
    query_BIK: one index query a request; float8_e4m3fn values are allowed.
    weight_BI: the weight of each head with every scale factor inside.
    page_PZK: keys of all requests, by page, float8_e4m3fn or wider.
    scale_PZ: float32 factor of each key's scores, or None for keys that have
      none.
    table_BN: int32 page of each request's keys n*Z to n*Z + Z - 1. Entries past
      the length are not used and may hold anything.
    lengths_B: int32 number of keys of each request, at most N*Z.
    run: requests that follow each other and have one table, as the tokens of a
      sequence do; "xla" reads their keys once, to others it is the same.
    implementation: "ref", the definition; "xla", plain XLA over chunks of
      pages; "gpu", a Hopper kernel for queries and keys that are both
      float8_e4m3fn or bfloat16; "tpu", a TPU kernel that copies pages as it
      goes; "tpu_interpret", that kernel interpreted on any device, with
      uninitialised memory poisoned and races reported; or None for the default,
      "xla".

  Returns:
    float32 scores [B, N*Z]; -inf at and past the length.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
  """
  _check(query_BIK, weight_BI, page_PZK, scale_PZ, table_BN, lengths_B)
  if run < 1 or query_BIK.shape[0] % run:
    raise ValueError(f"{run=} does not divide {query_BIK.shape=}")
  scores = {
    "ref": ref.scores,
    "xla": functools.partial(xla.scores, run=run),
    "gpu": implementations.at_first_call(__name__, "gpu", "scores"),
    "tpu": tpu.scores,
    "tpu_interpret": implementations.interpreted(tpu.scores),
  }
  name = implementations.choose(scores, implementation)
  keys = page_PZK.shape[1] * table_BN.shape[1]
  lengths_B = jnp.clip(lengths_B.astype(jnp.int32), 0, keys)
  used_BN = jnp.arange(keys)[:: page_PZK.shape[1]] < lengths_B[:, None]
  table_BN = jnp.where(used_BN, table_BN, 0).astype(jnp.int32)
  return scores[name](
    query_BIK, weight_BI, page_PZK, scale_PZ, table_BN, lengths_B
  )


def _check(query_BIK, weight_BI, page_PZK, scale_PZ, table_BN, lengths_B):
  if query_BIK.ndim != 3 or page_PZK.ndim != 3 or table_BN.ndim != 2:
    raise ValueError(
      f"{query_BIK.shape=} {page_PZK.shape=} {table_BN.shape=} need 3, 3 and 2"
      " axes"
    )
  implementations.refuse_empty(query_BIK, page_PZK, table_BN)
  if page_PZK.shape[2] != query_BIK.shape[2]:
    raise ValueError(f"{page_PZK.shape=} does not fit {query_BIK.shape=}")
  if not jnp.issubdtype(page_PZK.dtype, jnp.floating):
    raise ValueError(f"{page_PZK.dtype=} must be floating")
  if weight_BI.shape != query_BIK.shape[:2]:
    raise ValueError(f"{weight_BI.shape=} does not fit {query_BIK.shape=}")
  if scale_PZ is not None and scale_PZ.shape != page_PZK.shape[:2]:
    raise ValueError(f"{scale_PZ.shape=} does not fit {page_PZK.shape=}")
  if lengths_B.shape != query_BIK.shape[:1]:
    raise ValueError(f"{lengths_B.shape=} does not fit {query_BIK.shape=}")
  if table_BN.shape[0] != query_BIK.shape[0]:
    raise ValueError(f"{table_BN.shape=} does not fit {query_BIK.shape=}")
  for x in (table_BN, lengths_B):
    if not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(f"{x.dtype=} must be an integer type")
