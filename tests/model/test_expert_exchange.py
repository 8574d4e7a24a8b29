"""Experts spread over devices equal experts on one, whatever the routing."""
# T tokens, A experts a token, E experts, D model width, F expert width

import functools

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from dsv32_jax.model import expert_exchange
from pallas_kernels.expert_ffn import expert_ffn
from tests.support.tolerances import assert_close

DEVICES, EXPERTS, PER_TOKEN, WIDTH, HIDDEN = 4, 8, 3, 6, 5


def draw(tokens, routing):
  """Returns (ids_TA, (x, weights, gate, up, down), d_out_TD)."""
  random = np.random.default_rng(len(routing))
  if routing == "balanced":
    noise_TE = random.random((tokens, EXPERTS))
    ids_TA = np.argsort(noise_TE, axis=-1)[:, :PER_TOKEN]
  elif routing == "one device":
    ids_TA = random.integers(2, 4, (tokens, PER_TOKEN))
  elif routing == "no expert":
    # Numbers that are no expert's add nothing, and disturb no other row.
    ids_TA = random.integers(-3, EXPERTS + 3, (tokens, PER_TOKEN))
    ids_TA[1] = (-1, 2**30, -(2**31))
  else:
    assert routing == "one expert"
    ids_TA = np.full((tokens, PER_TOKEN), 5)
  shapes = (
    (tokens, WIDTH),
    (tokens, PER_TOKEN),
    (EXPERTS, WIDTH, HIDDEN),
    (EXPERTS, WIDTH, HIDDEN),
    (EXPERTS, HIDDEN, WIDTH),
    (tokens, WIDTH),
  )
  *inputs, d_out = (random.normal(size=s).astype(np.float32) for s in shapes)
  return ids_TA.astype(np.int32), tuple(inputs), d_out


def value_and_gradients(function, ids_TA, inputs, d_out_TD):
  @jax.jit
  def both(*inputs):
    out, pull_back = jax.vjp(
      lambda x, weights, *m: function(x, ids_TA, weights, *m), *inputs
    )
    return out, *pull_back(d_out_TD)

  return both(*inputs)


def spread(capacity):
  """Returns the experts over four devices, each with its own tokens."""
  exchange = expert_exchange.Exchange(
    axis="expert",
    devices=DEVICES,
    capacity=capacity,
    ragged=False,
    implementation="xla",
  )
  mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("expert",))
  return jax.shard_map(
    functools.partial(expert_exchange.exchanged_experts, exchange),
    mesh=mesh,
    in_specs=P("expert"),
    out_specs=P("expert"),
    check_vma=False,
  )


@pytest.mark.parametrize(
  "routing,capacity",
  [
    ("balanced", 64),
    ("balanced", 8),
    ("one device", 8),
    ("one expert", 8),
    ("no expert", 8),
  ],
)
def test_equals_one_device(routing, capacity):
  problem = draw(4 * 20, routing)
  wanted = value_and_gradients(
    functools.partial(expert_ffn, implementation="ref"), *problem
  )
  found = value_and_gradients(spread(capacity), *problem)
  for want, got in zip(wanted, found, strict=True):
    assert_close(got, want)


def test_a_round_moves_no_more_than_its_capacity():
  ids_TA, inputs, _ = draw(4 * 20, "one expert")
  jaxpr = str(jax.make_jaxpr(spread(8))(inputs[0], ids_TA, *inputs[1:]))
  # Rows travel in buffers of 8 slots for each of 4 devices, and in no other.
  assert f"f32[{8 * DEVICES},{WIDTH}]" in jaxpr
  assert f"f32[{20 * PER_TOKEN},{WIDTH}]" not in jaxpr


def test_capacity_needs_four_rounds_when_balanced():
  assert expert_exchange.default_capacity(65536, 16) == 1280
  assert expert_exchange.default_capacity(3, 4) == 8
