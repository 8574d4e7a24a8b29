"""Rows of keys in the memory of a TPU core: packing, gathering, unpacking.

A row of a 32-bit array of 128 lanes may be read at any place, so a key is kept
as W such rows ("words"): the latent, padded to a multiple of 256 columns, as
pairs of bfloat16 (columns c and c + half in one word), and last the rotary
part, alone in the low half. The latents of 512 and 64 take W = 3 rows, 1536
bytes. A table of keys ends in a marker row, all 0 but for a 1 in the first
column past the rotary part, where queries hold a large negative number: its
score is below all others, and indices of -1 point there.

To gather a key is a load and a store of W rows; loads go before stores in
batches of 8, for the compiler cannot know that addresses differ. To unpack,
the even and the odd keys of a column group are read with stride 2 W, and
halves of two words joined are a pair of bfloat16 rows.
"""
# B batch, T queries, S keys, N selected, H heads, C latent width, R rope
# width, P their padded sum, X rows of a table (W a key), L lanes (128)

import dataclasses
import functools

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import target

LANES = 128
# Loads before stores: more need more scalar registers than there are.
BATCH = 8
# Rows before the first key: 8 rows that end in a key may start there.
FRONT = 8
# What queries hold in the marker's column; exp(scale * MARK) is 0.
MARK = -1e30


def round_up(size, unit):
  """Returns the least multiple of `unit` that is at least `size`."""
  return -(-size // unit) * unit


def num_words(latent_width):
  """Returns W, how many rows of words a key takes."""
  return round_up(latent_width, 2 * LANES) // (2 * LANES) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """What kernels must know of a TPU generation.

  Attributes:
    forward_keys: how many keys of 512 + 64 fit in vector memory, forward.
    backward_keys: the same with their gradients.
    pairs: whether stores are scarcer than arithmetic, so that keys are
      gathered in pairs.
    additions: how many rows of gradients are loaded before any is stored.
    queries: how many queries' parts by segment are kept at a time; on 7x they
      take half as much again in main memory.
  """

  forward_keys: int = 32768
  backward_keys: int = 12032
  pairs: bool = False
  additions: int = 4
  queries: int = 512


def this_chip():
  """Returns the `Chip` kernels are for, v5p's if it is no TPU."""
  return chip_of(target.device_kind())


def chip_of(kind):
  """Returns the `Chip` of a `jax.Device.device_kind`, as `this_chip` does."""
  kind = kind.lower()
  # Vector memory is 128 MiB on v5e and v6e, and 64 MiB on v5p and 7x.
  if kind.startswith(("tpu v5 lite", "tpu v5e", "tpu v6")):
    return Chip(
      forward_keys=65536,
      backward_keys=24576,
      pairs=kind.startswith("tpu v6"),
      additions=8,
    )
  if kind.startswith(("tpu7", "tpu v7")):
    return Chip(pairs=True, additions=8, queries=256)
  return Chip()


def pad_last(array, width):
  """Pads the last axis with zeros to `width`."""
  missing = width - array.shape[-1]
  if not missing:
    return array
  return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])


def pack(latent_BSC, key_rope_BSR):
  """Returns the table int32 [B,X,128] of bfloat16 keys and the marker."""
  batch, keys, _ = latent_BSC.shape
  rope = key_rope_BSR.shape[-1]
  words = num_words(latent_BSC.shape[-1])
  halves = pad_last(latent_BSC, (words - 1) * 2 * LANES)
  mark_B1R = jnp.zeros((batch, 1, LANES), jnp.bfloat16).at[..., rope].set(1)
  last = jnp.pad(pad_last(key_rope_BSR, LANES), [(0, 0), (0, 1), (0, 0)])
  last = last.at[:, keys:].set(mark_B1R)
  halves = jnp.pad(halves, [(0, 0), (0, 1), (0, 0)])
  bits = lambda x: lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
  low, high = jnp.split(bits(halves), 2, axis=-1)
  row = jnp.concatenate([low | (high << 16), bits(last)], axis=-1)
  table_BXL = row.reshape(batch, -1, LANES)
  missing = 8 + -table_BXL.shape[1] % 8
  table_BXL = jnp.pad(table_BXL, [(0, 0), (FRONT, missing), (0, 0)])
  return lax.bitcast_convert_type(table_BXL, jnp.int32)


