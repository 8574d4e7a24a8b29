"""Index scores over a paged cache on TPU.

Grid (request, chunk), a chunk being about `CHUNK_KEYS` keys of one request.
The kernel copies the pages of a chunk itself, in whole pages and only those
that hold keys, into one of two buffers: while a chunk is multiplied, the copies
of the request's next chunk are under way. The keys are the stationary operand
of the matrix units, so that the scores of a chunk lie along lanes, as they are
stored: [I,K] x [K,keys], ReLU, weights, and a head sum over sublanes. XLA
gathers the scales, 4 bytes to the 128 of a key, beforehand.

Chunks past the length cost a store of -inf. VMEM: two chunks of keys in 8 bits,
one in bfloat16, and products [I,keys] in float32 (64 heads and 2048 keys: 1.5
MiB in all).
"""
# B requests, N pages of a request, P pages of the cache, Z keys of a page,
# S keys of a request (N*Z), C keys of a chunk, I index heads, K index width

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

CHUNK_KEYS = 2048
LANES = 128
# Rows of 8-bit values that lie together in memory, more than of wider ones.
ROWS = 32


def scores(
  query_BIK,
  weight_BI,
  page_PZK,
  scale_PZ,
  table_BN,
  lengths_B,
  *,
  interpret=False,
):
  """Returns float32 [B,N*Z]; see the front."""
  batch, num_pages = table_BN.shape
  page_size, width = page_PZK.shape[1:]
  if page_size % ROWS or width % LANES:
    raise ValueError(
      f"{page_PZK.shape=} needs pages of a multiple of {ROWS} keys and a width"
      f" that is a multiple of {LANES}"
    )
  pages = max(1, min(CHUNK_KEYS // page_size, num_pages))
  # Chunks of scores are blocks of whole registers.
  pages = -(-pages * page_size // LANES) * LANES // page_size
  keys = pages * page_size
  if keys % LANES:
    raise ValueError(f"{page_size=} must divide or be a multiple of {LANES}")
  chunks = -(-num_pages // pages)
  table_BN = jnp.pad(table_BN, [(0, 0), (0, chunks * pages - num_pages)])
  if scale_PZ is None:
    scale_B1S = jnp.ones((batch, 1, chunks * keys), jnp.float32)
  else:
    scale_B1S = scale_PZ[table_BN].reshape(batch, 1, -1)
  heads = query_BIK.shape[1]
  narrow = (jnp.bfloat16, jnp.float8_e4m3fn)
  both_narrow = query_BIK.dtype in narrow and page_PZK.dtype in narrow
  dtype = jnp.bfloat16 if both_narrow else jnp.float32

  def whole(*shape):
    return pl.BlockSpec((1, *shape), lambda b, c, *_: (b, 0, 0))

  by_chunk = pl.BlockSpec((1, 1, keys), lambda b, c, *_: (b, 0, c))
  score_B1S = pl.pallas_call(
    functools.partial(_kernel, pages, dtype),
    out_shape=jax.ShapeDtypeStruct((batch, 1, chunks * keys), jnp.float32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(batch, chunks),
      in_specs=[
        whole(heads, width),
        whole(heads, 1),
        by_chunk,
        pl.BlockSpec(memory_space=pl.ANY),
      ],
      out_specs=by_chunk,
      scratch_shapes=[
        pltpu.VMEM((2, pages, page_size, width), page_PZK.dtype),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    interpret=interpret,
    name="decode_scores",
  )(
    table_BN,
    lengths_B,
    query_BIK,
    weight_BI.astype(jnp.float32)[..., None],
    scale_B1S,
    page_PZK,
  )
  return score_B1S[:, 0, : num_pages * page_size]


def _kernel(
  pages,
  dtype,
  table_ref,
  lengths_ref,
  query_ref,
  weight_ref,
  scale_ref,
  page_ref,
  score_ref,
  key_ref,
  arrived,
):
  """One chunk of one request."""
  request, chunk = pl.program_id(0), pl.program_id(1)
  length = lengths_ref[request]
  _, _, page_size, width = key_ref.shape
  keys = pages * page_size

  def each_page(chunk, act):
    """Acts on the copy of each page of a chunk that holds keys."""
    slot = lax.rem(chunk, 2)
    left = jnp.maximum(length - chunk * keys, 0)
    used = jnp.minimum(lax.div(left + page_size - 1, page_size), pages)

    def body(i, _):
      page = table_ref[request, chunk * pages + i]
      act(
        pltpu.make_async_copy(
          page_ref.at[page], key_ref.at[slot, i], arrived.at[slot]
        )
      )

    lax.fori_loop(0, used, body, None)

  @pl.when(chunk == 0)
  def _():
    each_page(chunk, lambda copy: copy.start())

  @pl.when(chunk + 1 < pl.num_programs(1))
  def _():
    each_page(chunk + 1, lambda copy: copy.start())

  each_page(chunk, lambda copy: copy.wait())

  @pl.when(chunk * keys >= length)
  def _():
    score_ref[0] = jnp.full((1, keys), -jnp.inf, jnp.float32)

  @pl.when(chunk * keys < length)
  def _():
    key_CK = key_ref[lax.rem(chunk, 2)].reshape(keys, width).astype(dtype)
    dot_IC = lax.dot_general(
      query_ref[0].astype(dtype),
      key_CK,
      (((1,), (1,)), ((), ())),
      # Products of bfloat16 are exact in float32 as they are.
      precision=(
        lax.Precision.DEFAULT
        if dtype == jnp.bfloat16
        else lax.Precision.HIGHEST
      ),
      preferred_element_type=jnp.float32,
    )
    term_IC = jnp.maximum(dot_IC, 0.0) * weight_ref[0]
    score_1C = jnp.sum(term_IC, axis=0, keepdims=True) * scale_ref[0]
    index_1C = lax.broadcasted_iota(jnp.int32, (1, keys), 1)
    seen_1C = index_1C < length - chunk * keys
    score_ref[0] = jnp.where(seen_1C, score_1C, -jnp.inf)
