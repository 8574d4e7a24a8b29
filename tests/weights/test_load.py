"""Loading Hugging Face checkpoints: the right numbers, or one clear line."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax import weights
from tests.support import fp8_checkpoint
from tests.support import oracle_checkpoint
from tests.support import oracle_ops

CONFIG = oracle_checkpoint.tiny_config()
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tensors():
  return oracle_checkpoint.random_checkpoint(CONFIG, 0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, tensors):
  path = tmp_path_factory.mktemp("checkpoint") / "hf"
  oracle_checkpoint.save_checkpoint(path, CONFIG, tensors)
  return path, weights.load_hf(path)


def state_of(model):
  return {
    ".".join(map(str, path)): variable.get_value()
    for path, variable in nnx.to_flat_state(nnx.state(model))
  }


def assert_same(model, other):
  ours, theirs = state_of(model), state_of(other)
  assert ours.keys() == theirs.keys()
  for name, array in ours.items():
    assert array.dtype == theirs[name].dtype, name
    assert np.asarray(array).tobytes() == np.asarray(theirs[name]).tobytes()


def without_mtp(tensors):
  return {
    k: v for k, v in tensors.items() if not k.startswith("model.layers.3.")
  }


def without_indexer(tensors):
  return {k: v for k, v in tensors.items() if ".indexer." not in k}


def test_matrices_act_as_in_the_checkpoint(loaded, tensors):
  """W x for each kind of matrix, heads and parts as reference.md has them."""
  state = state_of(loaded[1])
  rng = np.random.default_rng(1)

  def hf(name, layer=2):
    return tensors[f"model.layers.{layer}.{name}.weight"]

  def ours(name, layer=2):
    stack = "dense_layers." if layer == 0 else "moe_layers."
    place = 0 if layer == 0 else layer - 1
    return np.asarray(state[stack + name][place], np.float64)

  def check(name, want, *operands):
    got = np.einsum(name, *operands)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)

  x_D, u_U = rng.standard_normal(40), rng.standard_normal(28)
  c_C, o_HV = rng.standard_normal(20), rng.standard_normal((3, 10))
  a = "attention."
  check("D,DU->U", hf("self_attn.q_a_proj") @ x_D, x_D, ours(a + "query_down"))
  q_HQ = (hf("self_attn.q_b_proj") @ u_U).reshape(3, 20)
  check("U,UHQ->HQ", q_HQ, u_U, ours(a + "query_up"))
  latent = hf("self_attn.kv_a_proj_with_mqa") @ x_D
  check("D,DC->C", latent, x_D, ours(a + "latent_down"))
  kv_HX = (hf("self_attn.kv_b_proj") @ c_C).reshape(3, 22)
  check("C,CHN->HN", kv_HX[:, :12], c_C, ours(a + "key_up"))
  check("C,CHV->HV", kv_HX[:, 12:], c_C, ours(a + "value_up"))
  out_D = hf("self_attn.o_proj") @ o_HV.reshape(-1)
  check("HV,HVD->D", out_D, o_HV, ours(a + "output"))
  q_IK = (hf("self_attn.indexer.wq_b") @ u_U).reshape(8, 16)
  check("U,UIK->IK", q_IK, u_U, ours(a + "indexer.query"))
  k_K = hf("self_attn.indexer.wk") @ x_D
  check("D,DK->K", k_K, x_D, ours(a + "indexer.key"))
  w_I = hf("self_attn.indexer.weights_proj") @ x_D
  check("D,DI->I", w_I, x_D, ours(a + "indexer.weight"))
  check("D,DE->E", hf("mlp.gate") @ x_D, x_D, ours("ffn.router"))
  f_F = rng.standard_normal(24)
  for expert in (0, 7):
    up = hf(f"mlp.experts.{expert}.up_proj") @ x_D
    check("D,DF->F", up, x_D, ours("ffn.up")[expert])
    down = hf(f"mlp.experts.{expert}.down_proj") @ f_F
    check("F,FD->D", down, f_F, ours("ffn.down")[expert])
  shared = hf("mlp.shared_experts.gate_proj") @ x_D
  check("D,DF->F", shared, x_D, ours("ffn.shared.gate"))
  dense = hf("mlp.gate_proj", layer=0) @ x_D
  check("D,DF->F", dense, x_D, ours("ffn.gate", layer=0))
  joined = rng.standard_normal(80)
  eh = tensors["model.layers.3.eh_proj.weight"] @ joined
  check("X,XD->D", eh, joined, np.asarray(state["mtp.projection"], np.float64))
  logits = tensors["lm_head.weight"] @ x_D
  check("D,DV->V", logits, x_D, np.asarray(state["head.kernel"], np.float64))


def test_vectors_and_embedding(loaded, tensors):
  state = state_of(loaded[1])
  pairs = {
    "embed.table": EMBED,
    "final_norm.scale": "model.norm.weight",
    "mtp.embedding_norm.scale": "model.layers.3.enorm.weight",
    "mtp.hidden_norm.scale": "model.layers.3.hnorm.weight",
    "mtp.final_norm.scale": "model.layers.3.shared_head.norm.weight",
    "mtp.block.ffn.expert_bias": (
      "model.layers.3.mlp.gate.e_score_correction_bias"
    ),
  }
  layer_pairs = {
    "attention_norm.scale": "input_layernorm.weight",
    "ffn_norm.scale": "post_attention_layernorm.weight",
    "attention.query_norm.scale": "self_attn.q_a_layernorm.weight",
    "attention.latent_norm.scale": "self_attn.kv_a_layernorm.weight",
    "attention.indexer.key_norm.scale": "self_attn.indexer.k_norm.weight",
    "attention.indexer.key_norm.bias": "self_attn.indexer.k_norm.bias",
    "ffn.expert_bias": "mlp.gate.e_score_correction_bias",
  }
  for ours, theirs in pairs.items():
    np.testing.assert_array_equal(state[ours], tensors[theirs], ours)
  for ours, theirs in layer_pairs.items():
    for layer in (1, 2):
      np.testing.assert_array_equal(
        state["moe_layers." + ours][layer - 1],
        tensors[f"model.layers.{layer}.{theirs}"].astype(np.float32),
        ours,
      )


def test_bfloat16_keeps_float32_where_it_decides(loaded):
  model = weights.load_hf(loaded[0], dtype=jnp.bfloat16)
  for name, array in state_of(model).items():
    is_float32 = "key_norm" in name or "expert_bias" in name
    assert array.dtype == (jnp.float32 if is_float32 else jnp.bfloat16), name


def assert_on_mesh(path, axes, want):
  mesh = sharding.make_mesh(sharding.MeshConfig(**axes))
  model = weights.load_hf(path, mesh=mesh)
  assert_same(model, want)
  state = nnx.state(model)
  layouts = jax.tree.leaves(sharding.parameter_shardings(state, mesh))
  assert [array.sharding for array in jax.tree.leaves(state)] == layouts
  assert any(not array.is_fully_replicated for array in jax.tree.leaves(state))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
  """One dense and one MoE layer; an odd number of heads stays whole."""
  config = CONFIG | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
  path = tmp_path_factory.mktemp("shallow")
  tensors = oracle_checkpoint.random_checkpoint(config, 1)
  oracle_checkpoint.save_checkpoint(path, config, tensors)
  return path, weights.load_hf(path)


@pytest.mark.parametrize(
  "axes",
  [
    {"fsdp": 8},
    {"expert": 4, "tensor": 2},
    {"data": 2, "expert": 2, "context": 2},
  ],
)
def test_mesh(shallow, axes):
  assert_on_mesh(shallow[0], axes, shallow[1])


def test_mesh_with_stacked_layers(loaded):
  axes = {"fsdp": 2, "expert": 2, "tensor": 2}
  assert_on_mesh(loaded[0], axes, loaded[1])


def test_is_an_argument_of_jit(shallow):
  token_ids = np.arange(4, dtype=np.int32)[None]
  logits = jax.jit(lambda model, ids: model(ids).logits)(shallow[1], token_ids)
  assert logits.shape == (1, 4, 61)
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize("claimed", [0, 1, 3])
def test_mtp_layers_are_there_or_not_whatever_the_config_says(
  tmp_path, tensors, loaded, claimed
):
  config = CONFIG | {"num_nextn_predict_layers": claimed}
  oracle_checkpoint.save_checkpoint(tmp_path / "with", config, tensors)
  config_of, abstract = weights.abstract_hf(tmp_path / "with")
  assert config_of == loaded[1].config
  assert abstract.mtp is not None
  bare = without_mtp(tensors)
  oracle_checkpoint.save_checkpoint(tmp_path / "without", config, bare)
  assert weights.abstract_hf(tmp_path / "without")[0].num_mtp_layers == 0


def test_dense_v3_gets_a_fresh_indexer(tmp_path, tensors, loaded):
  config = CONFIG | {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
  }
  bare = without_indexer(tensors)
  oracle_checkpoint.save_checkpoint(tmp_path, config, bare)
  model = weights.load_hf(tmp_path)
  fresh, kept = state_of(model), state_of(loaded[1])
  other = state_of(weights.load_hf(tmp_path, indexer_seed=1))
  for name, array in fresh.items():
    if ".indexer." not in name:
      np.testing.assert_array_equal(array, kept[name])
    elif "key_norm" in name:
      np.testing.assert_array_equal(array, float(name.endswith("scale")))
    else:
      assert not np.array_equal(array, other[name]), name
      assert 0.8 < np.std(array) / 0.02 < 1.2, name
      if name.startswith("moe_layers"):
        assert not np.array_equal(array[0], array[1])
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2), jax.devices()[:2])
  assert_same(model, weights.load_hf(tmp_path, mesh=mesh))


def test_inv_freq_is_ignored(tmp_path, tensors, loaded):
  extra = {
    f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(4)
    for layer in range(3)
  }
  oracle_checkpoint.save_checkpoint(tmp_path, CONFIG, tensors | extra)
  assert_same(weights.load_hf(tmp_path), loaded[1])


def test_fp8(tmp_path, tensors, loaded):
  changed = fp8_checkpoint.quantised(tensors)
  oracle_checkpoint.save_checkpoint(
    tmp_path,
    CONFIG | {"quantization_config": fp8_checkpoint.QUANTIZATION},
    changed,
    fp8_checkpoint.dtype_of,
  )
  model = weights.load_hf(tmp_path)
  want = oracle_ops.dequantise_weight(
    changed[fp8_checkpoint.NAMES[0]],
    changed[fp8_checkpoint.NAMES[0] + "_scale_inv"],
  )
  np.testing.assert_array_equal(model.dense_layers.ffn.down[0], want.T)
  exact = state_of(weights.load_hf(tmp_path, dtype=jnp.bfloat16))
  np.testing.assert_array_equal(
    np.asarray(exact["dense_layers.ffn.down"][0], np.float32), want.T
  )
