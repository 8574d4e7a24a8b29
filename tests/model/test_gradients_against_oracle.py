"""Gradients of the whole model against central differences of the oracle.

Every parameter of every layer is moved in one random direction; the choice of
keys and experts is replayed, so that the losses are smooth.

Axes: L layers, B batch, T queries, S keys.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.model import attention
from dsv32_jax.model import selection
from dsv32_jax.model import transformer
from tests.support import oracle
from tests.support import oracle_checkpoint
from tests.support import oracle_layers
from tests.support import oracle_losses
from tests.support import oracle_ops
from tests.support import oracle_to_flax
from tests.support import tolerances

CONFIG = oracle_checkpoint.tiny_config(
  num_hidden_layers=2, num_nextn_predict_layers=1, vocab_size=31
)
SEGMENTS_BT = np.array([[1] * 17, [1] * 4 + [2] * 13], np.int32)
TOP_K = CONFIG["index_topk"]
OPTIONS = attention.AttentionOptions(
  select=selection.TopK(TOP_K), form="expanded", indexer_loss=True
)
BALANCE, MTP = 0.5, 0.3
STEP = 1e-5


@pytest.fixture(scope="module")
def case():
  tensors = oracle_checkpoint.random_checkpoint(CONFIG, seed=6)
  ids_BT = np.random.default_rng(7).integers(0, 31, (2, 17)).astype(np.int32)
  chosen = oracle.forward(CONFIG, tensors, ids_BT, segment_ids_BT=SEGMENTS_BT)
  return tensors, ids_BT, chosen["topk_mask"], chosen["experts"]


def oracle_losses_of(case, tensors):
  """LM, MTP and balance losses in one, and the sum of the indexers' KL."""
  _, ids_BT, chosen_LBTS, experts_LBTA = case
  out = oracle.forward(
    CONFIG,
    tensors,
    ids_BT,
    segment_ids_BT=SEGMENTS_BT,
    selection_LBTS=chosen_LBTS,
    routing=experts_LBTA,
  )
  mtp_BTW, further = oracle.mtp_forward(
    CONFIG, tensors, out["final_norm"], ids_BT, segment_ids_BT=SEGMENTS_BT
  )
  main = oracle.lm_loss(out["logits"], ids_BT, SEGMENTS_BT)[0]
  main += MTP * oracle.mtp_loss(mtp_BTW, ids_BT, SEGMENTS_BT)[0]
  for affinity_BTE, experts_BTA in zip(out["affinity"], experts_LBTA):
    balance_B = oracle_layers.balance_loss(affinity_BTE, experts_BTA)
    main += BALANCE * balance_B.mean()
  names = ("attention_weights", "index_scores", "topk_mask")
  layers = [*zip(*(out[name] for name in names))]
  layers.append([further[name] for name in names])
  kl = sum(
    oracle_losses.indexer_kl_sparse(*arrays, np.ones(arrays[2].shape[:2]))[0]
    for arrays in layers
  )
  return np.array([main, kl])


def cross_entropy(logits_BTV, target_BT, mask_BT):
  log_p_BTV = jax.nn.log_softmax(logits_BTV)
  chosen_BT = jnp.take_along_axis(log_p_BTV, target_BT[..., None], -1)[..., 0]
  return -jnp.sum(chosen_BT * mask_BT) / mask_BT.sum()


