"""Problems of the shared table as arrays, and the call that solves them.

A problem is a dictionary of named arrays. `shapes` says what they are, `draw`
fills them, `call` hands them to the operation's front.
"""
# B batch, T queries (tokens), S keys, H heads, G key heads, W words of 32 keys,
# N selected keys

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bitmask
from pallas_kernels import cases
from pallas_kernels.decode_scores import decode_scores
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.index_select import index_select
from pallas_kernels.indexer_kl import indexer_kl_gathered_loss
from pallas_kernels.indexer_kl import indexer_kl_loss
from pallas_kernels.masked_attention import masked_attention
from pallas_kernels.sparse_mla import sparse_mla

INDEX = ("index_query", "index_key", "index_weight")
PAGED = ("index_query", "index_weight", "page", "scale", "table", "lengths")
LATENT = ("query_latent", "query_rope", "latent", "key_rope")
# Those that a gradient is asked for.
TRAINED = {
  "index_select": (),
  "masked_attention": ("query", "key", "value"),
  "sparse_mla": LATENT,
  "indexer_kl": INDEX,
  "indexer_kl_gathered": INDEX,
  "expert_ffn": ("x", "weights", "gate", "up", "down"),
  "decode_scores": (),
}
# The output that the gradient is taken of.
DIFFERENTIABLE = {
  "masked_attention": "out",
  "sparse_mla": "out",
  "indexer_kl": "loss",
  "indexer_kl_gathered": "loss",
  "expert_ffn": "out",
}
SEGMENTS = 3


def directions(operation: str) -> tuple[str, ...]:
  """Returns the ways to run an operation; the last one does all it can."""
  both = ("forward", "forward_backward")
  return both if TRAINED[operation] else both[:1]


