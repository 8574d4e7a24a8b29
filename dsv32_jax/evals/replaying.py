"""A forward that can follow recorded selections and still says its own.

For comparisons with other code: where selections differ by ties, both sides
must attend to the same keys before anything downstream is compared.
"""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.evals import captures
from dsv32_jax.model import transformer
from pallas_kernels import bitmask
from pallas_kernels import index_select

# L layers, B batch, T tokens (queries and keys), W mask words, V vocabulary


class Forward(NamedTuple):
  """What a forward gives, as numpy arrays.

  Attributes:
    logits_BTV: float32.
    scores_LBTT: float32 index scores, -inf on keys after the query.
    selected_LBTT: bool, the keys each layer's indexer selects, whether they
      or replayed ones were attended to.
  """

  logits_BTV: np.ndarray
  scores_LBTT: np.ndarray
  selected_LBTT: np.ndarray


def replaying_forward(model: transformer.Transformer) -> Callable[..., Forward]:
  """Compiles a function of (tokens_BT, attended_LBTT=None) to a Forward.

  `attended_LBTT` is a bool mask of the keys to attend to in place of those
  that the indexer selects.
  """
  graph, state = nnx.split(model)
  top_k = model.config.index_top_k

  @jax.jit
  def run(state, tokens_BT, words_LBTW):
    output = nnx.merge(graph, state)(
      tokens_BT,
      replay=transformer.Replay(selection=words_LBTW),
      record=True,
      trace=True,
    )
    length = tokens_BT.shape[1]
    scores_LBTT, _ = captures.index_arrays(output, length)
    slots_BT = jnp.broadcast_to(jnp.arange(length), tokens_BT.shape)

    def select(index):
      chosen = index_select.index_select(
        *(index.query_BTIK, index.key_BTK, index.weight_BTI, slots_BT),
        top_k=top_k,
      )
      return bitmask.unpack(chosen.mask_BTW, length)

    parts = [part for part in (output.dense, output.moe) if part is not None]
    selected = [jax.lax.map(select, part.trace["index"]) for part in parts]
    return output.logits, scores_LBTT, jnp.concatenate(selected)

  def forward(tokens_BT, attended_LBTT=None) -> Forward:
    words_LBTW = None
    if attended_LBTT is not None:
      words_LBTW = jax.vmap(bitmask.pack)(jnp.asarray(attended_LBTT))
    found = run(state, jnp.asarray(tokens_BT), words_LBTW)
    return Forward(*(np.asarray(value) for value in found))

  return forward