def model_gradients(case):
  """The same two losses, and their gradients as dictionaries by path."""
  tensors, ids_BT, chosen_LBTS, experts_LBTA = case
  graph, params, rest = nnx.split(
    oracle_to_flax.build(CONFIG, tensors), nnx.Param, ...
  )
  words_LBTM = np.stack([oracle_ops.mask_to_bits(x) for x in chosen_LBTS])
  replay = transformer.Replay(
    jnp.asarray(words_LBTM), jnp.asarray(experts_LBTA, jnp.int32)
  )
  next_token = oracle_losses.shifted_targets(ids_BT, 1, SEGMENTS_BT)
  second_token = oracle_losses.shifted_targets(ids_BT, 2, SEGMENTS_BT)

  def losses(params):
    model = nnx.merge(graph, params, rest)
    args = {"segments_BT": SEGMENTS_BT, "options": OPTIONS}
    out = model(ids_BT, replay=replay, **args)
    hidden_BTD, further = model.predict_further(out, ids_BT, **args)
    main = cross_entropy(out.logits, *next_token)
    main += MTP * cross_entropy(model.head(hidden_BTD), *second_token)
    main += BALANCE * out.moe.balance.sum()
    # The last position of the MTP module has no next token.
    kl = out.gather("kl_BT").sum() + further.kl_BT[:, :-1].sum()
    return main, kl

  @jax.jit
  def gradients(params):
    values, pull = jax.vjp(losses, params)
    return values, pull((1.0, 0.0))[0], pull((0.0, 1.0))[0]

  values, main, kl = gradients(params)
  return values, *(dict(nnx.to_flat_state(state)) for state in (main, kl))


def draw_direction(rng, tensors, leaf):
  """Random directions of a leaf's tensors, by Hugging Face name."""
  direction = {
    name: rng.standard_normal(tensors[name].shape) for name in leaf.names
  }
  if leaf.path[-1] in ("key_up", "value_up"):
    # Both are rows of one tensor; the other's rows stay where they are.
    rows = direction[leaf.names[0]].reshape(CONFIG["num_attention_heads"], -1)
    split = CONFIG["qk_nope_head_dim"] * CONFIG["kv_lora_rank"]
    rows[
      :, slice(split, None) if leaf.path[-1] == "key_up" else slice(split)
    ] = 0.0
  # The MTP module of the checkpoint has copies of what the model shares.
  prefix = f"model.layers.{CONFIG['num_hidden_layers']}."
  for name, copy in (
    ("model.embed_tokens.weight", prefix + "embed_tokens.weight"),
    ("lm_head.weight", prefix + "shared_head.head.weight"),
  ):
    if name in direction:
      direction[copy] = direction[name]
  return direction


def test_gradients(case):
  tensors = case[0]
  values, main, kl = model_gradients(case)
  np.testing.assert_allclose(
    values, oracle_losses_of(case, tensors), *tolerances.TOLERANCE["float32"]
  )
  rng = np.random.default_rng(8)
  got, want = [], []
  for leaf in oracle_to_flax.leaves(CONFIG):
    if leaf.path[-1] == "expert_bias":
      continue
    direction = draw_direction(rng, tensors, leaf)
    ends = [
      oracle_losses_of(
        case, tensors | {n: tensors[n] + s * d for n, d in direction.items()}
      )
      for s in (STEP, -STEP)
    ]
    slope_main, slope_kl = (ends[0] - ends[1]) / (2 * STEP)
    along = leaf.value(direction)
    at = () if leaf.layer is None else leaf.layer
    dot_main, dot_kl = (
      np.sum(np.asarray(grad[leaf.path].get_value()[at], np.float64) * along)
      for grad in (main, kl)
    )
    is_indexer = "indexer" in leaf.path
    if not is_indexer:
      # The oracle's target moves with these; the model's is a constant.
      assert not np.asarray(kl[leaf.path].get_value()[at]).any(), leaf.path
      slope_kl = 0.0
    else:
      assert not np.asarray(main[leaf.path].get_value()[at]).any(), leaf.path
    got.append((dot_main, dot_kl))
    want.append((slope_main, slope_kl))
  got, want = np.array(got), np.array(want)
  assert (want[:, 0] != 0).sum() > 30
  assert (want[:, 1] != 0).sum() == 15
  for column in range(2):
    scale = np.abs(want[:, column]).max()
    np.testing.assert_allclose(
      got[:, column] / scale,
      want[:, column] / scale,
      *tolerances.TOLERANCE["float32"],
    )
