"""The TPU kernels of masked attention, interpreted, against the definition."""
# B batch, T queries, S keys, H heads, G key heads, Q key width, V value width

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bitmask
from pallas_kernels.masked_attention import masked_attention
from tests.support.tolerances import assert_close

SCALE = 0.35


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Sizes of a problem and what hides keys in it."""

  batch: int = 1
  queries: int
  keys: int
  heads: int = 2
  key_heads: int = 2
  width: int = 6
  value: int = 5
  masked: bool = False
  segments: bool = False
  causal: bool = False


CASES = {
  "causal": Case(queries=300, keys=300, causal=True),
  "tiles": Case(batch=2, queries=270, keys=1100, heads=1, key_heads=1),
  "mask": Case(batch=2, queries=9, keys=1100, masked=True),
  "spans": Case(queries=5, keys=4300, heads=1, key_heads=1, masked=True),
  "mqa": Case(batch=2, queries=9, keys=70, heads=3, key_heads=1, masked=True),
  "segments": Case(batch=2, queries=20, keys=200, segments=True),
  "all": Case(batch=2, queries=20, keys=65, masked=True, segments=True),
  "real_widths": Case(queries=33, keys=150, width=192, value=128, masked=True),
  "one": Case(queries=1, keys=1, heads=1, key_heads=1, width=1, value=1),
}


def draw(case, dtype=np.float32):
  """Returns (query, key, value), d_out, slots and keywords."""
  rng = np.random.default_rng(0)
  batch, queries, keys = case.batch, case.queries, case.keys
  shapes = (
    (batch, queries, case.heads, case.width),
    (batch, keys, case.key_heads, case.width),
    (batch, keys, case.key_heads, case.value),
    (batch, queries, case.heads, case.value),
  )
  arrays = [rng.normal(size=s) for s in shapes]
  # Scores of order one whatever the width; sums over queries of order one.
  arrays[0] *= (6 / case.width) ** 0.5
  arrays[3] /= np.sqrt(queries)
  *arrays, d_out = (jnp.asarray(a, dtype) for a in arrays)
  if case.causal:
    slots = np.tile(np.arange(queries, dtype=np.int32), (batch, 1))
  else:
    slots = rng.integers(-1, keys, (batch, queries)).astype(np.int32)
    slots[0, 0] = keys - 1
    slots[-1, -1] = -1 if queries > 1 else 0
  keywords = {}
  if case.masked:
    mask = rng.random((batch, queries, keys)) < 0.3
    mask[:, queries // 2] = False
    keywords["mask_BTW"] = bitmask.pack(jnp.asarray(mask))
  if case.segments:
    keywords["query_segments_BT"] = np.sort(
      rng.integers(0, 3, (batch, queries)).astype(np.int32)
    )
    keywords["key_segments_BS"] = np.sort(
      rng.integers(0, 3, (batch, keys)).astype(np.int32)
    )
  return tuple(arrays), d_out, slots, keywords


def run(implementation, arrays, d_out, slots, keywords):
  """Returns out, lse and the gradients."""

  @jax.jit
  def both(arrays, d_out, slots, keywords):
    def attend(*arrays):
      return masked_attention(
        *arrays, slots, scale=SCALE, implementation=implementation, **keywords
      )

    (out, lse), pull_back = jax.vjp(attend, *arrays)
    return out, lse, *pull_back((d_out, jnp.zeros_like(lse)))

  return jax.tree.map(np.asarray, both(arrays, d_out, slots, keywords))


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_definition(name):
  problem = draw(CASES[name])
  got = run("tpu_interpret", *problem)
  want = run("ref", *problem)
  for one_got, one_want in zip(got, want, strict=True):
    assert one_got.dtype == one_want.dtype
    assert_close(one_got, one_want)
