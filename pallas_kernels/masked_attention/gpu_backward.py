"""Flash attention under packed masks on Hopper tensor cores, backward.

Two passes of one kernel, which only differ in what stays and what streams:
- queries stay (with the cotangents of their outputs), keys and values stream;
  the gradient of the queries is summed up;
- keys and values stay, queries and cotangents stream; the gradients of keys and
  values are summed up. With one key head for all, its heads follow each other.
Both recompute the weights from the log-sum-exps, and skip what sees nothing, by
the lists of the forward pass.
Tiles: 128 rows that stay, 64 for each of two warpgroups; tiles of 64 rows
stream through a ring that a third warpgroup fills by TMA.
Pipeline of a tile: two products of 64 x 64 (scores, gradient of the weights),
weights and score gradients in registers, and from there (bfloat16) products
into sums that stay in registers.
Memory of a block, in shared memory: 80 KB that stay and two tiles of 40 KB for
widths of 192 and 128. Products are bfloat16, sums float32.
"""
# B batch, T queries, S keys, H heads, G key heads (1 or H), Q query and key
# width, V value width, W words of 32 keys, M blocks, N tiles, L rows that stay,
# X rows that stream, E heads of either, R 64 rows, D 64 rows of a tile

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import gpu_tiles
from pallas_kernels import tiles
from pallas_kernels.masked_attention import gpu
from pallas_kernels.masked_attention import gpu_lists

ROWS, BLOCK = gpu_tiles.ROWS, gpu.BLOCK
FETCHER = BLOCK // ROWS
REGISTERS = gpu_tiles.register_shares(*[240] * FETCHER, 24)
# Query, key and value width that the sums in registers have room for.
MAX_WIDTHS = 320
# Words of a block of keys.
WORDS = BLOCK // bitmask.BITS
LOG2_E = math.log2(math.e)


class _Vectors(NamedTuple):
  """What the kernel reads beside tiles; global memory."""

  lse_BHT: jax.Array
  mean_BHT: jax.Array
  words_BWT: jax.Array
  tiles_BMN: jax.Array
  count_BM: jax.Array


class _Static(NamedTuple):
  """What is known at compile time.

  `heads` is how many heads stream one after the other.
  """

  of_keys: bool
  scale: float
  heads: int
  interpret: bool


def backward(
  query_BTHQ,
  key_BSGQ,
  value_BSGV,
  visible,
  scale,
  out_BTHV,
  lse_BTH,
  d_out_BTHV,
  *,
  interpret=False,
):
  """Returns the gradients of query, key and value in their dtypes.

  Raises:
    ValueError: what `gpu.forward` refuses, or widths of more than 320 together.
  """
  gpu.check(query_BTHQ, key_BSGQ, value_BSGV)
  widths = query_BTHQ.shape[3] + value_BSGV.shape[3]
  if widths > MAX_WIDTHS:
    raise ValueError(f"{widths=} of query and value exceed {MAX_WIDTHS=}")
  num_queries, num_keys = query_BTHQ.shape[1], key_BSGQ.shape[1]
  padded_keys = -(-num_keys // BLOCK) * BLOCK
  words_BWT = gpu_lists.pad_words(
    gpu_lists.visible_words(*visible, num_keys), padded_keys, BLOCK
  )
  mean_BTH = jnp.sum(
    d_out_BTHV.astype(jnp.float32) * out_BTHV.astype(jnp.float32), axis=-1
  )
  # A query that sees nothing has lse -inf and no weight that counts.
  lse_BTH = jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH) * LOG2_E

  def pad_queries(array_BTH):
    return tiles.pad(array_BTH, words_BWT.shape[2])

  queries = (
    pad_queries(query_BTHQ),
    pad_queries(d_out_BTHV.astype(jnp.bfloat16)),
  )
  keys = (tiles.pad(key_BSGQ, padded_keys), tiles.pad(value_BSGV, padded_keys))
  vectors = [jnp.swapaxes(pad_queries(x), 1, 2) for x in (lse_BTH, mean_BTH)]
  vectors.append(words_BWT)
  repeats = query_BTHQ.shape[2] // key_BSGQ.shape[2]
  (d_query_BTHQ,) = _run(
    queries,
    keys,
    _Vectors(*vectors, *gpu_lists.list_tiles(words_BWT, ROWS, BLOCK)),
    _Static(False, scale, 1, bool(interpret)),
    interpret,
  )
  d_key_BSGQ, d_value_BSGV = _run(
    keys,
    queries,
    _Vectors(
      *vectors, *gpu_lists.list_tiles(words_BWT, BLOCK, ROWS, of_keys=True)
    ),
    _Static(True, scale, repeats, bool(interpret)),
    interpret,
  )
  return (
    d_query_BTHQ[:, :num_queries],
    d_key_BSGQ[:, :num_keys],
    d_value_BSGV[:, :num_keys],
  )