def arrange_queries(query_latent_BTHC, query_rope_BTHR, unit):
  """Returns queries [B T, H, .] padded as keys are, heads to `unit`s.

  Past their own width rotary queries hold the mark.
  """
  latent, rope = query_latent_BTHC.shape[-1], query_rope_BTHR.shape[-1]
  wide = (num_words(latent) - 1) * 2 * LANES
  marked_BTHL = pad_last(query_rope_BTHR, LANES).at[..., rope].set(MARK)
  return (
    flat_heads(query_latent_BTHC, wide, unit),
    flat_heads(marked_BTHL, LANES, unit),
  )


def arrange_gradients(
  query_latent_BTHC, query_rope_BTHR, out_BTHC, lse_BTH, d_out_BTHC
):
  """Returns queries, gradients of outputs, and lines of lse over mean, flat."""
  query_HC, query_HL = arrange_queries(
    query_latent_BTHC, query_rope_BTHR, LANES
  )
  heads, wide = query_HC.shape[1:]
  d_out_HC = flat_heads(d_out_BTHC, wide, LANES)
  mean_BTH = jnp.einsum(
    "BTHC,BTHC->BTH",
    d_out_BTHC,
    out_BTHC,
    preferred_element_type=jnp.float32,
  )
  # An empty list has lse -inf and no row whose weight counts.
  lse_BTH = jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH)
  lines_BT2H = jnp.stack([lse_BTH, mean_BTH], axis=2)
  lines_2H = pad_last(lines_BT2H, heads).reshape(-1, 2, heads)
  return [query_HC, query_HL, d_out_HC], lines_2H


def flat_heads(array_BTHC, width, unit):
  """Returns [B T, H, width], padded with zeros, heads to `unit`s."""
  heads = array_BTHC.shape[2]
  padded = pad_last(array_BTHC, width)
  if heads % unit:
    more = [(0, 0), (0, 0), (0, -heads % unit), (0, 0)]
    padded = jnp.pad(padded, more)
  return padded.reshape(-1, *padded.shape[2:])


def gather(table_ref, list_ref, raw_ref, words, start, size):
  """Copies the keys of list positions [start, start + size), unrolled."""

  @_batches(start, size)
  def _(places):
    keys = [table_ref[pl.ds(list_ref[0, n], words), :] for n in places]
    for place, key in zip(places, keys):
      raw_ref[pl.ds(words * place, words), :] = key


def _batches(start, size):
  """Decorates a function of the places of a batch: calls it for each batch.

  Unrolled when the kernel is lowered: it is traced once, where a loop in Python
  takes a minute of comparing constants, thousands in a kernel.
  """

  def decorate(copy):
    whole = size // BATCH

    @pl.loop(0, whole, unroll=True)
    def _(step):
      copy([start + step * BATCH + n for n in range(BATCH)])

    if size % BATCH:
      copy(range(start + whole * BATCH, start + size))

  return decorate


def pair_lists(offsets_I1N, words):
  """Returns lists for `gather_pairs`: odd places point W rows before a key."""
  is_odd_N = jnp.arange(offsets_I1N.shape[-1]) % 2
  return offsets_I1N - words * is_odd_N


def gather_pairs(table_ref, list_ref, raw_ref, words, start, size):
  """Does as `gather` with half the stores, each of two keys joined."""
  is_first = lax.broadcasted_iota(jnp.int32, (8, LANES), 0) < words

  @_batches(start, size)
  def _(places):
    pairs = []
    for n in places[::2]:
      left = table_ref[pl.ds(list_ref[0, n], 8), :]
      right = table_ref[pl.ds(list_ref[0, n + 1], 8), :]
      pairs.append(jnp.where(is_first, left, right)[: 2 * words])
    for place, pair in zip(places[::2], pairs):
      raw_ref[pl.ds(words * place, 2 * words), :] = pair


