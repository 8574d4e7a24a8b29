"""What every front refuses: arrays with an empty axis."""
# B batch, T queries, S keys, H heads, I index heads, K widths, N listed keys,
# D model width, E experts, F expert width, A experts a token, P pages of Z keys

import jax.numpy as jnp
import pytest

from pallas_kernels import decode_scores
from pallas_kernels import expert_ffn
from pallas_kernels import index_select
from pallas_kernels import indexer_kl
from pallas_kernels import masked_attention
from pallas_kernels import sparse_mla


def index_inputs(n):
  return (
    jnp.ones((n["B"], n["T"], n["I"], n["K"])),
    jnp.ones((n["B"], n["S"], n["K"])),
    jnp.ones((n["B"], n["T"], n["I"])),
  )


def latent_inputs(n):
  return (
    jnp.ones((n["B"], n["T"], n["H"], n["K"])),
    jnp.ones((n["B"], n["T"], n["H"], 2)),
    jnp.ones((n["B"], n["S"], n["K"])),
    jnp.ones((n["B"], n["S"], 2)),
  )


def slots(n):
  return jnp.zeros((n["B"], n["T"]), jnp.int32)


def listed(n):
  return jnp.zeros((n["B"], n["T"], n["N"]), jnp.int32)


def lse(n):
  return jnp.zeros((n["B"], n["T"], n["H"]))


def heads(n, length):
  return jnp.ones((n["B"], n[length], n["H"], n["K"]))


CALLS = {
  "index_select": (
    "BTSIK",
    lambda n, **how: index_select.index_select(
      *index_inputs(n), slots(n), top_k=2, **how
    ),
  ),
  "masked_attention": (
    "BTSHK",
    lambda n, **how: masked_attention.masked_attention(
      heads(n, "T"), heads(n, "S"), heads(n, "S"), slots(n), scale=1.0, **how
    ),
  ),
  "sparse_mla": (
    "BTSHKN",
    lambda n, **how: sparse_mla.sparse_mla(
      *latent_inputs(n), listed(n), scale=1.0, **how
    ),
  ),
  "indexer_kl": (
    "BTSIK",
    lambda n, **how: indexer_kl.indexer_kl(
      *index_inputs(n),
      heads(n, "T"),
      heads(n, "S"),
      lse(n),
      slots(n),
      scale=1.0,
      **how,
    ),
  ),
  "indexer_kl_gathered": (
    "BTSIK",
    lambda n, **how: indexer_kl.indexer_kl_gathered(
      *index_inputs(n), *latent_inputs(n), lse(n), listed(n), scale=1.0, **how
    ),
  ),
  "decode_scores": (
    "BIKPN",
    lambda n, **how: decode_scores.decode_scores(
      jnp.ones((n["B"], n["I"], n["K"])),
      jnp.ones((n["B"], n["I"])),
      jnp.ones((n["P"], 2, n["K"]), jnp.float8_e4m3fn),
      jnp.ones((n["P"], 2)),
      jnp.zeros((n["B"], n["N"]), jnp.int32),
      jnp.ones(n["B"], jnp.int32),
      **how,
    ),
  ),
  "expert_ffn": (
    "TADEF",
    lambda n, **how: expert_ffn.expert_ffn(
      jnp.ones((n["T"], n["D"])),
      jnp.zeros((n["T"], n["A"]), jnp.int32),
      jnp.ones((n["T"], n["A"])),
      jnp.ones((n["E"], n["D"], n["F"])),
      jnp.ones((n["E"], n["D"], n["F"])),
      jnp.ones((n["E"], n["F"], n["D"])),
      **how,
    ),
  ),
}


@pytest.mark.parametrize(
  ("name", "axis"),
  [(name, axis) for name, (axes, _) in CALLS.items() for axis in axes],
)
def test_an_empty_axis_is_refused(name, axis):
  sizes = dict.fromkeys("BTSHIKNADEFP", 2)
  call = CALLS[name][1]
  call(sizes, implementation="ref")
  with pytest.raises(ValueError, match="has an empty axis"):
    call(sizes | {axis: 0}, implementation="xla")
