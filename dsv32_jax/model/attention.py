"""How a layer attends: to which keys, in which form, on which device.

Paper section 2.1 and appendix A; the forms themselves are in forms.py.
"""

import dataclasses

from jax import ad_checkpoint
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.model import cost_rule
from dsv32_jax.model import forms
from dsv32_jax.model import indexer as indexer_lib
from dsv32_jax.model import selection as selection_lib
from dsv32_jax.model import token_order

# B batch, T queries, S keys, N selected keys, W words of 32 keys, H heads,
# V value width, I index heads, K index width, X any other axes

KERNELS = ("xla", "gpu", "tpu", "tpu_interpret")
# Logical axes of what has one row a query.
ROWS = ("batch", "queries", None)
# By which the expansions of latents to keys and values are stored.
UP_AXES = ("latent", "heads", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
  """How the attention of a forward runs; hashable, static under jit.

  Attributes:
    select: which keys a query attends to.
    form: a name in forms.FORMS, or None for the cost rule.
    indexer_loss: also return the indexer's KL to the attention over the same
      keys (paper equations 3 and 4).
    index_quantized: emulate the official 8-bit index scores.
    kernels: implementation of the operations, a name that their fronts in
      `pallas_kernels` know, or None for what the device runs best.
  """

  select: selection_lib.Selector
  form: str | None = None
  indexer_loss: bool = False
  index_quantized: bool = False
  kernels: str | None = None

  def __post_init__(self):
    if self.form is not None and self.form not in forms.FORMS:
      raise ValueError(
        f"form={self.form!r} is not one of {sorted(forms.FORMS)}"
      )
    if self.form == "gathered" and self.select == selection_lib.DENSE:
      raise ValueError("form='gathered' needs a selection, select is Dense()")
    if self.kernels not in (None, *KERNELS):
      raise ValueError(f"kernels={self.kernels!r} is not one of {KERNELS}")


@dataclasses.dataclass(frozen=True)
class KeyLayout:
  """How latents and index keys lie before each device has all of a row's.

  Attributes:
    split: whether as their tokens do, along the row. They are then gathered on
      the device, and their gradient goes back by a reduce-scatter: asked for
      whole, it would be reduced in full on every device.
    order: TokenOrder that they lie in, or None for their own.
  """

  split: bool = False
  order: token_order.TokenOrder | None = None

  @property
  def axes(self):
    """Logical axes of a [B,S,X] array, for `sharding.shard_call`."""
    whole = ("batch", None, None)
    if not self.split:
      return whole
    return sharding.Gathered(("batch", "length", None), whole)

  def in_order(self, key_BSX):
    """Puts a device's whole rows into the order of their tokens."""
    if self.order is None:
      return key_BSX
    return self.order.restore_whole(key_BSX)


WHOLE = KeyLayout()


def select(
  options,
  form,
  index,
  index_key_BSK,
  sight,
  *,
  layer,
  replay,
  layout: KeyLayout = WHOLE,
):
  """Chooses each query's keys, on each device for its own queries.

  Args:
    options: holds the selector.
    form: name of the attention form: `gathered` wants indices, others a mask.
    index: IndexInputs of the queries.
    index_key_BSK: every index key.
    sight: visibility of the queries.
    layer: int32 scalar, the layer's number.
    replay: a recorded selection to use instead, or None.
    layout: of the index keys.

  Returns:
    A Selection, or None where every visible key is selected.
  """
  want_indices = form == "gathered"
  kernels = cost_rule.choose_kernels(
    options, sight.slots_BT.shape[1], index.query_BTIK.dtype
  )
  if replay is not None:
    wanted = options.select.k if want_indices else None

    def convert(replay):
      return (
        selection_lib.from_replay(
          replay,
          num_keys=index_key_BSK.shape[1],
          want_indices=wanted,
          kernels=kernels,
        ),
      )

    (keys,) = sharding.shard_call(convert, (replay,), (ROWS,), (ROWS,))
    invalid_BT = None
  elif options.select == selection_lib.DENSE:
    return None
  else:
    keys, invalid_BT = _choose(
      options, want_indices, kernels, index, index_key_BSK, sight, layer, layout
    )
  keys = ad_checkpoint.checkpoint_name(keys, "selection")
  if want_indices:
    return selection_lib.Selection(None, keys, invalid_BT)
  return selection_lib.Selection(keys, None, invalid_BT)


def _choose(
  options, want_indices, kernels, index, index_key_BSK, sight, layer, layout
):
  """Runs the selector: keys, words or indices, and invalid_BT."""

  def choose(query, weight, slots, query_segments, key, key_segments, layer):
    chosen = options.select(
      indexer_lib.IndexInputs(query, None, weight),
      layout.in_order(key),
      selection_lib.Visibility(slots, query_segments, key_segments),
      layer=layer,
      want_indices=want_indices,
      kernels=kernels,
    )
    keys = chosen.indices_BTN if want_indices else chosen.mask_BTW
    return keys, chosen.invalid_BT

  return sharding.shard_call(
    choose,
    (
      index.query_BTIK,
      index.weight_BTI,
      sight.slots_BT,
      sight.query_segments_BT,
      index_key_BSK,
      sight.key_segments_BS,
      layer,
    ),
    (
      ("batch", "queries", None, None),
      ROWS,
      ("batch", "queries"),
      ("batch", "queries"),
      layout.axes,
      ("batch", None),
      (),
    ),
    (ROWS, ("batch", "queries")),
  )


def attend(
  options,
  form,
  projected,
  chosen,
  sight,
  index,
  index_key,
  *,
  scale,
  layout: KeyLayout = WHOLE,
):
  """Runs a form, on each device for its own queries and all heads of them.

  Keeping a query's heads together trades heads for queries by an all-to-all
  where `tensor` splits the heads, and lets the KL sum over heads in place.

  Returns:
    values_BTHV, and kl_BT float32 where options.indexer_loss, else None.
  """
  keys = None
  if chosen is not None:
    gathers = form == "gathered"
    keys = chosen.indices_BTN if gathers else chosen.mask_BTW
  loss = options.indexer_loss
  kernels = cost_rule.choose_kernels(
    options, sight.slots_BT.shape[1], projected.latent_BSC.dtype
  )

  # Gathered as one, as in `layers.products`.
  ups = projected.key_up_CHN, projected.value_up_CHV
  if sharding.num_shards(UP_AXES[0]) > 1:
    ups = jnp.concatenate(ups, axis=-1), None
  nope = projected.key_up_CHN.shape[-1]

  def run(*args):
    ups = args[4:6]
    if ups[1] is None:
      ups = ups[0][..., :nope], ups[0][..., nope:]
    projected = forms.Projected(*args[:4], *ups)
    projected = projected._replace(
      latent_BSC=layout.in_order(projected.latent_BSC),
      key_rope_BSR=layout.in_order(projected.key_rope_BSR),
    )
    keys, slots, query_segments, key_segments = args[6:10]
    chosen = keys
    if keys is not None:
      chosen = selection_lib.Selection(keys, keys, None)
    sight = selection_lib.Visibility(slots, query_segments, key_segments)
    index = index_key_BSK = None
    if loss:
      index = indexer_lib.IndexInputs(args[10], None, args[11])
      index_key_BSK = layout.in_order(args[12])
    values_BTHV, kl_BT = forms.FORMS[form](
      projected,
      chosen,
      sight,
      index,
      index_key_BSK,
      scale=scale,
      kernels=kernels,
    )
    return (values_BTHV, kl_BT) if loss else (values_BTHV,)

  per_query, per_head = ("batch", "queries"), ("batch", "queries", None, None)
  per_key = layout.axes
  whole = sharding.Gathered(UP_AXES, (None, None, None))
  results = sharding.shard_call(
    run,
    (
      *(*projected[:4], *ups),
      keys,
      *sight,
      index.query_BTIK if loss else None,
      index.weight_BTI if loss else None,
      index_key if loss else None,
    ),
    (
      *(per_head, per_head, per_key, per_key, whole, whole),
      *((*per_query, None), per_query, per_query, ("batch", None)),
      *(per_head, (*per_query, None), per_key),
    ),
    (per_head, per_query)[: 2 if loss else 1],
  )
  return results[0], results[1] if loss else None
