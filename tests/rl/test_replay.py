"""Replay batches against their trajectories, and kept sets by numpy."""

import dataclasses

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax.model import presets
from dsv32_jax.model import token_order
from dsv32_jax.rl import logprobs
from dsv32_jax.rl import microbatches
from dsv32_jax.rl import replay
from dsv32_jax.rl import trajectory
from tests.support import models
from tests.support import tolerances

# B batch, T tokens, N tokens of a part, D width, V vocabulary

CONFIG = models.tiny_config()


def part(seed, length, prompt=3, kept_size=5, **changes):
  generator = np.random.default_rng(seed)
  ids = generator.integers(0, CONFIG.vocab_size, length)
  written = np.arange(length) >= prompt
  kept = [None] * length
  for place in range(prompt, length):
    others = generator.permutation(CONFIG.vocab_size)[: kept_size - 1]
    kept[place] = np.unique([*others, ids[place]])
  values = dict(
    token_ids_N=ids,
    written_N=written,
    logp_N=-generator.exponential(1, length),
    kept=kept,
    experts_LNA=generator.integers(0, CONFIG.num_experts, (2, length - 1, 3)),
  )
  return trajectory.Part(**(values | changes))


def packed(*parts, rows=4, lengths=(8, 16), config=CONFIG):
  count = len(parts)
  return replay.pack(
    [trajectory.Trajectory(parts=(one,)) for one in parts],
    np.arange(count) - 1.0,
    np.arange(count) / 10,
    config,
    num_rows=rows,
    lengths=lengths,
  )


@pytest.mark.parametrize(
  "vocab_size, kept_size, as_bits",
  [(61, 1, True), (61, 40, True), (1000, 1, False), (1000, 40, True)],
)
def test_every_value_lies_where_its_token_is_drawn(
  vocab_size, kept_size, as_bits
):
  given = [
    part(seed, length, kept_size=kept_size)
    for seed, length in ((0, 9), (1, 14), (2, 5))
  ]
  config = dataclasses.replace(CONFIG, vocab_size=vocab_size)
  got = packed(*given, config=config)
  assert got.batch.tokens_BT.shape == (4, 16)
  assert (got.kept.ids_BTK is None) == as_bits
  for row, one in enumerate(given):
    length = len(one.token_ids_N)
    for t in range(16):
      inside = t < length - 1
      assert got.batch.segments_BT[row, t] == inside
      drawn = inside and one.written_N[t + 1]
      assert got.batch.loss_mask_BT[row, t] == drawn
      if inside:
        assert got.batch.tokens_BT[row, t] == one.token_ids_N[t]
        assert got.batch.targets_BT[row, t] == one.token_ids_N[t + 1]
        np.testing.assert_array_equal(
          got.experts_LBTA[:, row, t], one.experts_LNA[:, t]
        )
      want = one.logp_N[t + 1] if drawn else 0
      np.testing.assert_allclose(got.old_logp_BT[row, t], want, rtol=1e-6)
      kept = kept_ids(got.kept, row, t)
      assert kept == (set(one.kept[t + 1]) if drawn else set())
  assert got.num_sequences == 3
  assert not got.batch.segments_BT[3].any() and got.advantages_B[3] == 0
  assert got.experts_LBTA.dtype == np.uint8


def kept_ids(kept, row, place):
  if kept.ids_BTK is not None:
    return {int(v) for v in kept.ids_BTK[row, place] if v >= 0}
  words = kept.bits_BTW[row, place]
  return {v for v in range(32 * len(words)) if words[v // 32] >> (v % 32) & 1}


def test_the_shortest_length_that_fits():
  assert packed(part(0, 9)).batch.tokens_BT.shape == (4, 8)
  assert packed(part(0, 10)).batch.tokens_BT.shape == (4, 16)


def test_places_tokens_in_the_order_that_balances_work():
  given = [
    part(
      seed,
      17,
      selection_LNS=np.random.default_rng(seed).integers(0, 9, (3, 16, 2)),
    )
    for seed in range(4)
  ]
  batch = packed(*given)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=2, context=4))
  placed = replay.place(batch, mesh)
  # Piece i and piece 7 - i, of two tokens each.
  own = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
  assert placed.order == token_order.TokenOrder(4)

  def check(names, of, along, places):
    for name in names:
      got, want = (
        jax.tree.leaves(getattr(one, name)) for one in (of(placed), of(batch))
      )
      assert got
      for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, np.take(b, places, along))

  fields = [f.name for f in dataclasses.fields(batch.batch)]
  check(fields, lambda x: x.batch, 1, own)
  check(["old_logp_BT", "ref_logp_BT", "kept"], lambda x: x, 1, own)
  check(["experts_LBTA", "selection_LBTS"], lambda x: x, 2, own)
  rows = ["advantages_B", "kl_weight_B", "trajectory_B"]
  check(rows, lambda x: x, 0, range(4))
  mesh = sharding.make_mesh(sharding.MeshConfig(data=4, expert=2))
  assert replay.place(batch, mesh).order is None


