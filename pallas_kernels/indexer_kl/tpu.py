"""The KL loss over masked keys as TPU kernels.

Values: the grid walks over (batch, query tile, key tile, group of 8 attention
heads). A tile of [512 keys, 256 queries] collects the unnormalised target mass
m = sum_h exp(scale q_h . k - lse_h) in VMEM, a group of heads a step, so that
the attention is never kept per head; its index scores are summed over the
index heads at the first group. The last group folds both into five running
sums a query: sum m, sum m log m, sum m (score - top), top and
sum exp(score - top), from which kl = (E - X) / M - log M + log L follows.

Gradients: `tpu_gradient` walks over the same grid once more, with each query's
mass and log-sum-exp known. In a tile: H products of width Q for the mass, I of
width K for the scores, and 3 I of width K for the gradients.

Memory a step at 64 index heads x 128 and attention heads of 192, bf16: index
queries 4 MB, 8 heads of keys 2 MB and of queries 1 MB, mass and scores 1 MB;
backward 12 MB more for u and the second order of the index queries; inputs and
outputs twice, for the pipeline.
"""
# B batch, T queries, H attention heads, G key heads (H or 1), Q query width

from pallas_kernels.indexer_kl import tpu_gradient
from pallas_kernels.indexer_kl import tpu_tiles
from pallas_kernels.indexer_kl import tpu_values


def evaluate(scale, trained, constants, weight_BT, *, interpret=False):
  """Returns (kl_BT, gradients of sum(weight kl) by `trained`, or None)."""
  sizes = tpu_tiles.choose_sizes(constants[0].shape, constants[1].shape)
  inputs, tables = tpu_tiles.arrange(sizes, trained, constants)
  rows_B8T = tpu_values.values(sizes, interpret, scale, inputs, tables)
  num_queries = trained[0].shape[1]
  kl_BT = rows_B8T[:, tpu_values.KL, :num_queries]
  if weight_BT is None:
    return kl_BT, None
  mass_BT, lse_BT = rows_B8T[:, tpu_values.MASS], rows_B8T[:, tpu_values.LSE]
  gradients = tpu_gradient.gradients(
    *(sizes, interpret, scale, inputs, tables),
    *(mass_BT, lse_BT, trained, weight_BT),
  )
  return kl_BT, gradients
