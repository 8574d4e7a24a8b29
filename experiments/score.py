"""Writes the logits a checkpoint gives for token ids.

python -m experiments.score --hf_checkpoint=DIR --token_ids=IDS.npy \
  --output=OUT.npz

The output holds `logits` [B,S,V] float32; with --prefill_length also
`decode_logits` through the cache; with --capture every array that
dsv32_jax/evals/captures.py names; with --mtp `mtp_logits_postnorm`.
"""

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dsv32_jax import weights
from dsv32_jax.evals import captures
from dsv32_jax.evals import scoring
from dsv32_jax.training import model_checkpoint
from experiments import common

_HF = flags.DEFINE_string("hf_checkpoint", None, "Hugging Face folder.")
_ORBAX = flags.DEFINE_string("checkpoint", None, "Orbax checkpoint folder.")
_TOKENS = flags.DEFINE_string("token_ids", None, "int [B,S] in a .npy file.")
_OUTPUT = flags.DEFINE_string("output", None, ".npz file to write.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Type of weights and compute."
)
_INDEXER = flags.DEFINE_enum(
  "indexer_precision",
  "model",
  ["model", "fp8"],
  "Index scores in --dtype, or as the official 8-bit kernel gives them.",
)
_PREFILL = flags.DEFINE_integer(
  "prefill_length", None, "Also prefill so many tokens and decode the rest."
)
_CAPTURE = flags.DEFINE_bool("capture", False, "Also write intermediates.")
_MTP = flags.DEFINE_bool("mtp", False, "Also write the MTP module's logits.")


def load_model(dtype):
  """Loads the checkpoint that the flags name."""
  if (_HF.value is None) == (_ORBAX.value is None):
    raise ValueError("give one of --hf_checkpoint and --checkpoint")
  if _HF.value is not None:
    return weights.load_hf(_HF.value, dtype=dtype)
  return model_checkpoint.load_model(_ORBAX.value, dtype=dtype)


def read_token_ids(path: str, vocab_size: int) -> np.ndarray:
  """Reads and checks --token_ids."""
  try:
    token_ids = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise ValueError(f"--token_ids={path}: {error}") from error
  if not isinstance(token_ids, np.ndarray):
    raise ValueError(f"--token_ids={path} is an archive, want one array")
  try:
    return scoring.check_token_ids(token_ids, vocab_size)
  except ValueError as error:
    raise ValueError(f"--token_ids={path}: {error}") from error


def main(argv):
  del argv
  for flag in (_TOKENS, _OUTPUT):
    if flag.value is None:
      raise ValueError(f"--{flag.name} is missing")
  model = load_model(jnp.dtype(_DTYPE.value))
  token_ids = read_token_ids(_TOKENS.value, model.config.vocab_size)
  if _MTP.value and model.mtp is None:
    raise ValueError("--mtp: the checkpoint has no MTP module")
  options = captures.options_with(
    model, index_quantized=_INDEXER.value == "fp8"
  )
  # The CPU computes float32 as such; an accelerator needs to be told.
  with jax.default_matmul_precision("highest"):
    arrays = scoring.score(
      model, token_ids, options, capture=_CAPTURE.value, mtp=_MTP.value
    )
    if _PREFILL.value is not None:
      arrays |= scoring.score_by_decoding(
        model,
        token_ids,
        _PREFILL.value,
        options,
        capture=_CAPTURE.value,
        progress=lambda steps: tqdm.tqdm(steps, desc="decode", unit="token"),
      )
      arrays["decode_prefill_len"] = np.int64(_PREFILL.value)
  arrays["input_ids"] = token_ids
  common.write_npz(_OUTPUT.value, arrays)
  print(f"{_OUTPUT.value}: {', '.join(sorted(arrays))}")


if __name__ == "__main__":
  common.run(main)
