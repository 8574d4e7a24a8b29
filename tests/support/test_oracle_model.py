"""The oracle's whole model: what must hold, and arrays from elsewhere.

Axes: B batch, T queries, S keys, L layers, W vocabulary.
"""

import ml_dtypes
import numpy as np
import pytest

from tests.support import oracle
from tests.support import oracle_blocks
from tests.support import oracle_checkpoint
from tests.support import oracle_layers
from tests.support import oracle_losses
from tests.support import oracle_ops
from tests.support import tolerances

EXACT = tolerances.TOLERANCE["float64"]


def close(got, want, tolerance=EXACT):
  np.testing.assert_allclose(got, want, rtol=tolerance[0], atol=tolerance[1])


@pytest.fixture(scope="module")
def case():
  config = oracle_checkpoint.tiny_config()
  tensors = oracle_checkpoint.random_checkpoint(config, seed=3)
  ids_BT = np.random.default_rng(4).integers(0, config["vocab_size"], (2, 21))
  return config, tensors, ids_BT


def test_absorbed_model_equals_expanded(case):
  want = oracle.forward(*case)
  got = oracle.forward(*case, attend=oracle_layers.attention_absorbed)
  np.testing.assert_array_equal(got["topk_mask"], want["topk_mask"])
  close(got["logits"], want["logits"], (1e-9, 1e-9))


def test_model_is_causal(case):
  config, tensors, ids_BT = case
  changed_BT = ids_BT.copy()
  changed_BT[:, 13:] = (changed_BT[:, 13:] + 1) % config["vocab_size"]
  want, got = (oracle.forward(config, tensors, x) for x in (ids_BT, changed_BT))
  close(got["logits"][:, :13], want["logits"][:, :13])
  assert np.abs(got["logits"][:, 13:] - want["logits"][:, 13:]).max() > 0.1
  want_BTW, _ = oracle.mtp_forward(config, tensors, want["final_norm"], ids_BT)
  got_BTW, _ = oracle.mtp_forward(
    config, tensors, got["final_norm"], changed_BT
  )
  close(got_BTW[:, :12], want_BTW[:, :12])
  assert np.abs(got_BTW[:, 12] - want_BTW[:, 12]).max() > 0.1


def test_packed_documents_do_not_see_each_other(case):
  config, tensors, ids_BT = case
  cuts = ((0, 9), (9, 10), (10, 21))
  segments_BT = np.zeros(ids_BT.shape, np.int32)
  for number, (begin, end) in enumerate(cuts):
    segments_BT[:, begin:end] = number
  packed = oracle.forward(config, tensors, ids_BT, segment_ids_BT=segments_BT)
  mtp_BTW, _ = oracle.mtp_forward(
    config,
    tensors,
    packed["final_norm"],
    ids_BT,
    segment_ids_BT=segments_BT,
  )
  for begin, end in cuts:
    alone_BT = ids_BT[:, begin:end]
    alone = oracle.forward(config, tensors, alone_BT)
    close(packed["logits"][:, begin:end], alone["logits"], (1e-9, 1e-9))
    np.testing.assert_array_equal(
      packed["topk_mask"][:, :, begin:end, begin:end], alone["topk_mask"]
    )
    if end - begin > 1:
      alone_BTW, _ = oracle.mtp_forward(
        config, tensors, alone["final_norm"], alone_BT
      )
      close(mtp_BTW[:, begin : end - 1], alone_BTW, (1e-9, 1e-9))


def test_sparse_equals_dense_up_to_top_k(case):
  config, tensors, ids_BT = case
  top_k = config["index_topk"]
  sparse = oracle.forward(config, tensors, ids_BT)["logits"]
  dense = oracle.forward(config, tensors, ids_BT, sparse=False)["logits"]
  close(sparse[:, :top_k], dense[:, :top_k])
  assert np.abs(sparse[:, top_k:] - dense[:, top_k:]).max() > 0.1
  wide = oracle.forward(config | {"index_topk": 21}, tensors, ids_BT)["logits"]
  close(wide, dense)


def test_replay_of_its_own_choices_changes_nothing(case):
  want = oracle.forward(*case)
  got = oracle.forward(
    *case, selection_LBTS=want["topk_mask"], routing=want["experts"]
  )
  for name in want:
    np.testing.assert_array_equal(got[name], want[name])
  moved = oracle.forward(*case, routing=(want["experts"] + 1) % 12)
  assert np.abs(moved["logits"] - want["logits"]).max() > 0.1


def test_hadamard_without_quantisation_changes_nothing(case):
  def transformed(q_BTIK, k_BSK, weight_BTI):
    return oracle_ops.index_scores(
      oracle_ops.hadamard(q_BTIK), oracle_ops.hadamard(k_BSK), weight_BTI
    )

  want, got = (
    oracle.forward(*case),
    oracle.forward(*case, score_pairs=transformed),
  )
  np.testing.assert_array_equal(got["topk_mask"], want["topk_mask"])
  close(got["logits"], want["logits"], (1e-9, 1e-9))