def _run(own, streams, vectors, static, interpret):
  """Returns the gradient of own[0], and that of own[1] if it is of keys."""
  batch, rows, heads, width = own[0].shape
  value_width = own[1].shape[3]
  smem, widths = gpu_tiles.smem, (width, value_width)
  # Two tiles in flight, or one where wide heads leave no room.
  slots = 2 if 2 * (BLOCK + 2 * ROWS) * sum(widths) <= gpu.MAX_BYTES else 1
  scratch = dict(
    stay=[smem(FETCHER, ROWS, x) for x in widths],
    ring=[smem(slots, ROWS, x) for x in widths],
    own_here=plgpu.Barrier(num_barriers=FETCHER, num_arrivals=2),
    full=plgpu.Barrier(
      num_barriers=slots, num_arrivals=5 if static.of_keys else 2
    ),
    empty=plgpu.Barrier(num_barriers=slots, num_arrivals=FETCHER),
  )
  if static.of_keys:
    # What streams with the queries; see `_Vectors`.
    scratch["lse"] = plgpu.SMEM((slots, ROWS), jnp.float32)
    scratch["mean"] = plgpu.SMEM((slots, ROWS), jnp.float32)
    scratch["words"] = plgpu.SMEM((slots, WORDS, ROWS), jnp.int32)
  if interpret:
    scratch["staging"] = smem(FETCHER, ROWS, ROWS)
  gradients = own if static.of_keys else own[:1]
  kernel = plgpu.kernel(
    functools.partial(_kernel, static),
    out_type=tuple(
      jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in gradients
    ),
    grid=(batch, heads, rows // BLOCK),
    grid_names=("batch", "head", "block"),
    num_threads=FETCHER + 1,
    thread_name="role",
    scratch_types=scratch,
    compiler_params=gpu_tiles.parameters(),
    interpret=interpret,
    kernel_name="masked_attention_backward_"
    + ("keys" if static.of_keys else "queries"),
  )
  return kernel(*own, *streams, *vectors)


def _kernel(static, *refs, **scratch):
  """Sums up the gradients of 128 rows of one head."""
  own_BLE, streams_BXE = refs[:2], refs[2:4]
  vectors, gradients_BLE = _Vectors(*refs[4:9]), refs[9:]
  role = lax.axis_index("role")

  @pl.when(role == FETCHER)
  def _():
    plgpu.set_max_registers(REGISTERS[FETCHER], action="decrease")
    _fetch(static, streams_BXE, vectors, **scratch)

  @pl.when(role < FETCHER)
  def _():
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    batch, head, first = _place()
    rows, own_here = pl.ds(first, ROWS), scratch["own_here"].at[role]
    own = [x.at[role] for x in scratch["stay"]]
    for source, target in zip(own_BLE, own, strict=True):
      plgpu.copy_gmem_to_smem(source.at[batch, rows, head], target, own_here)
    plgpu.barrier_wait(own_here)
    sums = _sum_up(static, own, vectors, **scratch)
    for sum_RQ, target, gradient in zip(sums, own, gradients_BLE):
      gpu_tiles.store(sum_RQ, target, gradient.at[batch, rows, head])


def _place():
  """Returns batch, head and first row of this warpgroup."""
  first = lax.axis_index("block") * BLOCK + lax.axis_index("role") * ROWS
  return lax.axis_index("batch"), lax.axis_index("head"), first


def _step(static, vectors, i):
  """Returns the first row and the head of what streams at step i."""
  batch, block = lax.axis_index("batch"), lax.axis_index("block")
  head, entry = lax.axis_index("head"), i
  if static.heads > 1:
    count = vectors.count_BM[batch, block]
    head, entry = lax.div(i, count), lax.rem(i, count)
  return vectors.tiles_BMN[batch, block, entry] * ROWS, head


def _num_steps(static, vectors):
  count = vectors.count_BM[lax.axis_index("batch"), lax.axis_index("block")]
  return count * static.heads


def _fetch(static, streams_BXE, vectors, *, ring, full, empty, **scratch):
  """Fetches the listed tiles."""
  batch, slots = lax.axis_index("batch"), ring[0].shape[0]
  num_steps = _num_steps(static, vectors)

  @pl.loop(0, num_steps)
  def _(i):
    slot = lax.rem(i, slots)
    first, head = _step(static, vectors, i)
    rows = pl.ds(first, ROWS)

    @pl.when(i >= slots)
    def _():
      plgpu.barrier_wait(empty.at[slot])

    copies = []
    for source, target in zip(streams_BXE, ring, strict=True):
      own_head = head if source.shape[2] > 1 else 0
      copies.append((source.at[batch, rows, own_head], target))
    if static.of_keys:
      words = pl.ds(lax.axis_index("block") * WORDS, WORDS)
      copies += [
        (vectors.lse_BHT.at[batch, head, rows], scratch["lse"]),
        (vectors.mean_BHT.at[batch, head, rows], scratch["mean"]),
        (vectors.words_BWT.at[batch, words, rows], scratch["words"]),
      ]
    for source, target in copies:
      plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

  gpu_tiles.await_last(num_steps, slots, empty)


def _sum_up(
  static, own, vectors, *, ring, full, empty, staging=None, **scratch
):
  """Returns the gradients of 64 rows, float32."""
  slots = ring[0].shape[0]
  if staging is not None:
    staging = staging.at[lax.axis_index("role")]
  add = functools.partial(
    gpu_tiles.accumulate, interpret=static.interpret, staging=staging
  )
  rows = None if static.of_keys else _of_rows(vectors)
  num_steps = _num_steps(static, vectors)

  def load_words(i):
    if static.of_keys:
      return ()
    # Past the last tile those of the last: loaded, and not used.
    last = jnp.maximum(num_steps - 1, 0)
    return _load_words(vectors, _step(static, vectors, jnp.minimum(i, last))[0])

  def step(i, carry):
    sums, loaded = carry
    slot, next_loaded = lax.rem(i, slots), load_words(i + 1)
    if static.of_keys:
      lse, mean, words = _of_columns(slot, **scratch)
    else:
      lse, mean = rows
      words = lambda i: gpu_tiles.along_columns(loaded[i], ROWS)
    plgpu.barrier_wait(full.at[slot])
    tiles_ = [x.at[slot] for x in ring]
    score_RD = gpu_tiles.products([(own[0], tiles_[0])])
    exponent_RD = score_RD * (static.scale * LOG2_E) - lse()
    weight_RD = jnp.where(_seen(static, words), jnp.exp2(exponent_RD), 0.0)
    # Rounded before its second use as well: fewer registers keep it.
    weight_RD = weight_RD.astype(jnp.bfloat16)
    if static.of_keys:
      d_key_RQ, d_value_RV = sums
      sums = (d_key_RQ, add(d_value_RV, weight_RD, tiles_[1]))
    d_weight_RD = gpu_tiles.products([(own[1], tiles_[1])])
    d_score_RD = weight_RD.astype(jnp.float32) * (d_weight_RD - mean())
    added = add(sums[0], d_score_RD.astype(jnp.bfloat16), tiles_[0])
    plgpu.barrier_arrive(empty.at[slot])
    return (added, *sums[1:]), next_loaded

  gradients = own if static.of_keys else own[:1]
  start = tuple(gpu_tiles.zeros(x.shape[1]) for x in gradients)
  carry = (start, load_words(0))
  (first, *rest), _ = lax.fori_loop(0, num_steps, step, carry)
  return (first * static.scale, *rest)


def _of_rows(vectors):
  """Returns functions that give lse and mean of the queries that stay."""
  batch, head, first = _place()
  place = (batch, head, pl.ds(first, ROWS))
  lse_R = gpu_tiles.load_rows(vectors.lse_BHT.at[place])
  mean_R = gpu_tiles.load_rows(vectors.mean_BHT.at[place])
  return (
    lambda: gpu_tiles.along_columns(lse_R, ROWS),
    lambda: gpu_tiles.along_columns(mean_R, ROWS),
  )


def _load_words(vectors, first_key):
  """Loads the words of 64 keys for the queries that stay."""
  batch, _, first = _place()
  word, rows = lax.div(first_key, bitmask.BITS), pl.ds(first, ROWS)
  return tuple(
    gpu_tiles.load_rows(vectors.words_BWT.at[batch, word + i, rows])
    for i in range(ROWS // bitmask.BITS)
  )


def _of_columns(slot, *, lse, mean, words, **_):
  """Returns functions that give lse, mean and words of streaming queries."""

  def give(ref):
    return gpu_tiles.along_rows(gpu_tiles.load_columns(ref))

  own = lax.axis_index("role") * (ROWS // bitmask.BITS)
  return (
    lambda: give(lse.at[slot]),
    lambda: give(mean.at[slot]),
    lambda i: give(words.at[slot, own + i]),
  )


def _seen(static, words):
  """Returns which of 64 keys 64 queries see, bool with the own as rows."""
  key_RD = plgpu.broadcasted_iota(
    jnp.int32,
    (ROWS, ROWS),
    0 if static.of_keys else 1,
    layout=plgpu.Layout.WGMMA,
  )
  word_RD = jnp.where(key_RD >= bitmask.BITS, words(1), words(0))
  return ((word_RD >> (key_RD & (bitmask.BITS - 1))) & 1) != 0
