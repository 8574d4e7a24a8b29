"""The computation of queries in pieces, for kernels to mix with copies.

A piece is a chunk of gathered keys. The queries of a list have the same number
of pieces each, and are computed apart.
"""
# H heads, C latent width, P padded width of a key, N keys of a chunk, Y twice
# the heads, L lanes

import functools

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels.sparse_mla import tpu_rows as rows


class Queries:
  """The queries of a list forward, in pieces that may be mixed with others.

  Groups of pieces make softmaxes of their own: where a list has one query, it
  has two groups, so that the one's weights are made during the other's
  products, and their results are merged.
  """

  def __init__(self, scale, chunk, query_HPs, raw_ref, words):
    self._scale = scale
    self._chunk = chunk
    self._query_HPs = query_HPs
    self._raw_ref = raw_ref
    self._words = words
    self.num_pieces = raw_ref.shape[0] // (words * chunk)
    groups = max(2, len(query_HPs))
    self._per_group = self.num_pieces // groups
    self._per_query = groups // len(query_HPs)
    self._scores = []
    self._weights = []
    self._tops = []
    self._sums = [0.0] * groups
    self._outs = [0.0] * groups

  def multiply_keys(self, piece):
    """Unpacks a chunk of keys and keeps its scores."""
    start = piece * self._chunk
    key_NP = rows.unpack(self._raw_ref, self._words, start, self._chunk)
    score_HN = self._scale * lax.dot_general(
      self._query_HPs[piece // (self._per_group * self._per_query)],
      key_NP,
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    self._scores.append(score_HN)

  def exponentiate(self, piece):
    """Makes weights of a chunk's scores, once all of its group are there."""
    group = piece // self._per_group
    if piece % self._per_group == 0:
      scores = self._scores[piece : piece + self._per_group]
      top_HN = functools.reduce(jnp.maximum, scores)
      # Above the marker's score, below others: an empty list sums to 0.
      floor = 0.5 * self._scale * rows.MARK
      top_H1 = jnp.max(top_HN, axis=1, keepdims=True)
      self._tops.append(jnp.maximum(top_H1, floor))
    weight_HN = jnp.exp(self._scores[piece] - self._tops[group])
    self._sums[group] += weight_HN
    self._weights.append(weight_HN.astype(jnp.bfloat16))

  def multiply_latents(self, piece):
    """Adds a chunk's weighted latents."""
    start = piece * self._chunk
    latent_NC = rows.unpack_latent(
      self._raw_ref, self._words, start, self._chunk
    )
    self._outs[piece // self._per_group] += jnp.dot(
      self._weights[piece], latent_NC, preferred_element_type=jnp.float32
    )

  def write(self, out_ref, lse_ref, start):
    """Writes out and lse of the queries to places from `start` on."""
    for query in range(len(self._query_HPs)):
      first = query * self._per_query
      groups = range(first, first + self._per_query)
      top_H1 = functools.reduce(jnp.maximum, [self._tops[n] for n in groups])
      sum_H1, out_HC = 0.0, 0.0
      for n in groups:
        factor_H1 = jnp.exp(self._tops[n] - top_H1)
        sum_H1 += factor_H1 * jnp.sum(self._sums[n], axis=1, keepdims=True)
        out_HC += factor_H1 * self._outs[n]
      empty_H1 = sum_H1 == 0.0
      safe_H1 = jnp.where(empty_H1, 1.0, sum_H1)
      out_ref[start + query] = (out_HC / safe_H1).astype(out_ref.dtype)
      lse_H1 = jnp.where(empty_H1, -jnp.inf, top_H1 + jnp.log(safe_H1))
      lse_ref[start + query] = lse_H1.T


class Gradients:
  """The queries of a list backward, in pieces that may be mixed with others."""

  def __init__(self, scale, chunk, arrays, raw_ref, words):
    self._scale = scale
    self._chunk = chunk
    self._boths = [_both(*of_query[:3]) for of_query in arrays]
    self._lines = [of_query[3:] for of_query in arrays]
    self._raw_ref = raw_ref
    self._words = words
    self._keys = []
    self._products = []
    self.d_queries = [0.0] * len(arrays)
    pieces = raw_ref.shape[0] // (words * chunk)
    self._per_query = pieces // len(arrays)

  def multiply_keys(self, piece):
    """Unpacks a chunk and multiplies it with queries and gradients."""
    start = piece * self._chunk
    key_NP = rows.unpack(self._raw_ref, self._words, start, self._chunk)
    product_NY = lax.dot_general(
      key_NP,
      self._boths[piece // self._per_query],
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    self._keys.append(key_NP)
    self._products.append(product_NY)

  def differentiate(self, piece, stage_ref):
    """Stages the gradients of a chunk's keys and adds the query's."""
    query = piece // self._per_query
    lse_1H, mean_1H = self._lines[query]
    scale, product_NY = self._scale, self._products[piece]
    heads = lse_1H.shape[1]
    weight_NH = jnp.exp(scale * product_NY[:, :heads] - lse_1H)
    d_weight_NH = product_NY[:, heads:] - mean_1H
    d_score_NH = (scale * weight_NH * d_weight_NH).astype(jnp.bfloat16)
    d_key_NP = jnp.dot(
      jnp.concatenate([d_score_NH, weight_NH.astype(jnp.bfloat16)], axis=1),
      self._boths[query],
      preferred_element_type=jnp.float32,
    )
    groups = d_key_NP.shape[1] // rows.LANES
    for group in range(groups):
      lanes = slice(group * rows.LANES, (group + 1) * rows.LANES)
      places = pl.ds(group, self._chunk, stride=groups)
      stage_ref[places, :] = d_key_NP[:, lanes]
    self.d_queries[query] += lax.dot_general(
      d_score_NH,
      self._keys[piece],
      (((0,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )


def _both(query_HC, query_HL, d_out_HC):
  """Returns [query | rope] over [d_out | 0]."""
  nothing_HL = jnp.zeros_like(query_HL)
  upper = jnp.concatenate([query_HC, query_HL], axis=1)
  lower = jnp.concatenate([d_out_HC, nothing_HL], axis=1)
  return jnp.concatenate([upper, lower], axis=0)