def test_pieces_of_a_batch_hold_its_rows():
  whole = packed(*(part(seed, 9) for seed in range(4)))
  pieces = microbatches.cut(jax.tree.map(jnp.asarray, whole), 2)
  for piece in range(2):
    got = jax.tree.map(lambda x: x[piece], pieces)
    rows = slice(2 * piece, 2 * piece + 2)
    assert got.num_sequences == whole.num_sequences == 4
    np.testing.assert_array_equal(got.experts_LBTA, whole.experts_LBTA[:, rows])
    for name in ("old_logp_BT", "advantages_B", "kl_weight_B"):
      np.testing.assert_array_equal(
        getattr(got, name), getattr(whole, name)[rows]
      )
    np.testing.assert_array_equal(
      got.batch.tokens_BT, whole.batch.tokens_BT[rows]
    )
    np.testing.assert_array_equal(got.kept.bits_BTW, whole.kept.bits_BTW[rows])
  with pytest.raises(ValueError, match="do not divide by microbatches=3"):
    microbatches.cut(whole, 3)


def test_more_than_256_experts_take_two_bytes():
  config = dataclasses.replace(CONFIG, num_experts=512)
  experts = np.full((2, 8, 3), 511)
  got = packed(part(0, 9, experts_LNA=experts), config=config)
  assert got.experts_LBTA.dtype == np.uint16
  assert got.experts_LBTA.max() == 511


def test_bytes_of_the_671b_model():
  config = presets.deepseek_v32_671b()
  layers, length = config.num_layers, 3
  one = trajectory.Part(
    token_ids_N=np.arange(length),
    written_N=np.arange(length) > 0,
    logp_N=np.zeros(length),
    kept=[None, np.arange(100), np.arange(5000)],
    experts_LNA=np.zeros((config.num_moe_layers, length - 1, 8), int),
    selection_LNS=np.zeros((layers, length - 1, config.index_top_k), int),
  )
  got = packed(one, lengths=(2,), rows=1, config=config)
  assert replay.bytes_per_token(got) == {
    "tokens": 28,
    "kept": 16160,
    "routing": 464,
    "selection": 499712,
  }
  few = dataclasses.replace(one, kept=[None, np.arange(100), np.arange(60)])
  got = packed(few, lengths=(2,), rows=1, config=config)
  assert replay.bytes_per_token(got)["kept"] == 4 * 128


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(logp_N=np.zeros(8)), "len\\(logp_N\\)=8"),
    (dict(logp_N=np.full(9, np.nan)), "no log-probability"),
    (dict(logp_N=np.full(9, 0.5)), "no log-probability"),
    (dict(written_N=np.ones(9, bool)), "first token is given"),
    (dict(experts_LNA=np.zeros((2, 9, 3), int)), "one less than the tokens"),
    (dict(kept=[np.array([], int)] * 9), "not in its own kept set"),
    (dict(token_ids_N=np.zeros(1)), "at least 2"),
    (dict(token_ids_N=np.arange(9) - 1), "no token id"),
    (dict(token_ids_N=np.arange(9.0)), "no token id"),
  ],
)
def test_bad_trajectories(change, message):
  with pytest.raises(ValueError, match=message):
    part(0, 9, **change)


def test_what_does_not_fit():
  with pytest.raises(ValueError, match="longest=19"):
    packed(part(0, 20))
  with pytest.raises(ValueError, match="count=5"):
    packed(*[part(0, 9)] * 5)
  with pytest.raises(ValueError, match="some do not"):
    packed(part(0, 9), part(0, 9, experts_LNA=None))
  with pytest.raises(ValueError, match="outside uint8"):
    packed(part(0, 9, experts_LNA=np.full((2, 8, 3), 300)))
  with pytest.raises(ValueError, match="exceeds vocab_size"):
    packed(part(0, 9, token_ids_N=np.full(9, 61), kept=None))
  unrecorded = packed(part(0, 9, experts_LNA=None))
  with pytest.raises(ValueError, match="recorded no routing"):
    unrecorded.replayed(routing=True, selection=False)
  with pytest.raises(ValueError, match="recorded no selection"):
    unrecorded.replayed(routing=False, selection=True)


# Log-probabilities over kept sets.


def head_example(seed=0, batch=2, length=8, width=5, vocab=70):
  generator = np.random.default_rng(seed)
  hidden = generator.normal(size=(batch, length, width))
  kernel = 2 * generator.normal(size=(width, vocab))
  kept_BTV = generator.random((batch, length, vocab)) < 0.2
  targets = generator.integers(0, vocab, (batch, length))
  np.put_along_axis(kept_BTV, targets[..., None], True, -1)
  kept_BTV[0, :3] = False
  return hidden, kernel, targets, kept_BTV


