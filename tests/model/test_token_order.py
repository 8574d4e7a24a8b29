"""Tokens in the order that balances causal work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax.ahead import hlo
from dsv32_jax.model import attention
from dsv32_jax.model import selection
from dsv32_jax.model import token_order
from pallas_kernels.masked_attention import tpu_tiles
from tests.support import models
from tests.support import tolerances

RTOL, ATOL = tolerances.TOLERANCE["float32"]


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_order_by_counting(shards):
  length, pieces = 12 * shards, 2 * shards
  want = []
  for i in range(shards):
    for piece in (i, pieces - 1 - i):
      want += range(piece * 6, piece * 6 + 6)
  order = token_order.TokenOrder(shards)
  place_BT = jnp.broadcast_to(jnp.arange(length), (2, length))
  got = order.apply(place_BT)
  np.testing.assert_array_equal(got, [want, want])
  np.testing.assert_array_equal(order.places(length), want)
  np.testing.assert_array_equal(order.restore(got), place_BT)
  x_BTD = jax.random.normal(jax.random.key(0), (2, length, 5))
  np.testing.assert_array_equal(order.apply(x_BTD), x_BTD[:, np.array(want)])


def work_of_shards(slots_BT, shards: int, queries=128, keys=256):
  """Pairs of tiles that the TPU attention visits, for each shard of a row."""
  length = slots_BT.shape[1]
  found = []
  for own_BT in jnp.split(slots_BT, shards, axis=1):
    sizes = tpu_tiles.choose_sizes(
      (1, own_BT.shape[1], 1, 1), length, queries, keys, 1
    )
    padded_BT = tpu_tiles.padded_slots(sizes, own_BT, length)
    kinds_RC = tpu_tiles.kinds(sizes, padded_BT, None)
    found.append(int(jnp.sum(kinds_RC != tpu_tiles.EMPTY)))
  return np.array(found)


@pytest.mark.parametrize("shards", [4, 16, 32])
def test_causal_work_is_balanced(shards):
  length = 131072
  slots_BT = jnp.arange(length)[None]
  own = work_of_shards(slots_BT, shards)
  order = token_order.TokenOrder(shards)
  balanced = work_of_shards(order.apply(slots_BT), shards)
  assert own.sum() == balanced.sum()
  # In their own order the last shard has (2 shards - 1) / shards of the mean.
  np.testing.assert_allclose(
    own.max() / own.mean(), (2 * shards - 1) / shards, rtol=0.01
  )
  assert balanced.max() / balanced.mean() < 1.001


def test_gradients_of_keys_go_back_to_their_tokens():
  """Each device reads every key and gets the sum for its own tokens only."""
  order = token_order.TokenOrder(4)
  key_BSX, query_BTX = jax.random.normal(jax.random.key(0), (2, 2, 16, 3))

  def loss(key_BSX, layout):
    def run(query_BTX, key_BSX):
      in_order_BSX = layout.in_order(key_BSX)
      return (jnp.einsum("BTX,BSX->BTS", query_BTX, in_order_BSX),)

    (score_BTS,) = sharding.shard_call(
      run,
      (query_BTX, key_BSX),
      (attention.ROWS, layout.axes),
      (attention.ROWS,),
    )
    return jnp.sum(jnp.sin(score_BTS) * jnp.arange(16))

  wanted = jax.grad(lambda x: loss(order.restore(x), attention.WHOLE))(key_BSX)
  layout = attention.KeyLayout(split=True, order=order)
  mesh = sharding.make_mesh(sharding.MeshConfig(context=4), jax.devices()[:4])
  with jax.set_mesh(mesh):
    spec = sharding.partition_spec((2, 16, 3), ("batch", "length", None), mesh)
    placed = jax.device_put(key_BSX, jax.NamedSharding(mesh, spec))
    step = jax.jit(lambda x: jax.grad(loss)(x, layout)).lower(placed).compile()
    found = step(placed)
  np.testing.assert_allclose(found, wanted, rtol=RTOL, atol=ATOL)
  moved = hlo.traffic(step.as_text(), 4).bytes
  # Among four devices; a sum over axes of one device moves nothing.
  own = 2 * 4 * 3 * 4
  assert moved["all-gather"] == moved["reduce-scatter"] == 3 * own
  assert moved.get("all-reduce", 0) == 0
  assert found.sharding.shard_shape(found.shape) == (2, 4, 3)


@pytest.mark.parametrize(
  "form",
  [
    "masked",
    pytest.param("dense", marks=pytest.mark.slow),
    pytest.param("gathered", marks=pytest.mark.slow),
  ],
)
def test_the_model_gives_the_same_in_any_order(form):
  model, tokens = models.tiny_model(), models.random_tokens((2, 24))
  segments_BT = jnp.asarray([[1] * 9 + [2] * 13 + [0] * 2, [1] * 24])
  positions_BT = jnp.asarray([[*range(9), *range(13), 0, 0], [*range(24)]])
  options = attention.AttentionOptions(
    select=selection.DENSE if form == "dense" else selection.TopK(6),
    form="gathered" if form == "gathered" else "expanded",
    indexer_loss=True,
  )
  order = token_order.TokenOrder(3)

  def run(order, tokens, positions_BT, segments_BT):
    given = dict(
      positions_BT=positions_BT,
      segments_BT=segments_BT,
      options=options,
      order=order,
    )
    output = model(tokens, **given)
    further, results = model.predict_further(output, tokens, **given)
    return output.logits, further, output.moe.kl_BT, results.kl_BT

  run = jax.jit(run, static_argnums=0)
  want = run(None, tokens, positions_BT, segments_BT)
  moved = map(order.apply, (tokens, positions_BT, segments_BT))
  logits, further, kl_LBT, kl_BT = run(order, *moved)
  got = (
    order.restore(logits),
    order.restore(further),
    jax.vmap(order.restore)(kl_LBT),
    order.restore(kl_BT),
  )
  real = np.asarray(segments_BT) > 0
  for a, b in zip(got, want, strict=True):
    a, b = (np.asarray(x) for x in (a, b))
    if a.ndim == 3 and a.shape[1:] == real.shape:
      a, b = (x.transpose(1, 2, 0) for x in (a, b))
    scale = np.abs(b[real]).max()
    np.testing.assert_allclose(a[real], b[real], rtol=RTOL, atol=ATOL * scale)


def test_the_mesh_tells_the_order():
  assert token_order.balanced(64) is None
  mesh = sharding.make_mesh(sharding.MeshConfig(context=2, tensor=2, data=2))
  with jax.set_mesh(mesh):
    assert token_order.balanced(64) == token_order.TokenOrder(4)
    # Does not divide into eight pieces.
    assert token_order.balanced(60) is None
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=8))):
    assert token_order.balanced(64) is None