def shapes(case: cases.Case, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shape and type of each array of a problem, by name."""
  makers = {
    "index_select": _index_shapes,
    "masked_attention": _attend_shapes,
    "sparse_mla": _latent_shapes,
    "indexer_kl": _kl_shapes,
    "indexer_kl_gathered": _kl_gathered_shapes,
    "expert_ffn": _expert_shapes,
    "decode_scores": _paged_shapes,
  }
  found = {}
  for name, (shape, kind) in makers[case.operation](case).items():
    kind = dtype if kind == "input" else kind
    found[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(kind))
  return found


def _index_shapes(case):
  bt, bs = (case.batch, case.queries), (case.batch, case.keys)
  heads, width = case.index_heads, case.index_width
  named = {
    "index_query": ((*bt, heads, width), "input"),
    "index_key": ((*bs, width), "input"),
    "index_weight": ((*bt, heads), "float32"),
    "slots": (bt, "int32"),
  }
  if case.operation == "indexer_kl_gathered":
    del named["slots"]
  if case.key_scale:
    named["key_scale"] = (bs, "float32")
  return named | _visible_shapes(case)


def _visible_shapes(case):
  bt, bs = (case.batch, case.queries), (case.batch, case.keys)
  named = {}
  if case.sparsity:
    named["mask"] = ((*bt, bitmask.num_words(case.keys)), "uint32")
  if case.segments:
    named["query_segments"] = (bt, "int32")
    named["key_segments"] = (bs, "int32")
  return named


def _attend_shapes(case):
  bt, bs = (case.batch, case.queries), (case.batch, case.keys)
  return {
    "query": ((*bt, case.heads, case.width), "input"),
    "key": ((*bs, case.key_heads, case.width), "input"),
    "value": ((*bs, case.key_heads, case.value), "input"),
    "slots": (bt, "int32"),
  } | _visible_shapes(case)


def _latent_shapes(case):
  bt, bs = (case.batch, case.queries), (case.batch, case.keys)
  return {
    "query_latent": ((*bt, case.heads, case.latent), "input"),
    "query_rope": ((*bt, case.heads, case.rope), "input"),
    "latent": ((*bs, case.latent), "input"),
    "key_rope": ((*bs, case.rope), "input"),
    "indices": ((*bt, case.top_k), "int32"),
  }


def _kl_shapes(case):
  bt = (case.batch, case.queries)
  attend = _attend_shapes(case)
  return _index_shapes(case) | {
    "query": attend["query"],
    "key": attend["key"],
    "lse": ((*bt, case.heads), "float32"),
    "token_weight": (bt, "float32"),
  }


def _kl_gathered_shapes(case):
  bt = (case.batch, case.queries)
  return (
    _index_shapes(case)
    | _latent_shapes(case)
    | {
      "lse": ((*bt, case.heads), "float32"),
      "token_weight": (bt, "float32"),
    }
  )


def _expert_shapes(case):
  tokens, experts = case.queries, case.experts
  wide = ((experts, case.width, case.value), "input")
  return {
    "x": ((tokens, case.width), "input"),
    "experts": ((tokens, case.top_k), "int32"),
    "weights": ((tokens, case.top_k), "float32"),
    "gate": wide,
    "up": wide,
    "down": ((experts, case.value, case.width), "input"),
  }


def _paged_shapes(case):
  batch, heads = case.batch, case.index_heads
  num_pages = -(-case.keys // case.page)
  pages = (batch * num_pages, case.page)
  return {
    "index_query": ((batch, heads, case.index_width), "input"),
    "index_weight": ((batch, heads), "float32"),
    # Of 8 bits whatever the type of the query.
    "page": ((*pages, case.index_width), "float8_e4m3fn"),
    "scale": (pages, "float32"),
    "table": ((batch, num_pages), "int32"),
    "lengths": ((batch,), "int32"),
  }


def draw(case: cases.Case, dtype: str, seed: int = 0) -> dict[str, jax.Array]:
  """Fills the arrays of a problem from a seed."""
  rng = np.random.default_rng(seed)
  special = {
    "slots": _slots,
    "mask": _mask,
    "query_segments": _segments,
    "key_segments": _segments,
    "key_scale": lambda case, rng, shape: rng.uniform(0.5, 2.0, shape),
    "scale": lambda case, rng, shape: rng.uniform(0.5, 2.0, shape),
    "table": lambda case, rng, shape: rng.permutation(
      shape[0] * shape[1]
    ).reshape(shape),
    "lengths": _lengths,
    "token_weight": lambda case, rng, shape: rng.uniform(0.0, 1.0, shape),
    "weights": lambda case, rng, shape: rng.uniform(0.0, 1.0, shape),
    "indices": _indices,
    "experts": _expert_ids,
    # Near the log-sum-exp of scores of unit variance.
    "lse": lambda case, rng, shape: (
      np.log(case.keys) + rng.uniform(0.0, 1.0, shape)
    ),
  }
  arrays = {}
  for name, aval in shapes(case, dtype).items():
    if name in special:
      values = special[name](case, rng, aval.shape)
    else:
      values = rng.standard_normal(aval.shape, np.float32)
      if name in ("gate", "up", "down"):
        values *= np.float32(aval.shape[-2] ** -0.5)
    if name == "index_key" and case.nan:
      values[0, case.keys // 2, 0] = np.nan
    arrays[name] = jnp.asarray(values.astype(aval.dtype))
  return arrays


def _slots(case, rng, shape):
  if not case.ragged:
    last = np.arange(case.keys - case.queries, case.keys)
    return np.broadcast_to(last, shape)
  slots = rng.integers(-1, case.keys, shape)
  slots[0, 0] = case.keys - 1
  if case.queries > 1:
    slots[-1, -1] = -1
  return slots


def _lengths(case, rng, shape):
  if not case.ragged:
    return np.full(shape, case.keys)
  lengths = rng.integers(0, case.keys + 1, shape)
  lengths[0], lengths[-1] = case.keys, 0
  return lengths


def _segments(case, rng, shape):
  return np.sort(rng.integers(0, SEGMENTS, shape), axis=-1)


def _mask(case, rng, shape):
  """Words of which each bit is set once in 2**sparsity; a row is empty."""
  words = rng.integers(0, 1 << 32, shape, np.uint32)
  for _ in range(case.sparsity - 1):
    words &= rng.integers(0, 1 << 32, shape, np.uint32)
  spare = shape[-1] * bitmask.BITS - case.keys
  words[..., -1] &= np.uint32(0xFFFFFFFF >> spare)
  if case.ragged and case.queries > 2:
    words[:, case.queries // 2] = 0
  return words


def _indices(case, rng, shape):
  """Lists of distinct keys that a causal query may see, padded with -1."""
  batch, queries, width = shape
  indices = np.full(shape, -1, np.int32)
  for b in range(batch):
    for t in range(queries):
      visible = case.keys - queries + t + 1
      count = min(width, visible)
      if case.ragged:
        count = int(rng.integers(0, count + 1)) if (b, t) != (0, 0) else 0
      chosen = rng.permutation(visible)[:count]
      indices[b, t, :count] = np.sort(chosen)
  return indices


def _expert_ids(case, rng, shape):
  """Distinct experts a token; if ragged, few get most, and some are absent."""
  scores = rng.random((shape[0], case.experts))
  if case.ragged:
    scores += np.linspace(0.0, 1.0, case.experts) ** 4
  chosen = np.argsort(-scores, axis=-1)[:, : shape[1]]
  if case.ragged:
    chosen[0] = case.experts
  return chosen


def call(
  case: cases.Case, implementation: str | None, arrays: dict[str, Any]
) -> dict[str, jax.Array]:
  """Runs an operation's front and returns its outputs by name."""
  visible = {
    "query_segments_BT": arrays.get("query_segments"),
    "key_segments_BS": arrays.get("key_segments"),
  }
  masked = {"mask_BTW": arrays.get("mask")} | visible
  width = case.width or case.latent + case.rope
  options = {"implementation": implementation}

  def take(*names):
    return tuple(arrays[name] for name in names)

  if case.operation == "index_select":
    selected = index_select(
      *take(*INDEX, "slots"),
      top_k=case.top_k,
      key_scale_BS=arrays.get("key_scale"),
      want_indices=True,
      **visible,
      **options,
    )
    return selected._asdict()
  if case.operation == "expert_ffn":
    names = ("x", "experts", "weights", "gate", "up", "down")
    return {"out": expert_ffn(*take(*names), **options)}
  if case.operation == "decode_scores":
    return {"scores": decode_scores(*take(*PAGED), **options)}
  options["scale"] = width**-0.5
  if case.operation == "masked_attention":
    names = ("query", "key", "value", "slots")
    outputs = masked_attention(*take(*names), **options, **masked)
    return dict(zip(("out", "lse"), outputs))
  if case.operation == "sparse_mla":
    outputs = sparse_mla(*take(*LATENT, "indices"), **options)
    return dict(zip(("out", "lse"), outputs))
  if case.operation == "indexer_kl":
    names = (*INDEX, "query", "key", "lse", "slots", "token_weight")
    outputs = indexer_kl_loss(*take(*names), **options, **masked)
  else:
    names = (*INDEX, *LATENT, "lse", "indices", "token_weight")
    outputs = indexer_kl_gathered_loss(*take(*names), **options)
  return dict(zip(("loss", "kl"), outputs))


def call_with_gradient(
  case: cases.Case,
  implementation: str | None,
  arrays: dict[str, Any],
  cotangent: jax.Array,
) -> dict[str, jax.Array]:
  """Returns the outputs and, as "d_NAME", the gradient of each trained array.

  `cotangent` is that of the output which `DIFFERENTIABLE` names.
  """
  trained = {name: arrays[name] for name in TRAINED[case.operation]}

  def forward(trained):
    outputs = call(case, implementation, arrays | trained)
    return outputs[DIFFERENTIABLE[case.operation]], outputs

  out, pull_back, outputs = jax.vjp(forward, trained, has_aux=True)
  gradients = pull_back(cotangent.astype(out.dtype))[0]
  return outputs | {f"d_{name}": g for name, g in gradients.items()}