def oracle(hidden, kernel, targets, kept_BTV, temperature):
  logits = np.einsum("BTD,DV->BTV", hidden, kernel) / temperature
  kept_BTV = kept_BTV | ~kept_BTV.any(-1, keepdims=True)
  weights = np.where(kept_BTV, np.exp(logits), 0)
  chance = weights / weights.sum(-1, keepdims=True)
  logp = np.log(np.take_along_axis(chance, targets[..., None], -1))[..., 0]
  inside = np.where(kept_BTV, chance, 1)
  return logp, -(inside * np.log(inside)).sum(-1), chance


def as_sets(kept_BTV, form):
  if form == "bits":
    padded = np.pad(kept_BTV, ((0, 0), (0, 0), (0, -kept_BTV.shape[-1] % 32)))
    words = padded.reshape(*padded.shape[:2], -1, 32).astype(np.uint64)
    bits = (words << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)
    return logprobs.KeptSets(bits_BTW=jnp.asarray(bits))
  ids = np.full(kept_BTV.shape, -1, np.int32)
  for place in np.ndindex(kept_BTV.shape[:2]):
    found = np.flatnonzero(kept_BTV[place])
    ids[place][: len(found)] = found
  return logprobs.KeptSets(ids_BTK=jnp.asarray(ids))


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("form", ["bits", "ids", "none"])
def test_logprobs_over_kept_sets(form, slices, monkeypatch):
  hidden, kernel, targets, kept_BTV = head_example()
  sets = logprobs.KeptSets() if form == "none" else as_sets(kept_BTV, form)
  if form == "none":
    kept_BTV = np.ones_like(kept_BTV)
  monkeypatch.setattr(logprobs.losses, "MAX_LOGITS", 2 * 70 * 8 // slices)
  weight = np.random.default_rng(1).normal(size=targets.shape)

  @jax.jit
  def run(hidden, kernel):
    logp, entropy = logprobs.token_logprobs(
      hidden, kernel, jnp.asarray(targets), temperature=0.7, kept=sets
    )
    return jnp.sum(weight.astype(np.float32) * logp), (logp, entropy)

  args = [jnp.asarray(x, jnp.float32) for x in (hidden, kernel)]
  grad, (logp, entropy) = jax.grad(run, (0, 1), has_aux=True)(*args)
  want, want_entropy, chance = oracle(hidden, kernel, targets, kept_BTV, 0.7)
  tolerances.assert_close(logp, want)
  tolerances.assert_close(entropy, want_entropy)
  slope = weight[..., None] * (np.eye(70)[targets] - chance) / 0.7
  tolerances.assert_close(grad[0], np.einsum("BTV,DV->BTD", slope, kernel))
  tolerances.assert_close(grad[1], np.einsum("BTD,BTV->DV", hidden, slope))


def largest_array(jaxpr):
  """Entries of the largest array in a program, inner ones included."""
  sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
  inner = [
    largest_array(sub)
    for eqn in jaxpr.eqns
    for sub in core.jaxprs_in_params(eqn.params)
  ]
  return max([*sizes, *inner], default=0)


def test_logits_of_the_whole_batch_never_exist(monkeypatch):
  monkeypatch.setattr(logprobs.losses, "MAX_LOGITS", 2 * 70 * 2)
  hidden, kernel, targets, _ = head_example()

  def loss(hidden, kernel):
    logp, _ = logprobs.token_logprobs(hidden, kernel, jnp.asarray(targets))
    return jnp.sum(logp)

  args = [jnp.asarray(x, jnp.float32) for x in (hidden, kernel)]
  program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*args)
  assert largest_array(program.jaxpr) < hidden[..., 0].size * 70
  monkeypatch.setattr(logprobs.losses, "MAX_LOGITS", 2**26)
  program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*args)
  assert largest_array(program.jaxpr) >= hidden[..., 0].size * 70


@pytest.mark.parametrize("form", ["bits", "none"])
def test_gradients_scatter_nothing_for_which_a_tpu_would_sort(form):
  hidden, kernel, targets, kept_BTV = head_example()
  sets = logprobs.KeptSets() if form == "none" else as_sets(kept_BTV, form)

  def loss(hidden, kernel):
    logp, _ = logprobs.token_logprobs(
      hidden, kernel, jnp.asarray(targets), kept=sets
    )
    return jnp.sum(logp)

  args = [jnp.asarray(x, jnp.float32) for x in (hidden, kernel)]
  program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*args))
  assert "dot_general" in program and "scatter" not in program
