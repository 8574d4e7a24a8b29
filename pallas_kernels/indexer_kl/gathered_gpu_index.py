"""Index scores of listed keys, and their gradients, on Hopper tensor cores.

Tiles: a block takes one query, whose index heads (64 of width 128) stay in
shared memory, and walks over its list of keys in steps of 128, up to the last
that holds a key.
Pipeline: three warpgroups. The last gathers index keys (`gpu_gather`) into a
ring of three steps. Each of the others takes 64 keys of a step.
Scores: products as keys x heads, ReLU, weights and the sum over heads in the
rows of a warp's registers.
Gradients, from slopes s_n of the loss by the scores: g = s_n where q_i . k_n is
positive goes to shared memory (bfloat16); u += g k stays in registers, a sum
for each warpgroup; g^T (w q), the gradient of the gathered keys, is added to
that of all keys by atomic additions of four floats, in an order that changes
from run to run. What follows from u, dq_i = w_i u_i and dw_i = q_i . u_i, is
left to XLA.
Memory of a block, in shared memory: the ring 96 KB; the query 16 KB, and for
gradients once more with weights, and 16 KB of g. Products are bfloat16, sums
float32.
"""
# C queries, I index heads (64), K index width (128), N listed keys, Z all keys
# of the batch, D keys of a warpgroup, P warpgroups

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import gpu_tiles
from pallas_kernels.sparse_mla import gpu_gather

HEADS, WIDTH, KEYS = gpu_tiles.ROWS, 128, gpu_gather.ROWS
# Warpgroups that multiply; the next one gathers. Steps of the ring.
PARTS, SLOTS = 2, 3
GATHER = PARTS
STEP = PARTS * KEYS
REGISTERS = gpu_tiles.register_shares(*[208] * PARTS, 88)


def scores(query_CIK, weight_CI, key_ZK, rows_CN, blocks_C, *, interpret=False):
  """Returns float32 [C,N], unset past the last step of each query.

  Args:
    query_CIK: bfloat16 index queries.
    weight_CI: float32 weights.
    key_ZK: bfloat16 index keys.
    rows_CN: int32 rows of the keys, -1 for none, N a multiple of 128.
    blocks_C: int32 number of blocks of 64 keys.
    interpret: what to give `plgpu.kernel` as `interpret`.
  """
  kernel = plgpu.kernel(
    functools.partial(_scores_kernel, bool(interpret)),
    out_type=jax.ShapeDtypeStruct(rows_CN.shape, jnp.float32),
    scratch_types=_buffers(interpret, query=1),
    # Safe, and no waits in a step: no thread reads what a thread writes.
    compiler_params=gpu_tiles.parameters().replace(
      unsafe_no_auto_barriers=True
    ),
    interpret=interpret,
    kernel_name="indexer_kl_scores",
    **_grid(rows_CN),
  )
  key_ZK = _arrange(key_ZK, rows_CN, interpret)
  return kernel(rows_CN, blocks_C, key_ZK, query_CIK, weight_CI)


def gradients(
  query_CIK,
  pulled_CIK,
  slope_CN,
  key_ZK,
  rows_CN,
  blocks_C,
  d_key_ZK,
  *,
  interpret=False,
):
  """Returns (u_CIK, d_key_ZK with the shares of these queries added).

  Args:
    query_CIK, key_ZK, rows_CN, blocks_C, interpret: as for `scores`.
    pulled_CIK: bfloat16 index queries times weights.
    slope_CN: float32 slopes of the loss by the scores, 0 where no key is.
    d_key_ZK: float32 sums so far.
  """
  arrays = (
    rows_CN,
    blocks_C,
    _arrange(key_ZK, rows_CN, interpret),
    query_CIK,
    pulled_CIK,
    slope_CN,
  )
  run = _interpret if interpret else _run
  u_CPIK, d_key_ZK = run(arrays, d_key_ZK, interpret)
  return jnp.sum(u_CPIK, axis=1), d_key_ZK


