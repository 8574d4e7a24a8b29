"""Counts read from programs, against programs whose counts are known."""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.ahead import estimate
from dsv32_jax.ahead import hlo
from dsv32_jax.ahead import jaxpr_flops
from dsv32_jax.ahead import report as report_lib
from pallas_kernels import index_select
from pallas_kernels import masked_attention
from pallas_kernels import sparse_mla

P = jax.P


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh(
    (2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


def compiled(function, mesh, x, **specs):
  return jax.jit(jax.shard_map(function, mesh=mesh, **specs)).lower(x).compile()


def test_a_loop_counts_as_often_as_it_turns(mesh):
  def seven(x):
    turn = lambda i, x: lax.psum(x, "a") / 2 + lax.psum(x * i, "b")
    x = lax.fori_loop(0, 7, turn, x)
    return lax.all_gather(x, "b", tiled=True)

  x = jnp.ones((8, 3))
  specs = dict(in_specs=P(), out_specs=P(("a", "b")), check_vma=False)
  text = compiled(seven, mesh, x, **specs).as_text()
  found = hlo.traffic(text, 8)
  rows = 8 * 3 * 4
  # Seven sums among two devices (1 of 2 arrays, twice) and among four.
  assert found.bytes == {
    "all-gather": 4 * rows * 3 // 4,
    "all-reduce": 7 * (rows + rows * 3 // 2),
  }
  assert found.open_loops == 0
  what, size = found.largest[0]
  assert size == max(size for _, size in found.largest)
  assert what.startswith("all-reduce f32[8,3] ") and "psum" in what
  assert sum(size for _, size in found.largest) == sum(found.bytes.values())
  assert hlo.most_gathered(text, 8) == 4


def test_a_loop_of_unknown_length_counts_once(mesh):
  def until_large(x):
    turn = lambda x: lax.psum(x, "b") * 2
    return lax.while_loop(lambda x: jnp.max(x) < 1e3, turn, x)

  specs = dict(in_specs=P(), out_specs=P(), check_vma=False)
  text = compiled(until_large, mesh, jnp.ones((4,)), **specs).as_text()
  found = hlo.traffic(text, 8)
  assert found.bytes == {"all-reduce": 24}
  assert found.open_loops == 1


# Lines as the compiler writes them.
# ruff: noqa: E501
PROGRAM = """HloModule step

%cond (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]) parameter(0)
  %n = s32[] constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (q: bf16[8,8]) -> bf16[2,8] {
  %r = bf16[8,8] all-reduce(%q), replica_groups={}, to_apply=%sum
  ROOT %d = bf16[2,8] dynamic-slice(%r, %i, %z), dynamic_slice_sizes={2,8}
}

%inner (q: bf16[4,8]) -> bf16[8,8] {
  ROOT %g = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%q), replica_groups={}, dimensions={0}
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s = (bf16[4,8], bf16[4,8], u32[], u32[]) collective-permute-start(%x)
  %c = bf16[8,8] call(%y), to_apply=%inner
  %f = bf16[2,8] fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="of/the/fusion"}
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %z)
}

%few (q: f32[2]) -> f32[2] {
  ROOT %r = f32[2] all-reduce(%q), replica_groups={}, to_apply=%sum
}

%many (q: f32[2]) -> f32[2] {
  %a = (f8e4m3fn[16], pred[3]) all-to-all(%q), replica_groups={}
  ROOT %r = f32[2] copy(%q)
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %w = (s32[], bf16[4,8]) while(%t), condition=%cond, body=%body
  %if = f32[2] conditional(%k, %q, %q), branch_computations={%few, %many}
  ROOT %out = bf16[4,8] get-tuple-element(%w), index=1
}
"""


def test_constants_calls_and_branches_are_followed():
  found = hlo.traffic(PROGRAM, 4)
  assert found.bytes == {
    "all-gather": 5 * 96,
    "all-to-all": 19 * 3 // 4,
    "collective-permute": 5 * 64,
    "reduce-scatter": 5 * 96,
  }
  assert found.instructions["all-reduce"] == 1
  assert found.instructions["reduce-scatter"] == 1
  assert ("reduce-scatter of bf16[8,8] of/the/fusion", 480) in found.largest
  with pytest.raises(ValueError, match="0 entries"):
    hlo.traffic("HloModule empty", 4)


@pytest.mark.parametrize(
  "groups,size",
  [
    ("[4,2]<=[8]", 2),
    ("{{0,1,2,3},{4,5,6,7}}", 4),
    ("{{0}}", 1),
    ("{}", 8),
    ("mesh['a'=2,'b'=4,'c'=1] {'b'}", 4),
    ("mesh['a'=2,'b'=4] {'a','b'}", 8),
    ("mesh['a'=8] {'a':(2)4}", 4),
    ("mesh['a'=4,'b'=2], device_ids=([2,2,2]T(0,2,1)) {'a'}", 4),
  ],
)
def test_groups_of_a_collective_are_counted(groups, size):
  line = f" all-gather(x), replica_groups={groups}, dimensions={{0}}"
  assert hlo.group_size(line, 8) == size


def test_sorts_are_counted_with_their_sizes():
  def two(x, y):
    return jnp.sort(x, axis=-1), jnp.argsort(y)

  text = jax.jit(two).lower(jnp.ones((3, 8)), jnp.ones(5)).compile().as_text()
  assert hlo.sorts(text) == [24, 5]
  assert hlo.sorts(PROGRAM) == []


def flops(function, *args):
  return jaxpr_flops.count(jax.jit(function).trace(*args).jaxpr)


def test_recomputed_products_count():
  def three(x, w, wrap):
    turn = wrap(lambda x, _: (jnp.tanh(x @ w), None))
    return lax.scan(turn, x, length=3)[0].sum()

  x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
  one = 2 * 4 * 8 * 8
  plain = functools.partial(three, wrap=lambda f: f)
  again = functools.partial(three, wrap=jax.checkpoint)
  assert flops(plain, x, w) == 3 * one
  assert flops(jax.grad(plain, (0, 1)), x, w) == 9 * one
  assert flops(jax.grad(again, (0, 1)), x, w) == 12 * one


def test_products_of_groups_branches_and_devices_count(mesh):
  x, w, sizes = jnp.ones((4, 8)), jnp.ones((3, 8, 16)), jnp.array([1, 1, 2])
  ragged = lambda x, w: lax.ragged_dot(x, w, sizes).sum()
  one = 2 * 4 * 8 * 16
  assert flops(ragged, x, w) == one
  assert flops(jax.grad(ragged, (0, 1)), x, w) == 3 * one
  batched = lambda x, w: jnp.einsum("gmk,gkn->gmn", x, w)
  assert flops(batched, jnp.ones((3, 4, 8)), w) == 3 * one
  branch = lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x.T @ x, jnp.sin, x)
  assert flops(branch, x) == 2 * 2 * 4 * 4 * 8
  split = jax.shard_map(
    lambda x: x @ x.T, mesh=mesh, in_specs=P("a"), out_specs=P("a", None)
  )
  # Each of eight devices multiplies its two rows.
  assert flops(split, x) == 8 * 2 * 2 * 2 * 8


def test_products_of_a_kernel_count():
  """The gathered kernel: scores and sums of 64 keys for each query."""
  queries, keys, heads, latent, rope = 16, 256, 128, 512, 64
  bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  attend = functools.partial(
    sparse_mla.sparse_mla, scale=1.0, implementation="tpu"
  )
  found = flops(
    attend,
    bf16(1, queries, heads, latent),
    bf16(1, queries, heads, rope),
    bf16(1, keys, latent),
    bf16(1, keys, rope),
    jax.ShapeDtypeStruct((1, queries, 128), jnp.int32),
  )
  # The rotary part fills half a register, which is multiplied whole.
  wanted = 2 * queries * 128 * heads * ((latent + 128) + latent)
  assert wanted <= found <= 1.2 * wanted


def test_products_of_a_kernel_whose_grid_the_data_tell():
  """Masked attention, forward and backward: seven products of every pair."""
  heads, length, width, value = 2, 256, 192, 128
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  def attend(query, key, value, slots):
    out, _ = masked_attention.masked_attention(
      query, key, value, slots, scale=1.0, implementation="tpu"
    )
    return out.astype(jnp.float32).sum()

  found = flops(
    jax.grad(attend, (0, 1, 2)),
    array(1, length, heads, width),
    array(1, length, heads, width),
    array(1, length, heads, value),
    jax.ShapeDtypeStruct((1, length), jnp.int32),
  )
  pairs = heads * length * length
  assert found == 2 * pairs * ((width + value) + (3 * width + 2 * value))


def test_products_of_a_kernel_whose_loop_the_data_tell():
  """Index scores of every key: up to which a query sees, the data tell."""
  queries, keys, heads, width = 256, 4096, 8, 128
  bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  select = functools.partial(
    index_select.index_select, top_k=64, implementation="tpu"
  )
  found = flops(
    select,
    bf16(2, queries, heads, width),
    bf16(2, keys, width),
    jax.ShapeDtypeStruct((2, queries, heads), jnp.float32),
    jax.ShapeDtypeStruct((2, queries), jnp.int32),
  )
  assert found == 2 * 2 * queries * keys * heads * width


def test_an_estimate_adds_products_and_exchange():
  report = report_lib.Report(
    devices=4,
    argument_bytes_per_device=0,
    temporary_bytes_per_device=0,
    peak_bytes_per_device=0,
    model_flops_per_step=459e12,
    flops_by_part={},
    global_batch=1,
    sequence_length=1,
    compile_seconds=0.0,
    processor_seconds=0.0,
    program_flops_per_step=2 * 459e12,
    sorts=0,
    most_sorted=0,
    collectives={},
    collective_bytes_per_device={"all-gather": 200e9, "all-reduce": 100e9},
    largest_collectives=[],
    open_loops=0,
    most_gathered=1,
  )
  found = estimate.estimate(report, "v5p")
  assert found.memory_seconds == 0
  np.testing.assert_allclose(
    (found.product_seconds, found.exchange_seconds), (0.5, 0.5)
  )
  np.testing.assert_allclose((found.step_seconds, found.mfu), (1.0, 0.25))
  # Two seconds of reading hide half a second of products.
  report = dataclasses.replace(report, argument_bytes_per_device=2 * 2765e9)
  assert estimate.estimate(report, "v5p").step_seconds == pytest.approx(2.5)
  with pytest.raises(ValueError, match="generation='v4'"):
    estimate.estimate(report, "v4")
