"""Writing checkpoints: bit-equal where nothing is rounded, or not at all."""

import json
import os

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax import weights
from dsv32_jax.model import config as config_lib
from dsv32_jax.weights import folder
from dsv32_jax.weights import names
from tests.support import random_model

# More than one 128 x 128 block in places, partial ones, and odd sizes.
CONFIG = config_lib.ModelConfig(
  vocab_size=37,
  width=136,
  num_layers=3,
  num_dense_layers=1,
  ffn_width=130,
  expert_width=24,
  num_heads=3,
  query_latent_width=28,
  latent_width=20,
  nope_width=50,
  rope_width=8,
  value_width=10,
  num_experts=4,
  experts_per_token=2,
  num_expert_groups=2,
  expert_groups_kept=1,
  index_heads=2,
  index_width=16,
  index_top_k=6,
  rope=config_lib.RopeConfig(factor=4.0, original_length=32),
  max_length=128,
  num_mtp_layers=1,
)


@pytest.fixture(scope="module")
def model():
  return random_model.random_model(CONFIG)


def leaves_of(model):
  return dict(nnx.to_flat_state(nnx.state(model)))


def assert_same(model, other):
  assert model.config == other.config
  ours, theirs = leaves_of(model), leaves_of(other)
  assert ours.keys() == theirs.keys()
  for path, variable in ours.items():
    want = np.asarray(theirs[path].get_value())
    got = np.asarray(variable.get_value())
    assert got.dtype == want.dtype, path
    assert got.tobytes() == want.tobytes(), path


def files_of(path):
  return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("max_shard_bytes", [None, 200_000])
def test_float32_round_trip(tmp_path, model, max_shard_bytes):
  target = tmp_path / "a" / "b"
  weights.save_hf(
    model, target, dtype=jnp.float32, max_shard_bytes=max_shard_bytes
  )
  again = weights.load_hf(target)
  assert_same(again, model)
  weights.save_hf(
    again, tmp_path / "c", dtype=jnp.float32, max_shard_bytes=max_shard_bytes
  )
  assert files_of(target) == files_of(tmp_path / "c")
  shards = [f for f in os.listdir(target) if f.endswith(".safetensors")]
  assert (len(shards) > 3) == (max_shard_bytes is not None)
  if max_shard_bytes:
    for shard in shards:
      size = os.path.getsize(target / shard)
      assert size <= max_shard_bytes + 10_000


def test_bfloat16_round_trip(tmp_path, model):
  weights.save_hf(model, tmp_path / "a")
  first = weights.load_hf(tmp_path / "a")
  weights.save_hf(first, tmp_path / "b")
  assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
  narrow = weights.load_hf(tmp_path / "a", dtype=jnp.bfloat16)
  weights.save_hf(narrow, tmp_path / "c")
  assert files_of(tmp_path / "a") == files_of(tmp_path / "c")
  entries = folder.open_tensors(tmp_path / "a")
  for name, entry in entries.items():
    is_float32 = "k_norm" in name or "e_score_correction_bias" in name
    assert entry.spec.dtype == ("F32" if is_float32 else "BF16"), name
  fields = json.loads((tmp_path / "a" / "config.json").read_text())
  assert fields["torch_dtype"] == "bfloat16"
  assert fields["num_nextn_predict_layers"] == 1
  assert "quantization_config" not in fields


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fp8_round_trip(tmp_path, model, dtype):
  weights.save_hf(model, tmp_path / "a", fp8=True)
  first = weights.load_hf(tmp_path / "a", dtype=dtype)
  weights.save_hf(first, tmp_path / "b", fp8=True)
  assert_same(weights.load_hf(tmp_path / "b", dtype=dtype), first)


def test_fp8_quantises_what_the_official_checkpoint_does(tmp_path, model):
  weights.save_hf(model, tmp_path, fp8=True)
  entries = folder.open_tensors(tmp_path)
  quantised = (
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    *("wq_b", "wk", "gate_proj", "up_proj", "down_proj"),
  )
  for name, entry in entries.items():
    if name.endswith("_scale_inv"):
      scale = entry.read()
      assert scale.dtype == np.float32
      assert (np.frexp(scale)[0] == 0.5).all(), "powers of two"
      weight = entries[name.removesuffix("_scale_inv")].spec
      assert scale.shape == tuple(-(-n // 128) for n in weight.shape)
      continue
    is_fp8 = name.split(".")[-2] in quantised
    assert (entry.spec.dtype == "F8_E4M3") == is_fp8, name
    assert (name + "_scale_inv" in entries) == is_fp8, name
  fields = json.loads((tmp_path / "config.json").read_text())
  assert fields["quantization_config"] == {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
  }


def test_sharded_parameters(tmp_path, model):
  weights.save_hf(model, tmp_path / "a")
  mesh = sharding.make_mesh(sharding.MeshConfig(expert=2), jax.devices()[:2])
  state = nnx.state(model)
  layouts = sharding.parameter_shardings(state, mesh)
  placed = jax.device_put(jax.tree.leaves(state), jax.tree.leaves(layouts))
  placed = jax.tree.unflatten(jax.tree.structure(state), placed)
  weights.save_hf(nnx.merge(nnx.graphdef(model), placed), tmp_path / "b")
  assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_no_mtp_and_no_dense_layer(tmp_path):
  model = random_model.random_model(
    config_lib.ModelConfig(
      **{field: getattr(CONFIG, field) for field in CONFIG.__dataclass_fields__}
      | {"num_mtp_layers": 0, "num_dense_layers": 0, "num_shared_experts": 0}
    )
  )
  weights.save_hf(model, tmp_path, dtype=jnp.float32)
  assert_same(weights.load_hf(tmp_path), model)


def test_every_parameter_is_in_the_table(model):
  slots = {}
  for row in names.tensors(CONFIG):
    for part in row.parts:
      slots.setdefault(part.path, []).append(
        np.prod(row.slot_shape(part), dtype=int)
      )
  assert {path: sum(sizes) for path, sizes in slots.items()} == {
    path: variable.size for path, variable in leaves_of(model).items()
  }


def test_refusals_leave_nothing(tmp_path, model):
  with pytest.raises(ValueError, match="must be bfloat16 or float32"):
    weights.save_hf(model, tmp_path / "x", dtype=jnp.float16)
  with pytest.raises(ValueError, match="unstacked model"):
    weights.save_hf(model.unstacked(), tmp_path / "x")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "kept").write_text("kept")
  with pytest.raises(ValueError, match="exists and is not empty"):
    weights.save_hf(model, tmp_path / "full")
  graph, state = nnx.split(model)
  broken = nnx.merge(graph, jax.tree.map(jnp.array, state))
  kernel = broken.moe_layers.ffn.shared.up
  kernel.set_value(kernel.get_value().at[1, 2, 3].set(jnp.nan))
  with pytest.raises(ValueError, match=r"layers.2.mlp.shared_experts.up_proj"):
    weights.save_hf(broken, tmp_path / "x", fp8=True)
  assert [p.name for p in tmp_path.iterdir()] == ["full"]
  assert [p.name for p in (tmp_path / "full").iterdir()] == ["kept"]
