"""DeepSeekMoE: sigmoid router with a selection-only bias, shared experts.

V3 report section 2.1.2. No token is dropped. The bias steers which experts are
chosen and never how much they count; it is moved by the load, not by a
gradient.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import expert_exchange
from dsv32_jax.model import layers
from pallas_kernels import expert_ffn

# B batch, T tokens, D model width, E experts, G groups, A experts a token,
# F expert width

_ROUTER_AXES = ("embed", None)


class RouterBias(nnx.Variable):
  """The selection-only bias of a router: state, not a trained parameter."""


class Routing(NamedTuple):
  """Which experts each token uses, and how much.

  Attributes:
    experts_BTA: int32 expert numbers.
    weights_BTA: float32 weights, the routed scale included.
    affinities_BTE: float32 sigmoid scores, the bias not included.
  """

  experts_BTA: jax.Array
  weights_BTA: jax.Array
  affinities_BTE: jax.Array


def best(scores_XE, count: int):
  """Returns the indices of the `count` largest, ties to the lowest index.

  Repeated argmax: the counts are small, and a sort costs the TPU compiler
  seconds each.
  """
  chosen = []
  for _ in range(count):
    index_X = jnp.argmax(scores_XE, axis=-1)
    chosen.append(index_X)
    taken_XE = jax.nn.one_hot(index_X, scores_XE.shape[-1], dtype=bool)
    scores_XE = jnp.where(taken_XE, -jnp.inf, scores_XE)
  return jnp.stack(chosen, axis=-1).astype(jnp.int32)


def choose_experts(affinities_BTE, bias_E, config: config_lib.ModelConfig):
  """Chooses experts_BTA by biased affinity within the best groups.

  A group scores the sum of its two best biased affinities; experts outside
  the kept groups are out, however negative the others are.
  """
  biased_BTE = affinities_BTE + bias_E
  groups = config.num_expert_groups
  if config.expert_groups_kept < groups:
    biased_BTGE = biased_BTE.reshape(*biased_BTE.shape[:-1], groups, -1)
    first_BTG = jnp.max(biased_BTGE, axis=-1)
    best_BTG1 = jnp.argmax(biased_BTGE, axis=-1, keepdims=True)
    place_E = jnp.arange(biased_BTGE.shape[-1])
    second_BTG = jnp.max(
      jnp.where(place_E == best_BTG1, -jnp.inf, biased_BTGE), axis=-1
    )
    kept_BTA = best(first_BTG + second_BTG, config.expert_groups_kept)
    kept_BTG = jnp.any(jax.nn.one_hot(kept_BTA, groups, dtype=bool), axis=-2)
    biased_BTGE = jnp.where(kept_BTG[..., None], biased_BTGE, -jnp.inf)
    biased_BTE = biased_BTGE.reshape(biased_BTE.shape)
  return best(biased_BTE, config.experts_per_token)


def route(x_BTD, router_DE, bias_E, config, replay_BTA=None) -> Routing:
  """Routes tokens, in float32 throughout.

  Args:
    x_BTD: normed input.
    router_DE: expert centroids.
    bias_E: float32 selection bias.
    config: expert counts and scale.
    replay_BTA: recorded expert numbers to use instead of choosing; their
      weights are computed anew, so that the router learns.
  """
  # Router logits decide a discrete choice: rounding would pick other experts.
  logits_BTE = layers.product(
    "BTD,DE->BTE",
    x_BTD.astype(jnp.float32),
    router_DE.astype(jnp.float32),
    _ROUTER_AXES,
    precision=jax.lax.Precision.HIGHEST,
    keep=True,
  )
  affinities_BTE = jax.nn.sigmoid(logits_BTE)
  experts_BTA = replay_BTA
  if experts_BTA is None:
    experts_BTA = choose_experts(
      jax.lax.stop_gradient(affinities_BTE), bias_E, config
    )
  place_BTAE = jax.nn.one_hot(experts_BTA, config.num_experts)
  weights_BTA = jnp.einsum("BTE,BTAE->BTA", affinities_BTE, place_BTAE)
  if config.normalize_expert_weights:
    total_BT1 = jnp.sum(weights_BTA, axis=-1, keepdims=True)
    weights_BTA = weights_BTA / (total_BT1 + 1e-20)
  return Routing(experts_BTA, weights_BTA * config.routed_scale, affinities_BTE)


def expert_load(experts_BTA, real_BT, num_experts: int):
  """Counts the real tokens that chose each expert: int32 load_E."""
  chosen_BTAE = jax.nn.one_hot(experts_BTA, num_experts, dtype=jnp.int32)
  return jnp.einsum("BTAE,BT->E", chosen_BTAE, real_BT.astype(jnp.int32))


def balance_loss(routing: Routing, real_BT):
  """Sequence-wise balance loss (V3 report equations 17 to 20), before alpha.

  Args:
    routing: experts and affinities.
    real_BT: bool, False on padding.

  Returns:
    The scalar mean over sequences of sum_E f P, 1 at perfect balance.
  """
  num_experts = routing.affinities_BTE.shape[-1]
  per_token = routing.experts_BTA.shape[-1]
  real_BT1 = real_BT[..., None].astype(jnp.float32)
  count_B1 = jnp.maximum(jnp.sum(real_BT1, axis=1), 1)
  chosen_BTE = jnp.sum(jax.nn.one_hot(routing.experts_BTA, num_experts), -2)
  share_BTE = routing.affinities_BTE / (
    jnp.sum(routing.affinities_BTE, axis=-1, keepdims=True) + 1e-20
  )
  load_BE = jnp.sum(chosen_BTE * real_BT1, axis=1) * num_experts
  load_BE = load_BE / (per_token * count_B1)
  share_BE = jnp.sum(share_BTE * real_BT1, axis=1) / count_B1
  return jnp.mean(jnp.sum(load_BE * share_BE, axis=-1))


def update_bias(bias_E, load_E, speed: float):
  """Moves the bias against the load: up where under, down where over.

  V3 report section 2.1.2; `speed` is its gamma. Leading axes (layers) are
  allowed on both.
  """
  load_E = load_E.astype(jnp.float32)
  mean_1 = jnp.mean(load_E, axis=-1, keepdims=True)
  return bias_E + speed * jnp.sign(mean_1 - load_E)


class MoE(nnx.Module):
  """Shared experts plus the routed ones."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs, dtype):
    self.config = config
    width, hidden = config.width, config.expert_width
    experts, scale = config.num_experts, config.initializer_scale

    def parameter(shape, axes):
      return layers.parameter(rngs, shape, axes, scale=scale, dtype=dtype)

    self.router = parameter((width, experts), _ROUTER_AXES)
    self.expert_bias = RouterBias(jnp.zeros((experts,), jnp.float32))
    wide, narrow = (experts, width, hidden), (experts, hidden, width)
    self.gate = parameter(wide, ("experts", *layers.WIDE))
    self.up = parameter(wide, ("experts", *layers.WIDE))
    self.down = parameter(narrow, ("experts", *layers.NARROW))
    shared = hidden * config.num_shared_experts
    self.shared = (
      layers.Mlp(width, shared, rngs=rngs, scale=scale, dtype=dtype)
      if shared
      else None
    )

  def __call__(self, x_BTD, replay_BTA=None, *, implementation=None):
    """Returns out_BTD and the Routing; `implementation` is of `expert_ffn`."""
    routing = route(
      x_BTD, self.router[...], self.expert_bias[...], self.config, replay_BTA
    )
    out_BTD = routed_experts(
      x_BTD,
      routing,
      *(w[...].astype(x_BTD.dtype) for w in (self.gate, self.up, self.down)),
      implementation,
    )
    if self.shared is not None:
      out_BTD = out_BTD + self.shared(x_BTD).astype(jnp.float32)
    return out_BTD.astype(x_BTD.dtype), routing