def _run(arrays, d_key_ZK, interpret):
  """Returns u of each warpgroup, and d_key_ZK summed up in place."""
  del interpret
  scratch = _gradient_buffers(False)

  def body(*refs):
    *refs, d_key_ref, u_ref = refs
    own = functools.partial(_gradients_kernel, False, *refs, u_ref, d_key_ref)
    pl.run_scoped(own, collective_axes="role", **scratch)

  kernel = pl.kernel(
    body,
    out_type=_u_type(arrays),
    mesh=plgpu.Mesh(**_grid(arrays[0])),
    compiler_params=gpu_tiles.parameters(),
    name="indexer_kl_gradients",
  )
  sum_ZK = jax.new_ref(d_key_ZK)
  u_CPIK = kernel(*arrays, sum_ZK)
  return u_CPIK, jax.freeze(sum_ZK)


def _interpret(arrays, d_key_ZK, interpret):
  """Returns what `_run` does; here gradients of rows leave one by one."""
  rows = arrays[0].reshape(-1)
  u_CPIK, d_row_LK = plgpu.kernel(
    functools.partial(_gradients_kernel, True),
    out_type=(
      _u_type(arrays),
      jax.ShapeDtypeStruct((rows.shape[0], WIDTH), jnp.float32),
    ),
    scratch_types=_gradient_buffers(True),
    compiler_params=gpu_tiles.parameters(),
    interpret=interpret,
    **_grid(arrays[0]),
  )(*arrays)
  d_row_LK = jnp.where(rows[:, None] >= 0, d_row_LK, 0.0)
  return u_CPIK, d_key_ZK.at[jnp.maximum(rows, 0)].add(d_row_LK)


def _u_type(arrays):
  shape = (arrays[0].shape[0], PARTS, HEADS, WIDTH)
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _arrange(key_ZK, rows_CN, interpret):
  """The interpreter knows no assembly: rows gathered before."""
  return key_ZK[jnp.maximum(rows_CN.reshape(-1), 0)] if interpret else key_ZK


def _grid(rows_CN):
  return dict(
    grid=(rows_CN.shape[0],),
    grid_names=("query",),
    num_threads=GATHER + 1,
    thread_name="role",
  )


def _buffers(interpret, query):
  """Describes the shared memory, for so many copies of the query."""
  copies = PARTS * gpu_gather.num_tile_copies(WIDTH) if interpret else 1
  return dict(
    query=gpu_tiles.smem(query, HEADS, WIDTH),
    ring=gpu_tiles.smem(SLOTS * PARTS, KEYS, WIDTH),
    query_here=plgpu.Barrier(num_arrivals=query),
    full=plgpu.Barrier(num_arrivals=copies, num_barriers=SLOTS),
    empty=plgpu.Barrier(num_arrivals=PARTS, num_barriers=SLOTS),
  )


def _gradient_buffers(interpret):
  gated = gpu_tiles.smem(PARTS, HEADS, KEYS)
  return _buffers(interpret, query=2) | dict(gated=gated)


def _num_steps(blocks_C):
  return lax.div(blocks_C[lax.axis_index("query")] + PARTS - 1, PARTS)


def _fetch(
  queries,
  key_ZK,
  rows_CN,
  num_steps,
  interpret,
  *,
  query,
  ring,
  query_here,
  full,
  empty,
  **_,
):
  """Fetches the query, and gathers the listed keys step by step."""
  row = lax.axis_index("query")
  for i, source in enumerate(queries):
    plgpu.copy_gmem_to_smem(source.at[row], query.at[i], query_here)

  def load_rows(step):
    # Past the last step those of the last: loaded, and not used.
    step = jnp.maximum(jnp.minimum(step, num_steps - 1), 0)
    first = row * rows_CN.shape[1] + step * STEP
    entries = [first + part * KEYS for part in range(PARTS)]
    if interpret:
      return entries
    return [gpu_gather.load_rows(rows_CN, entry) for entry in entries]

  def step(i, rows):
    slot = lax.rem(i, SLOTS)
    pl.when(i >= SLOTS)(lambda: plgpu.barrier_wait(empty.at[slot]))
    for part in range(PARTS):
      target = ring.at[slot * PARTS + part]
      if interpret:
        gpu_gather.fetch_tile([key_ZK], rows[part], target, full.at[slot])
      else:
        gpu_gather.start([key_ZK], rows[part], target)
    rows = load_rows(i + 1)
    if not interpret:
      gpu_gather.finish()
      plgpu.barrier_arrive(full.at[slot])
    return rows

  lax.fori_loop(0, num_steps, step, load_rows(0))
  gpu_tiles.await_last(num_steps, SLOTS, empty)


