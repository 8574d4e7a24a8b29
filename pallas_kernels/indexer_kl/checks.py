"""What the fronts of the KL loss ask of their arrays."""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# G key heads (H or 1), Q query width, C latent, R rope width, N selected keys,
# W words of 32 keys

from pallas_kernels import bitmask
from pallas_kernels import implementations
from pallas_kernels import visibility


def masked(
  index_query_BTIK,
  index_key_BSK,
  index_weight_BTI,
  query_BTHQ,
  key_BSGQ,
  lse_BTH,
  slots_BT,
  mask_BTW,
  query_segments_BT,
  key_segments_BS,
):
  """Raises ValueError unless the arrays of the masked form fit together."""
  _index(index_query_BTIK, index_key_BSK, index_weight_BTI)
  batch, queries = index_query_BTIK.shape[:2]
  num_keys = index_key_BSK.shape[1]
  if query_BTHQ.ndim != 4 or query_BTHQ.shape[:2] != (batch, queries):
    raise ValueError(
      f"{query_BTHQ.shape=} does not fit {index_query_BTIK.shape=}"
    )
  heads, width = query_BTHQ.shape[2:]
  _expect("key_BSGQ", key_BSGQ, (batch, num_keys, (heads, 1), width))
  _expect("lse_BTH", lse_BTH, (batch, queries, heads))
  _expect("slots_BT", slots_BT, (batch, queries))
  visibility.check(slots_BT, num_keys, query_segments_BT, key_segments_BS)
  if mask_BTW is not None:
    words = bitmask.num_words(num_keys)
    _expect("mask_BTW", mask_BTW, (batch, queries, words))


def gathered(
  index_query_BTIK,
  index_key_BSK,
  index_weight_BTI,
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  lse_BTH,
  indices_BTN,
):
  """Raises ValueError unless the arrays of the gathered form fit together."""
  _index(index_query_BTIK, index_key_BSK, index_weight_BTI)
  batch, queries = index_query_BTIK.shape[:2]
  num_keys = index_key_BSK.shape[1]
  if lse_BTH.ndim != 3 or latent_BSC.ndim != 3 or key_rope_BSR.ndim != 3:
    raise ValueError(
      f"{lse_BTH.shape=} {latent_BSC.shape=} {key_rope_BSR.shape=} need 3 axes"
    )
  heads = lse_BTH.shape[2]
  latent, rope = latent_BSC.shape[2], key_rope_BSR.shape[2]
  _expect("lse_BTH", lse_BTH, (batch, queries, heads))
  _expect("latent_BSC", latent_BSC, (batch, num_keys, latent))
  _expect("key_rope_BSR", key_rope_BSR, (batch, num_keys, rope))
  _expect(
    "query_latent_BTHC", query_latent_BTHC, (batch, queries, heads, latent)
  )
  _expect("query_rope_BTHR", query_rope_BTHR, (batch, queries, heads, rope))
  if indices_BTN.ndim != 3:
    raise ValueError(f"{indices_BTN.shape=} must be [B,T,N]")
  _expect("indices_BTN", indices_BTN, (batch, queries, indices_BTN.shape[2]))


def token_weight(token_weight_BT, shape):
  """Raises ValueError unless there is one weight a query."""
  _expect("token_weight_BT", token_weight_BT, shape)


def _index(index_query_BTIK, index_key_BSK, index_weight_BTI):
  if index_query_BTIK.ndim != 4 or index_key_BSK.ndim != 3:
    raise ValueError(
      f"{index_query_BTIK.shape=} {index_key_BSK.shape=} need 4 and 3 axes"
    )
  implementations.refuse_empty(index_query_BTIK, index_key_BSK)
  batch, _, _, width = index_query_BTIK.shape
  keys = index_key_BSK.shape[1]
  _expect("index_key_BSK", index_key_BSK, (batch, keys, width))
  _expect("index_weight_BTI", index_weight_BTI, index_query_BTIK.shape[:3])


def _expect(name, array, shape):
  """Raises ValueError unless array.shape is `shape`; a tuple gives a choice."""
  options = [size if isinstance(size, tuple) else (size,) for size in shape]
  fits = len(array.shape) == len(options) and all(
    size in choice for size, choice in zip(array.shape, options, strict=True)
  )
  if not fits:
    raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
