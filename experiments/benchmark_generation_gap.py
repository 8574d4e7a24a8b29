"""How far the log-probabilities of the engine and of the trainer are apart."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import weights
from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from dsv32_jax.model import transformer
from dsv32_jax.rl import logprobs

# L layers, B batch, T tokens, N selected keys, A experts a token

# Tokens drawn for each prompt.
DRAWN = 64
# A random head leaves a nearly even distribution, which hides differences of
# logits. This much larger, a token has the few nats of a language model's.
HEAD_SCALE = 8.0


def measure(row, path) -> dict:
  """Compares a rollout's log-probabilities with those that a learner finds.

  Args:
    row: mapping with `variant`, the type of weights and activations, `batch`
      and `length`, the tokens of a prompt.
    path: Hugging Face folder.

  Returns:
    `mean` and `largest` absolute difference in nats with routing and selection
    replayed, as a learner does, the same with `_free` where it chooses anew,
    `kl` and `kl_free` (mean of r - 1 - log r), `entropy` of the policy and the
    number of `tokens`.
  """
  model = weights.load_hf(path, dtype=jnp.dtype(row["variant"]))
  model.head.kernel[...] *= HEAD_SCALE
  return compare(model, row["batch"], row["length"], DRAWN)


def compare(model, batch: int, length: int, drawn: int) -> dict:
  """As `measure`, for a model, `batch` random prompts and `drawn` tokens."""
  done = _rollout(model, batch, length, drawn)
  ids_BT = np.asarray([[*one.prompt_ids, *one.token_ids] for one in done])
  engine_BT = np.asarray([one.logprobs for one in done])
  replay = transformer.Replay(
    np.stack([one.selection_LNS for one in done], axis=1),
    np.stack([one.experts_LNA for one in done], axis=1).astype(np.int32),
  )
  found = {"tokens": engine_BT.size}
  for suffix, given in (("", replay), ("_free", transformer.Replay())):
    logp_BT, entropy_BT = _trainer(model, ids_BT, given, drawn)
    difference_BT = logp_BT - engine_BT
    found |= {
      f"mean{suffix}": float(np.mean(np.abs(difference_BT))),
      f"largest{suffix}": float(np.max(np.abs(difference_BT))),
      f"kl{suffix}": float(np.mean(np.expm1(difference_BT) - difference_BT)),
      "entropy": float(np.mean(entropy_BT)),
    }
  return found


def _rollout(model, batch, length, drawn):
  page_size = 64
  pages = -(-(length + drawn) // page_size)
  config = engine_lib.EngineConfig(
    max_batch=batch, num_pages=batch * pages, max_length=pages * page_size
  )
  generator = np.random.default_rng(0)
  return engine_lib.Engine(model, config).generate(
    [
      requests.Request(
        prompt_ids=generator.integers(2, model.config.vocab_size, length),
        sampling=requests.SamplingParameters(max_tokens=drawn, seed=seed),
        want_routing=True,
        want_selection=True,
      )
      for seed in range(batch)
    ]
  )


def _trainer(model, ids_BT, replay, drawn):
  """Log-probabilities and entropies of the last `drawn` tokens, float64."""
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, tokens_BT, targets_BT, replay):
    model = nnx.merge(graph, state)
    output = model(tokens_BT, replay=replay, with_logits=False)
    return logprobs.token_logprobs(
      output.hidden[:, -drawn:], model.head.kernel[...], targets_BT
    )

  found = run(
    state,
    jnp.asarray(ids_BT[:, :-1], jnp.int32),
    jnp.asarray(ids_BT[:, -drawn:], jnp.int32),
    replay,
  )
  return tuple(np.asarray(part, np.float64) for part in found)