def _scores_kernel(
  interpret,
  rows_CN,
  blocks_C,
  key_ZK,
  query_CIK,
  weight_CI,
  score_CN,
  **scratch,
):
  """Scores the listed keys of one query."""
  row, role = lax.axis_index("query"), lax.axis_index("role")
  num_steps = _num_steps(blocks_C)

  @pl.when(role == GATHER)
  def _():
    plgpu.set_max_registers(REGISTERS[GATHER], action="decrease")
    _fetch([query_CIK], key_ZK, rows_CN, num_steps, interpret, **scratch)

  @pl.when(role < PARTS)
  def _():
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    weight_I = gpu_tiles.load_columns(weight_CI.at[row])
    plgpu.barrier_wait(scratch["query_here"])

    @pl.loop(0, num_steps)
    def _(i):
      slot = lax.rem(i, SLOTS)
      plgpu.barrier_wait(scratch["full"].at[slot])
      keys = scratch["ring"].at[slot * PARTS + role]
      dot_DI = gpu_tiles.products([(keys, scratch["query"].at[0])])
      plgpu.barrier_arrive(scratch["empty"].at[slot])
      term_DI = jnp.maximum(dot_DI, 0.0) * gpu_tiles.along_rows(weight_I)
      columns = pl.ds((i * PARTS + role) * KEYS, KEYS)
      score_CN[row, columns] = jnp.sum(term_DI, axis=1)


def _gradients_kernel(
  interpret,
  rows_CN,
  blocks_C,
  key_ZK,
  query_CIK,
  pulled_CIK,
  slope_CN,
  u_CPIK,
  d_key_ref,
  **scratch,
):
  """Sums up u of one query, and adds to the gradients of its keys."""
  row, role = lax.axis_index("query"), lax.axis_index("role")
  num_steps = _num_steps(blocks_C)

  @pl.when(role == GATHER)
  def _():
    plgpu.set_max_registers(REGISTERS[GATHER], action="decrease")
    queries = [query_CIK, pulled_CIK]
    _fetch(queries, key_ZK, rows_CN, num_steps, interpret, **scratch)

  @pl.when(role < PARTS)
  def _():
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    plgpu.barrier_wait(scratch["query_here"])
    query, gated = scratch["query"], scratch["gated"].at[role]

    def step(i, u_IK):
      slot = lax.rem(i, SLOTS)
      first = (i * PARTS + role) * KEYS
      slope_D = gpu_tiles.load_columns(slope_CN.at[row, pl.ds(first, KEYS)])
      plgpu.barrier_wait(scratch["full"].at[slot])
      keys = scratch["ring"].at[slot * PARTS + role]
      dot_ID = gpu_tiles.products([(query.at[0], keys)])
      gate_ID = jnp.where(dot_ID > 0.0, gpu_tiles.along_rows(slope_D), 0.0)
      gated[...] = gate_ID.astype(jnp.bfloat16)
      plgpu.commit_smem()
      u_IK = gpu_tiles.accumulate(u_IK, gated, keys, interpret=interpret)
      plgpu.barrier_arrive(scratch["empty"].at[slot])
      d_row_DK = gpu_tiles.transposed_products([(gated, query.at[1])])
      entry = row * rows_CN.shape[1] + first
      if interpret:
        d_key_ref[pl.ds(entry, KEYS)] = d_row_DK
      else:
        gpu_gather.add_tile(d_row_DK, d_key_ref, rows_CN, entry, 0)
      return u_IK

    u_CPIK[row, role] = lax.fori_loop(
      0, num_steps, step, gpu_tiles.zeros(WIDTH)
    )