def gather_loop(pairs, table_ref, list_ref, raw_ref, words, start, size):
  """Does as `gather`, or as `gather_pairs`, in a loop of little code."""

  @pl.loop(0, size // BATCH)
  def _(step):
    first = start + step * BATCH
    keys = []
    for n in range(BATCH):
      row = list_ref[0, first + n] + (words if pairs and n % 2 else 0)
      keys.append(table_ref[pl.ds(row, words), :])
    for n, key in enumerate(keys):
      raw_ref[pl.ds(words * (first + n), words), :] = key


def unpack(raw_ref, words, start, size):
  """Returns gathered keys as bfloat16 [size, P]: latent, rope, marker."""
  latents = [halves(raw_ref, words, start, size, n) for n in range(words - 1)]
  low, high = zip(*latents)
  rope, _ = halves(raw_ref, words, start, size, words - 1)
  return jnp.concatenate([*low, *high, rope], axis=1)


def unpack_latent(raw_ref, words, start, size):
  """Returns the latents of gathered keys, bfloat16 [size, C]."""
  latents = [halves(raw_ref, words, start, size, n) for n in range(words - 1)]
  low, high = zip(*latents)
  return jnp.concatenate([*low, *high], axis=1)


def halves(raw_ref, words, start, size, word):
  """Returns the low and the high halves of one of the keys' words."""

  def load(first):
    places = pl.ds(words * start + first, size // 2, stride=2 * words)
    return lax.bitcast_convert_type(raw_ref[places, :], jnp.uint32)

  even, odd = load(word), load(words + word)
  low = (even & 0xFFFF) | (odd << 16)
  high = (even >> 16) | (odd & jnp.uint32(0xFFFF0000))
  return tuple(pltpu.bitcast(half, jnp.bfloat16) for half in (low, high))


def gather_ahead(
  plan,
  pairs,
  words,
  meta_ref,
  offsets_ref,
  table_ref,
  list_refs,
  raw_refs,
  semaphores,
  attend,
):
  """Runs a step of two lists, each gathered while the one before is used.

  Args:
    plan: `tpu_plan.Plan`.
    pairs: whether keys are gathered in pairs.
    words: rows of a key in the table.
    meta_ref, offsets_ref, table_ref: what the plan says, the lists, the keys.
    list_refs, raw_refs, semaphores: two each, for lists and gathered rows.
    attend: function of (which of the two lists, a function that gathers a part
      of the next).
  """
  step = pl.program_id(0)

  def fetch(place):
    """Copies a list, `place` after the step's first."""
    which = place % 2
    return pltpu.make_async_copy(
      offsets_ref.at[2 * step + place], list_refs[which], semaphores.at[which]
    )

  @pl.when(plan.is_live(step, meta_ref))
  def _():
    @pl.when(plan.is_first(step, meta_ref))
    def _():
      fetch(0).start()
      fetch(0).wait()
      selected = list_refs[0].shape[1]
      gather_loop(
        pairs, table_ref, list_refs[0], raw_refs[0], words, 0, selected
      )
      fetch(1).start()

    for which in range(2):
      fetch(which + 1).wait()
      fetch(which + 2).start()
      ahead = functools.partial(
        gather_pairs if pairs else gather,
        table_ref,
        list_refs[1 - which],
        raw_refs[1 - which],
        words,
      )
      attend(which, ahead)

    @pl.when(plan.is_last(step, meta_ref))
    def _():
      fetch(3).wait()


def clear(ref):
  """Writes zeros to an array of 32-bit rows, whose number 8 divides."""
  zeros = jnp.zeros((8, LANES), ref.dtype)

  @pl.loop(0, ref.shape[0] // 8)
  def _(step):
    ref[pl.ds(pl.multiple_of(8 * step, 8), 8), :] = zeros


def add(batch, gradient_ref, list_ref, stage_ref, start, size):
  """Adds the rows of list positions [start, start + size), batched.

  The keys of a batch, positions size / batch apart, must differ.
  """
  stride = size // batch
  groups = stage_ref.shape[0] // size

  @pl.loop(0, stride, unroll=True)
  def _(first):
    places = [first + stride * n for n in range(batch)]
    spans = [pl.ds(list_ref[0, start + n], groups) for n in places]
    sums = [
      gradient_ref[span, :] + stage_ref[pl.ds(groups * n, groups), :]
      for n, span in zip(places, spans)
    ]
    for span, total in zip(spans, sums):
      gradient_ref[span, :] = total


def add_serially(gradient_ref, list_ref, stage_ref, start, size):
  """Adds the rows of list positions, one after the other; keys may repeat."""
  groups = stage_ref.shape[0] // size

  @pl.loop(0, size)
  def _(place):
    span = pl.ds(list_ref[0, start + place], groups)
    staged = stage_ref[pl.ds(groups * place, groups), :]
    gradient_ref[span, :] = gradient_ref[span, :] + staged


def repeats_meet(batch, offsets_I1N, chunk, marker):
  """Returns whether a key repeats in a batch of `add`."""
  batches = offsets_I1N.reshape(-1, batch, chunk // batch)
  meet = jnp.bool_(False)
  for distance in range(1, batch):
    left, right = batches[:, distance:], batches[:, :-distance]
    meet |= jnp.any((left == right) & (left != marker))
  return meet
