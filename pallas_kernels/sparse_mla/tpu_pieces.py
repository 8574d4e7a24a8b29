"""The computation of queries in pieces, for kernels to mix with copies.

A piece is a chunk of gathered keys. The queries of a list have the same number
of pieces each, and are computed apart.
"""
# H heads, C latent width, P padded width of a key, N keys of a chunk, Y twice
# the heads, L lanes, X joined widths

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
    self._sums = [None] * groups
    self._outs = [None] * groups

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
    self._sums[group] = _plus(self._sums[group], weight_HN)
    self._weights.append(weight_HN.astype(jnp.bfloat16))

  def multiply_latents(self, piece):
    """Adds a chunk's weighted latents."""
    start = piece * self._chunk
    latent_NC = rows.unpack_latent(
      self._raw_ref, self._words, start, self._chunk
    )
    out_HC = jnp.dot(
      self._weights[piece], latent_NC, preferred_element_type=jnp.float32
    )
    group = piece // self._per_group
    self._outs[group] = _plus(self._outs[group], out_HC)

  def write(self, out_ref, lse_ref, start):
    """Writes out and lse of the queries to places from `start` on."""
    for query in range(len(self._query_HPs)):
      first = query * self._per_query
      top_H1, sum_H1, out_HC = self._merge(
        range(first, first + self._per_query)
      )
      empty_H1 = sum_H1 == 0.0
      safe_H1 = jnp.where(empty_H1, 1.0, sum_H1)
      # Times the inverse, for a column is divided much sooner than a matrix.
      out_ref[start + query] = (out_HC * (1.0 / safe_H1)).astype(out_ref.dtype)
      lse_H1 = jnp.where(empty_H1, -jnp.inf, top_H1 + jnp.log(safe_H1))
      lse_ref[start + query] = lse_H1.T

  def _merge(self, groups):
    """Returns maximum, sum and weighted latents of some groups."""
    sums = [jnp.sum(self._sums[n], axis=1, keepdims=True) for n in groups]
    tops = [self._tops[n] for n in groups]
    outs = [self._outs[n] for n in groups]
    if len(groups) == 1:
      return tops[0], sums[0], outs[0]
    top_H1 = functools.reduce(jnp.maximum, tops)
    factors = [jnp.exp(one_H1 - top_H1) for one_H1 in tops]
    sum_H1 = sum(factor * one_H1 for factor, one_H1 in zip(factors, sums))
    out_HC = sum(factor * one_HC for factor, one_HC in zip(factors, outs))
    return top_H1, sum_H1, out_HC


class Gradients:
  """The queries of a list backward, in pieces that may be mixed with others."""

  def __init__(self, scale, chunk, arrays, raw_ref, words):
    """Takes of each query [query | rope | d_out], whole or parts, and lines."""
    self._scale = scale
    self._chunk = chunk
    self._boths = [_both(of_query[:-1], words) for of_query in arrays]
    self._lines = [of_query[-1] for of_query in arrays]
    self._raw_ref = raw_ref
    self._words = words
    self._keys = []
    self._products = []
    self.d_queries = [None] * len(arrays)
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
    lse_1H, mean_1H = self._lines[query][:1], self._lines[query][1:]
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
    d_query_HP = lax.dot_general(
      d_score_NH,
      self._keys[piece],
      (((0,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    self.d_queries[query] = _plus(self.d_queries[query], d_query_HP)


def _both(parts, words):
  """Returns [query | rope] over [d_out | 0]."""
  joined_HX = jnp.concatenate(parts, axis=1)
  width = (2 * words - 1) * rows.LANES
  nothing_HL = jnp.zeros((joined_HX.shape[0], rows.LANES), joined_HX.dtype)
  lower = jnp.concatenate([joined_HX[:, width:], nothing_HL], axis=1)
  return jnp.concatenate([joined_HX[:, :width], lower], axis=0)


def _plus(total, more):
  """Adds to a total that starts as None: zeros would cost an addition."""
  return more if total is None else total + more
