"""The whole model against the float64 oracle, in float32, on random weights.

Where the two could choose differently because of rounding, the model's choice
of keys and experts must agree with the oracle's, and the oracle then replays it
for everything downstream.

Axes: L layers, B batch, T queries, S keys, A experts a token, W vocabulary.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import weights
from dsv32_jax.model import attention
from dsv32_jax.model import cache
from dsv32_jax.model import selection
from dsv32_jax.model import transformer
from pallas_kernels import bitmask
from tests.support import oracle
from tests.support import oracle_checkpoint
from tests.support import oracle_losses
from tests.support import oracle_ops
from tests.support import oracle_to_flax
from tests.support import tolerances

CONFIG = oracle_checkpoint.tiny_config()
TOP_K = CONFIG["index_topk"]
ONE_BT = np.ones((2, 21), np.int32)
PACKED_BT = np.array(
  [[1] * 9 + [2] * 1 + [3] * 11, [1] * 4 + [2] * 12 + [0] * 5], np.int32
)
FORMS = {
  form: attention.AttentionOptions(
    select=selection.TopK(TOP_K), form=form, indexer_loss=True
  )
  for form in ("expanded", "absorbed", "gathered")
}
DENSE = attention.AttentionOptions(select=selection.DENSE, indexer_loss=True)
REPLAYED = attention.AttentionOptions(
  select=selection.TopK(TOP_K), form="expanded", indexer_loss=True
)


@pytest.fixture(scope="module")
def tensors():
  return oracle_checkpoint.random_checkpoint(CONFIG, seed=3)


@pytest.fixture(scope="module")
def ids_BT():
  ids_BT = np.random.default_rng(4).integers(0, CONFIG["vocab_size"], (2, 21))
  return ids_BT.astype(np.int32)


@pytest.fixture(scope="module")
def model(tensors):
  return oracle_to_flax.build(CONFIG, tensors)


def run(model, ids_BT, segments_BT, options):
  graph, state = nnx.split(model)
  return _run(graph, state, ids_BT, segments_BT, options)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _run(graph, state, ids_BT, segments_BT, options):
  model = nnx.merge(graph, state)
  args = {"segments_BT": segments_BT, "options": options}
  out = model(ids_BT, record=True, trace=True, **args)
  hidden_BTD, further = model.predict_further(out, ids_BT, **args)
  return out, model.head(hidden_BTD), further


def close(got, want, where=None):
  """Compares relative to the largest |want|, at the positions of a mask."""
  got, want = np.asarray(got), np.asarray(want)
  assert got.dtype == np.float32
  assert got.shape == want.shape
  peak = np.abs(want if where is None else want[where]).max()
  if where is not None:
    got, want = got[where], want[where]
  tolerances.assert_close(got / peak, want / peak, "float32")


def masks_of(selection_LBTX, keys):
  """Words or indices of every layer as bool [L, B, T, S]."""
  layers = []
  for recorded in selection_LBTX:
    words = recorded
    if recorded.dtype != jnp.uint32:
      words = bitmask.from_indices(recorded, keys)
    layers.append(np.asarray(bitmask.unpack(words, keys)))
  return np.stack(layers)


def compare_choices(out, want, segments_BT):
  """Checks keys and experts of real tokens; returns them for a replay."""
  real_BT = segments_BT > 0
  allowed_BTS = oracle_ops.allowed_pairs(*segments_BT.shape, segments_BT)
  got_LBTS = masks_of(out.gather("selection"), segments_BT.shape[1])
  for scores_BTS, got_BTS, want_BTS in zip(
    want["index_scores"], got_LBTS, want["topk_mask"]
  ):
    finite_BTS = np.where(allowed_BTS, scores_BTS, 0.0)
    agree_BT = oracle_ops.selections_agree(
      finite_BTS, got_BTS, want_BTS, allowed_BTS, TOP_K
    )
    assert agree_BT[real_BT].all()
  got_LBTA = np.asarray(out.gather("experts_BTA"))
  np.testing.assert_array_equal(
    got_LBTA[:, real_BT], want["experts"][:, real_BT]
  )
  # A padding token sees nothing in the model; the oracle needs one key.
  got_LBTS |= ~real_BT[:, :, None] & np.eye(segments_BT.shape[1], dtype=bool)
  return got_LBTS, got_LBTA


@pytest.mark.parametrize("segments_BT", [ONE_BT, PACKED_BT])
@pytest.mark.parametrize("form", list(FORMS))
def test_sparse(model, tensors, ids_BT, form, segments_BT):
  real_BT = segments_BT > 0
  out, _, _ = run(model, ids_BT, segments_BT, FORMS[form])
  forward = functools.partial(
    oracle.forward, CONFIG, tensors, ids_BT, segment_ids_BT=segments_BT
  )
  chosen_LBTS, experts_LBTA = compare_choices(out, forward(), segments_BT)
  want = forward(selection_LBTS=chosen_LBTS, routing=experts_LBTA)
  close(out.logits, want["logits"], real_BT)
  close(out.hidden, want["final_norm"], real_BT)
  compare_traces(out, want, real_BT)
  for layer, kl_BT in enumerate(out.gather("kl_BT")):
    _, want_BT, _ = oracle_losses.indexer_kl_sparse(
      want["attention_weights"][layer],
      want["index_scores"][layer],
      chosen_LBTS[layer],
      real_BT,
    )
    close(kl_BT, want_BT, real_BT)
    assert (np.asarray(kl_BT)[~real_BT] == 0).all()


def compare_traces(out, want, real_BT):
  """Checks the intermediates of layer 0, and the sums of every layer."""
  close(out.embedding, want["hidden_states"][0])
  for name, key in (
    ("query_latent", "l0_qr"),
    ("query_rope", "l0_q_pe"),
    ("latent", "l0_kv_latent"),
    ("key_rope", "l0_k_pe"),
  ):
    close(out.dense.trace[name][0], want[key])
  index = out.dense.trace["index"]
  close(index.query_BTIK[0], want["l0_idx_q"])
  close(index.key_BTK[0], want["l0_idx_k"])
  width = CONFIG["index_head_dim"]
  close(index.weight_BTI[0], want["l0_idx_w"] * width**-0.5)
  traces = (out.dense.trace, out.moe.trace)
  for name, key in (("attention", "attn_out"), ("ffn", "ffn_out")):
    got = np.concatenate([trace[name] for trace in traces])
    close(got, want[key], (slice(None), real_BT))
  got = np.concatenate([trace["residual"] for trace in traces])
  close(got, want["hidden_states"][1:], (slice(None), real_BT))
  close(
    out.moe.trace["routing"].affinities_BTE,
    want["affinity"],
    (slice(None), real_BT),
  )


@pytest.mark.parametrize("segments_BT", [ONE_BT, PACKED_BT])
def test_dense(model, tensors, ids_BT, segments_BT):
  real_BT = segments_BT > 0
  out, _, _ = run(model, ids_BT, segments_BT, DENSE)
  want = oracle.forward(
    CONFIG, tensors, ids_BT, segment_ids_BT=segments_BT, sparse=False
  )
  close(out.logits, want["logits"], real_BT)
  allowed_BTS = oracle_ops.allowed_pairs(*segments_BT.shape, segments_BT)
  for layer, kl_BT in enumerate(out.gather("kl_BT")):
    _, want_BT, _ = oracle_losses.indexer_kl_dense(
      want["attention_weights"][layer],
      np.where(allowed_BTS, want["index_scores"][layer], 0.0),
      allowed_BTS,
      real_BT,
    )
    close(kl_BT, want_BT, real_BT)


@pytest.mark.parametrize("options", [FORMS["expanded"], DENSE])
@pytest.mark.parametrize("segments_BT", [ONE_BT, PACKED_BT])
def test_mtp(model, tensors, ids_BT, options, segments_BT):
  out, logits_BTW, _ = run(model, ids_BT, segments_BT, options)
  want_BTW, _ = oracle.mtp_forward(
    CONFIG,
    tensors,
    np.asarray(out.hidden, np.float64),
    ids_BT,
    segment_ids_BT=segments_BT,
    sparse=options is not DENSE,
  )
  close(logits_BTW[:, :-1], want_BTW, segments_BT[:, :-1] > 0)


def test_cached_decoding(model, tensors, ids_BT):
  want_BTW = oracle.forward(CONFIG, tensors, ids_BT)["logits"]
  graph, state = nnx.split(model)

  @jax.jit
  def extend(state, part_BT, held):
    return nnx.merge(graph, state)(part_BT, cache=held)[:3:2]

  held = cache.empty_cache(model.config, 2, 24)
  begin, parts = 0, (13, 4, 1, 1, 1, 1)
  for count in parts:
    part_BT = ids_BT[:, begin : begin + count]
    logits_BTW, held = extend(state, part_BT, held)
    close(logits_BTW, want_BTW[:, begin : begin + count])
    begin += count
  assert begin == ids_BT.shape[1]


def test_replay_of_foreign_choices(model, tensors, ids_BT):
  rng = np.random.default_rng(5)
  scores_LBTS = rng.standard_normal((3, 2, 21, 21))
  allowed_BTS = oracle_ops.allowed_pairs(2, 21)
  chosen_LBTS = oracle_ops.select_top_k(
    scores_LBTS.reshape(6, 21, 21), np.tile(allowed_BTS, (3, 1, 1)), 4
  ).reshape(scores_LBTS.shape)
  experts_LBTA = np.argsort(rng.random((2, 2, 21, 12)), axis=-1)[..., :3]
  want = oracle.forward(
    CONFIG, tensors, ids_BT, selection_LBTS=chosen_LBTS, routing=experts_LBTA
  )
  got = model(
    ids_BT, options=REPLAYED, replay=replay_of(chosen_LBTS, experts_LBTA)
  )
  close(got.logits, want["logits"])


def replay_of(chosen_LBTS, experts_LBTA):
  words_LBTM = np.stack([oracle_ops.mask_to_bits(x) for x in chosen_LBTS])
  return transformer.Replay(
    jnp.asarray(words_LBTM), jnp.asarray(experts_LBTA, jnp.int32)
  )


def test_quantised_index_of_the_first_layer(model, tensors, ids_BT):
  options = attention.AttentionOptions(
    select=selection.TopK(TOP_K), form="expanded", index_quantized=True
  )
  graph, state = nnx.split(model)

  @jax.jit
  def index_of(state):
    out = nnx.merge(graph, state)(ids_BT, options=options, trace=True)
    return jax.tree.map(lambda x: x[0], out.dense.trace["index"])

  index = index_of(state)
  got_BTS = oracle_ops.index_scores(*(np.asarray(x, np.float64) for x in index))
  want = oracle.forward(
    CONFIG, tensors, ids_BT, score_pairs=oracle_ops.index_scores_quantised
  )
  allowed_BTS = oracle_ops.allowed_pairs(2, 21)
  want_BTS = want["index_scores"][0]
  peak = np.abs(want_BTS[allowed_BTS]).max()
  # Float32 inputs may round to another e4m3 value at the edge between two.
  near_BTS = np.abs(got_BTS - want_BTS) <= 1e-5 * peak
  assert near_BTS[allowed_BTS].mean() > 0.9
  tolerances.assert_close(
    got_BTS[allowed_BTS] / peak, want_BTS[allowed_BTS] / peak, "float8_e4m3fn"
  )


def test_loaded_checkpoint(model, tensors, tmp_path):
  oracle_checkpoint.save_checkpoint(tmp_path, CONFIG, tensors)
  loaded = weights.load_hf(tmp_path)
  assert loaded.config == model.config
  want = dict(nnx.to_flat_state(nnx.state(model)))
  got = dict(nnx.to_flat_state(nnx.state(loaded)))
  assert set(got) == set(want)
  for path, variable in want.items():
    assert got[path].dtype == np.float32, path
    np.testing.assert_array_equal(got[path].get_value(), variable.get_value())