def test_routes_and_selections_have_their_counts(case):
  config, _, ids_BT = case
  got = oracle.forward(*case)
  count_T = np.minimum(np.arange(ids_BT.shape[1]) + 1, config["index_topk"])
  np.testing.assert_array_equal(
    got["topk_mask"].sum(-1), np.broadcast_to(count_T, (3, 2, 21))
  )
  used_LBT = (got["route_weights"] > 0).sum(-1)
  assert (used_LBT == config["num_experts_per_tok"]).all()
  close(got["route_weights"].sum(-1), np.full((2, 2, 21), 2.5))
  groups_LBTA = got["experts"] // 3
  assert max(len(set(row)) for row in groups_LBTA.reshape(-1, 3)) == 2


def test_losses_of_uniform_logits(case):
  config, _, ids_BT = case
  zeros_BTW = np.zeros((*ids_BT.shape, config["vocab_size"]))
  loss, grad_BTW = oracle.lm_loss(zeros_BTW, ids_BT)
  close(loss, np.log(config["vocab_size"]))
  assert (grad_BTW[:, -1] == 0).all()
  loss, grad_BTW = oracle.mtp_loss(zeros_BTW[:, :-1], ids_BT)
  close(loss, np.log(config["vocab_size"]))
  assert (grad_BTW[:, -1] == 0).all()
  assert (grad_BTW[:, :-1] != 0).any(-1).all()


def test_attention_target_of_a_sparse_layer(case):
  got = oracle.forward(*case)
  p_BTS = oracle_losses.attention_target(
    got["attention_weights"][0], got["topk_mask"][0]
  )
  close(p_BTS.sum(-1), np.ones((2, 21)))
  close(p_BTS, got["attention_weights"][0].mean(2))


def test_two_mscales_are_refused():
  config = oracle_checkpoint.tiny_config()
  config["rope_scaling"] = config["rope_scaling"] | {"mscale": 0.7}
  with pytest.raises(ValueError, match="two different mscale"):
    oracle_blocks.rope_angles(config, np.zeros((1, 1)))
  with pytest.raises(ValueError, match="hidden_sizes"):
    oracle_checkpoint.tiny_config(hidden_sizes=3)


def released_config():
  return oracle_checkpoint.tiny_config(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    index_n_heads=64,
    index_head_dim=128,
    n_routed_experts=256,
  )


def test_shapes_of_the_released_checkpoint():
  shapes = oracle_checkpoint.checkpoint_shapes(released_config())
  attention = "model.layers.0.self_attn."
  assert shapes[attention + "q_b_proj.weight"] == (24576, 1536)
  assert shapes[attention + "kv_a_proj_with_mqa.weight"] == (576, 7168)
  assert shapes[attention + "kv_b_proj.weight"] == (32768, 512)
  assert shapes[attention + "o_proj.weight"] == (7168, 16384)
  assert shapes[attention + "indexer.wq_b.weight"] == (8192, 1536)
  assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
  size = {name: int(np.prod(shape)) for name, shape in shapes.items()}
  indexer = sum(n for name, n in size.items() if ".indexer." in name)
  assert indexer == 62 * (8192 * 1536 + 128 * 7168 + 64 * 7168 + 256)
  main = sum(n for k, n in size.items() if not k.startswith("model.layers.61."))
  assert round((main - indexer * 61 / 62) / 1e9) == 671


def test_checkpoint_files_round_trip(case, tmp_path):
  config, tensors, _ = case
  oracle_checkpoint.save_checkpoint(tmp_path, config, tensors)
  loaded_config, loaded = oracle_checkpoint.load_checkpoint(tmp_path)
  assert loaded_config == config
  assert loaded.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(loaded[name], value)


def test_fp8_files_are_dequantised(tmp_path):
  values_OX = np.arange(-8.0, 8.0).reshape(2, 8)
  tensors = {"a.weight": values_OX, "a.weight_scale_inv": np.array([[0.25]])}

  def dtype_of(name):
    return "F8_E4M3" if name == "a.weight" else "F32"

  oracle_checkpoint.save_checkpoint(tmp_path, {}, tensors, dtype_of)
  raw = oracle_checkpoint.read_safetensors(tmp_path / "model.safetensors")
  assert raw["a.weight"].dtype == ml_dtypes.float8_e4m3fn
  _, loaded = oracle_checkpoint.load_checkpoint(tmp_path)
  assert list(loaded) == ["a.weight"]
  np.testing.assert_array_equal(loaded["a.weight"], values_OX * 0.25)
