"""Which form of the attention, and whose kernels, cost least for given sizes.

Both can be overridden in `attention.AttentionOptions`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv32_jax.model import selection as selection_lib

# Queries up to which the latent forms win: they skip expanding S keys. So few
# fill no tile of a TPU kernel.
FEW_QUERIES = 8


class Crossover(NamedTuple):
  """From where on gathering the selected latents beats masking all keys.

  Attributes:
    keys: at least as many keys.
    per_selected: and at least as many for each selected one.
  """

  keys: int
  per_selected: int


# cpu: measured on the 65M model, where gathering costs 40 us a query at any
# length and the masked form 35 at 1024 keys, 80 at 4096 and 145 at 8192.
# tpu: by the compiler's schedule, 128 heads: a gathered query of 2048 keys
# costs as much as 6 to 9 thousand visible keys in the masked form, which a
# causal query has on average at twice that length. Not run on a TPU.
# gpu: by arithmetic, 14 to 21 thousand keys on an H200. Not run on a GPU.
CROSSOVERS = {
  "cpu": Crossover(2048, 12),
  "tpu": Crossover(16384, 8),
  "gpu": Crossover(16384, 8),
}


def choose_form(options, num_queries: int, num_keys: int) -> str:
  """Returns the name of the form that computes least for these sizes.

  One query at a time reads latents, never expanded keys: gathered if there
  is a selection, else absorbed. Many queries use the masked expanded form,
  whose matmuls are large, up to the length where gathering k latents a query
  is cheaper than scoring every key.

  Args:
    options: AttentionOptions.
    num_queries: queries of a sequence in this call.
    num_keys: keys they may see at most.
  """
  if options.form is not None:
    return options.form
  sparse = options.select != selection_lib.DENSE
  if num_queries <= FEW_QUERIES:
    return "gathered" if sparse else "absorbed"
  crossover = CROSSOVERS[_platform(options)]
  selected = options.select.k if sparse else num_keys
  if num_keys >= max(crossover.keys, crossover.per_selected * selected):
    return "gathered"
  return "expanded"


def choose_kernels(options, num_queries: int, dtype) -> str:
  """Returns the name of the implementation to ask the operations for.

  Args:
    options: AttentionOptions.
    num_queries: queries of a sequence in this call.
    dtype: of the activations; the TPU's gathered form takes bfloat16 alone.
  """
  if options.kernels is not None:
    return options.kernels
  on_tpu = jax.default_backend() == "tpu" and num_queries > FEW_QUERIES
  return "tpu" if on_tpu and dtype == jnp.bfloat16 else "xla"


def choose_experts(options) -> str:
  """Returns the implementation of `expert_ffn`: grouped products off CPUs."""
  return {"cpu": "xla", "tpu": "tpu"}.get(_platform(options), "ragged")


def _platform(options):
  """Whose costs count: the named kernels', else the default device's."""
  if options.kernels in ("tpu", "gpu"):
    return options.kernels
  backend = jax.default_backend()
  return backend if backend in CROSSOVERS else "cpu"
