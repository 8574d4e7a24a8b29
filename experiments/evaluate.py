"""Held-out loss and next-token accuracy of a checkpoint.

python -m experiments.evaluate --config=configs/evaluate.py \
  --checkpoint=DIR/checkpoints --workdir=DIR2

Writes evaluation.json and metrics.jsonl into the workdir. Where the model fits
one device it is put on all of them; where it does not, lay it over a mesh:
--config.spread=mesh --config.mesh.fsdp=4 --config.mesh.expert=2
"""

import json
import os

from absl import flags
import jax
import jax.numpy as jnp

from dsv32_jax import config_files
from dsv32_jax import weights
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.evals import evaluate
from dsv32_jax.training import metrics
from dsv32_jax.training import model_checkpoint
from experiments import common

common.define_common_flags()
_HF = flags.DEFINE_string("hf_checkpoint", None, "Hugging Face folder.")
_ORBAX = flags.DEFINE_string("checkpoint", None, "Orbax checkpoint folder.")


def load_model(config: evaluate.EvaluateConfig, mesh):
  """Loads the checkpoint that the flags name."""
  if (_HF.value is None) == (_ORBAX.value is None):
    raise ValueError("give one of --hf_checkpoint and --checkpoint")
  dtype = jnp.dtype(config.dtype)
  if _HF.value is not None:
    return weights.load_hf(_HF.value, dtype=dtype, mesh=mesh)
  return model_checkpoint.load_model(_ORBAX.value, dtype=dtype, mesh=mesh)


def load_tokenizer(config: evaluate.EvaluateConfig):
  """Loads the configured tokenizer, or the one that lies by the checkpoint."""
  path = config.data.tokenizer.path
  if path is None:
    folder = _HF.value or os.path.dirname(os.path.abspath(_ORBAX.value))
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
      raise ValueError(
        f"{path} does not exist: set --config.data.tokenizer.path"
      )
  return tokenizer_lib.load(path)


def main(argv):
  del argv
  config = config_files.build(evaluate.EvaluateConfig, flags.FLAGS.config)
  workdir = common.require_workdir()
  mesh = config.make_mesh()
  model = load_model(config, mesh)
  # The CPU computes float32 as such; an accelerator needs to be told.
  with jax.default_matmul_precision(
    "highest" if config.dtype == "float32" else "default"
  ):
    found = evaluate.evaluate(config, model, load_tokenizer(config), mesh)
  with metrics.MetricsWriter(workdir) as writer:
    for name, values in found.items():
      writer.write(0, values, name)
  path = workdir / "evaluation.json"
  result = {
    "checkpoint": _HF.value or _ORBAX.value,
    "devices": jax.device_count(),
    "spread": config.spread,
    "sequence_length": config.data.sequence_length,
    "top_k": config.top_k or model.config.index_top_k,
    "results": found,
  }
  path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
  for name, values in found.items():
    print(
      f"{name}: {values['loss']:.4f} nats a token,"
      f" accuracy {values['accuracy']:.2%}, {values['tokens']} tokens"
    )
  print(path)


if __name__ == "__main__":
  common.run(main)
