"""That both sides of the benchmark compute the same, before they are timed."""

from flax import nnx
import jax.numpy as jnp
import numpy as np

from dsv32_jax import weights
from dsv32_jax.evals import agreement
from dsv32_jax.evals import replaying
from dsv32_jax.model import presets
from dsv32_jax.model import transformer
from experiments import transformers_peer

# L layers, B batch, T tokens, V vocabulary

TOLERANCE = 1e-4


def make_inputs(workdir, num_tokens: int) -> None:
  """Writes the random checkpoint and the tokens, unless they are there."""
  if not (workdir / "checkpoint").exists():
    config = presets.benchmark_65m()
    model = transformer.Transformer(config, rngs=nnx.Rngs(0))
    weights.save_hf(model, workdir / "checkpoint", dtype=jnp.float32)
  if not (workdir / "tokens.npy").exists():
    vocab_size = presets.benchmark_65m().vocab_size
    tokens = np.random.default_rng(0).integers(2, vocab_size, (1, num_tokens))
    np.save(workdir / "tokens.npy", tokens)


def measure(row, path, token_ids: np.ndarray) -> dict:
  """Compares one forward of both sides.

  Returns:
    `error`: largest difference of logits over the largest logit; `rows` of
    all layers; `rows_that_differ`: whose selections differ by a tie, for
    which transformers' were replayed.

  Raises:
    ValueError: selections disagree, or the error exceeds 1e-4.
  """
  tokens_BT = token_ids[:, : row["length"]].astype(np.int32)
  peer = transformers_peer.load(path)
  logits_BTV, mask_LBTT = transformers_peer.forward(peer, tokens_BT)
  del peer
  model = weights.load_hf(path)
  forward = replaying.replaying_forward(model)
  got = forward(tokens_BT)
  if not np.array_equal(got.selected_LBTT, mask_LBTT):
    got = forward(tokens_BT, mask_LBTT)
  found = agreement.selections_agree(
    *(got.scores_LBTT, got.selected_LBTT, mask_LBTT),
    model.config.index_top_k,
  )
  error = np.abs(got.logits_BTV - logits_BTV).max() / np.abs(logits_BTV).max()
  disagree = int(found.disagrees_X.sum())
  if disagree or not error <= TOLERANCE:
    raise ValueError(f"{path}: {disagree=} selections, logits {error=}")
  return {
    "error": float(error),
    "rows": found.differs_X.size,
    "rows_that_differ": int(found.differs_X.sum()),
  }
