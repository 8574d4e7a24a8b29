"""The oracle's tiny checkpoint with two matrices in block-scaled float8."""

import ml_dtypes
import numpy as np

from tests.support import oracle_checkpoint

# One block, and one that is partial.
NAMES = (
  "model.layers.0.mlp.down_proj.weight",
  "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
)
QUANTIZATION = {
  "quant_method": "fp8",
  "fmt": "e4m3",
  "activation_scheme": "dynamic",
  "weight_block_size": [128, 128],
}


def quantised(tensors):
  """Returns the tensors with NAMES in float8 and their scales added."""
  changed = dict(tensors)
  for name in NAMES:
    scale = np.full((1, 1), 2.0**-7, np.float32)
    scaled = np.clip(tensors[name].astype(np.float32) / scale, -448, 448)
    changed[name] = scaled.astype(ml_dtypes.float8_e4m3fn)
    changed[name + "_scale_inv"] = scale
  return changed


def dtype_of(name):
  """Safetensors dtype of each tensor."""
  return "F8_E4M3" if name in NAMES else oracle_checkpoint.stored_dtype(name)
