"""Hugging Face checkpoints that are refused, each with one clear line."""

import numpy as np
import pytest

from dsv32_jax import weights
from tests.support import fp8_checkpoint
from tests.support import oracle_checkpoint

CONFIG = oracle_checkpoint.tiny_config()
FP8 = {"quantization_config": fp8_checkpoint.QUANTIZATION}
EMBED = "model.embed_tokens.weight"
DOWN = fp8_checkpoint.NAMES[0]


@pytest.fixture(scope="module")
def tensors():
  return oracle_checkpoint.random_checkpoint(CONFIG, 0)


def without_indexer(tensors):
  return {k: v for k, v in tensors.items() if ".indexer." not in k}


def drop(name):
  return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def put(**changes):
  return lambda tensors: tensors | changes


MTP_HEAD = "model.layers.3.shared_head.head.weight"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (drop(EMBED), f"'{EMBED}' is missing"),
    (
      drop("model.layers.2.mlp.experts.5.up_proj.weight"),
      r"5.up_proj.*missing",
    ),
    (drop("model.layers.1.self_attn.indexer.wk.weight"), r"wk.weight' is miss"),
    (drop(MTP_HEAD), f"'{MTP_HEAD}' is missing"),
    (drop("model.layers.3.self_attn.indexer.k_norm.bias"), r"k_norm.bias' is"),
    (without_indexer, r"indexer.wq_b.weight' is missing"),
    (put(extra=np.ones(3)), "unexpected tensor 'extra'"),
    (
      put(**{"model.layers.1.mlp.gate_proj.weight": np.ones((2, 2))}),
      r"unexpected tensor 'model.layers.1.mlp.gate_proj",
    ),
    (
      put(**{"model.layers.2.mlp.experts.12.up_proj.weight": np.ones(3)}),
      r"unexpected tensor .*experts.12",
    ),
    (
      put(**{"model.layers.4.input_layernorm.weight": np.ones(40)}),
      "model.layers.4.*only one layer may follow",
    ),
    (put(**{DOWN + "_scale_inv": np.ones((1, 1))}), "unexpected .*_scale_inv"),
    (put(**{DOWN: np.ones((56, 40))}), rf"'{DOWN}' has shape \[56, 40\]"),
    (put(**{EMBED: np.ones(61)}), rf"'{EMBED}' has shape \[61\]"),
    (put(**{MTP_HEAD: np.zeros((61, 40))}), f"'{MTP_HEAD}' differs from"),
  ],
)
def test_refused(tmp_path, tensors, change, message):
  oracle_checkpoint.save_checkpoint(tmp_path, CONFIG, change(tensors))
  with pytest.raises(ValueError, match=message) as caught:
    weights.load_hf(tmp_path)
  assert str(tmp_path) in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("config", "scale", "message"),
  [
    ({}, 1.0, r"F8_E4M3 and .*config.json has no quantization_config"),
    (FP8, None, "_scale_inv' is missing"),
    (FP8, np.nan, "_scale_inv' has a scale"),
    (FP8, 0.0, "_scale_inv' has a scale"),
    (FP8, np.ones((1, 2)), "_scale_inv' is F32"),
  ],
)
def test_fp8_refused(tmp_path, tensors, config, scale, message):
  changed = fp8_checkpoint.quantised(tensors)
  if scale is None:
    del changed[DOWN + "_scale_inv"]
  else:
    shape = np.shape(scale) or (1, 1)
    changed[DOWN + "_scale_inv"] = np.broadcast_to(scale, shape)
  oracle_checkpoint.save_checkpoint(
    tmp_path, CONFIG | config, changed, fp8_checkpoint.dtype_of
  )
  with pytest.raises(ValueError, match=message):
    weights.load_hf(tmp_path)


def test_wrong_types(tmp_path, tensors):
  def embed_in_fp8(name):
    return "F8_E4M3" if name == EMBED else oracle_checkpoint.stored_dtype(name)

  config = CONFIG | FP8
  oracle_checkpoint.save_checkpoint(tmp_path, config, tensors, embed_in_fp8)
  with pytest.raises(ValueError, match=rf"'{EMBED}' is F8_E4M3, not one of"):
    weights.load_hf(tmp_path)
  # The same bytes as another two-byte type.
  oracle_checkpoint.save_checkpoint(tmp_path, CONFIG, tensors)
  file = tmp_path / "model.safetensors"
  renamed = file.read_bytes().replace(b'"dtype": "BF16"', b'"dtype":  "F16"')
  file.write_bytes(renamed)
  with pytest.raises(ValueError, match=r"is F16, not one of \['BF16', 'F32'\]"):
    weights.load_hf(tmp_path)