def routed_experts(
  x_BTD, routing, gate_EDF, up_EDF, down_EFD, implementation=None
):
  """Sums the chosen experts' outputs, in float32.

  Where the mesh splits the experts, tokens travel to them and back; where it
  splits their hidden columns, partial results are summed.

  Args:
    x_BTD: normed input.
    routing: the tokens' Routing.
    gate_EDF: of all experts; likewise up_EDF, down_EFD.
    implementation: of `expert_ffn`. With "ragged" or "tpu", for accelerators,
      tokens travel by `ragged_all_to_all`, which CPUs do not have.
  """
  num_experts, _, hidden = gate_EDF.shape

  def run(x_BTD, experts_BTA, weights_BTA, gate_EDF, up_EDF, down_EFD):
    tokens = x_BTD.shape[0] * x_BTD.shape[1]
    rows = (
      x_BTD.reshape(tokens, -1),
      experts_BTA.reshape(tokens, -1),
      weights_BTA.reshape(tokens, -1),
    )
    matrices = (gate_EDF, up_EDF, down_EFD)
    devices = num_experts // gate_EDF.shape[0]
    if devices == 1:
      out_TD = expert_ffn.expert_ffn(
        *rows, *matrices, implementation=implementation
      )
    else:
      exchange = expert_exchange.Exchange(
        axis="expert",
        devices=devices,
        capacity=expert_exchange.default_capacity(rows[1].size, devices),
        ragged=implementation in ("ragged", "tpu"),
        implementation=implementation,
      )
      out_TD = expert_exchange.exchanged_experts(exchange, *rows, *matrices)
    out_BTD = out_TD.reshape(x_BTD.shape)
    if gate_EDF.shape[2] < hidden:
      out_BTD = sharding.mesh_sum(out_BTD, "tensor")
    return (out_BTD,)

  tokens = ("batch", "length", None)
  wide = sharding.gathered(("experts", *layers.WIDE), tiled=True)
  narrow = sharding.gathered(("experts", *layers.NARROW), tiled=True)
  (out_BTD,) = sharding.shard_call(
    run,
    (
      x_BTD,
      routing.experts_BTA,
      routing.weights_BTA,
      gate_EDF,
      up_EDF,
      down_EFD,
    ),
    (tokens, tokens, tokens, wide, wide, narrow),
    (tokens,),
  )
  return sharding.constrain(out_BTD, "batch", "length", None)
