"""The routed experts on a TPU: as in `ragged`, but for the matrices' gradients.

XLA makes a kernel of a `ragged_dot` that gives rows, but of the one that sums
over rows, the gradient by the matrices, a product of all rows for each expert,
masked: E times the work. Here that gradient is the grouped product of jax's
megablox, which visits the tiles of an expert's own rows. Tiles of 512 rows by
1024 and 512 columns: about the largest that fits on all generations, 2 MiB of
float32 sums and twice 3.5 MiB of blocks.
"""
# E experts, D width of rows, F width of results, N rows

import functools

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
import jax.numpy as jnp

from pallas_kernels.expert_ffn import ragged

TILE = (512, 1024, 512)
# Rows of a tile where there are few: a register of bfloat16.
_ROWS = 16


def expert_ffn(
  x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD, *, interpret=False
):
  """Returns out_TD float32; see the front for what it is."""
  return ragged.expert_ffn(
    *(x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD),
    grouped=functools.partial(_grouped, interpret),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(interpret, rows_ND, weight_EDF, sizes_E):
  """Multiplies the rows of each group by its matrix: float32 [N,F]."""
  del interpret
  return ragged.grouped(rows_ND, weight_EDF, sizes_E)


def _forward(interpret, rows_ND, weight_EDF, sizes_E):
  out_NF = _grouped(interpret, rows_ND, weight_EDF, sizes_E)
  return out_NF, (rows_ND, weight_EDF, sizes_E)


def _backward(interpret, saved, d_out_NF):
  rows_ND, weight_EDF, sizes_E = saved
  _, pull_back = jax.vjp(
    lambda rows: ragged.grouped(rows, weight_EDF, sizes_E), rows_ND
  )
  (d_rows_ND,) = pull_back(d_out_NF)
  d_weight_EDF = _sum_over_rows(interpret, rows_ND, d_out_NF, sizes_E)
  return d_rows_ND, d_weight_EDF.astype(weight_EDF.dtype), None


_grouped.defvjp(_forward, _backward)


def _sum_over_rows(interpret, rows_ND, d_out_NF, sizes_E):
  """Returns float32 [E,D,F]: each group's rows, transposed, times d_out."""
  tile = min(TILE[0], -(-rows_ND.shape[0] // _ROWS) * _ROWS)
  missing = -rows_ND.shape[0] % tile
  pad = lambda array_NX: jnp.pad(array_NX, [(0, missing), (0, 0)])
  # Factors in the type of the rows, as those of other products.
  factors = pad(rows_ND), pad(d_out_NF.astype(rows_ND.dtype))
  exact = rows_ND.dtype == jnp.float32
  with jax.default_matmul_precision("highest" if exact else "default"):
    return tgmm(
      factors[0].T,
      factors[1],
      sizes_E,
      preferred_element_type=jnp.float32,
      tiling=(tile, *(min(x.shape[1], n) for x, n in zip(factors, TILE[1:]))),
      interpret=interpret,
    )
