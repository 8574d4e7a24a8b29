"""Routed experts on several devices: rows travel to the experts and back.

Each device holds some of the experts and its own tokens. A token's rows, one
for each of its experts, go to the devices that hold them in rounds; a round
moves at most `capacity` rows between any two devices, so that its buffers are
bounded whatever the routing, and there are as many rounds as the fullest pair
needs: imbalance costs time, never memory and never a token. Backward runs the
same rounds, recomputes the experts, and sends gradients the same ways.

On TPU a round's rows travel by `ragged_all_to_all`, which moves only those that
exist; elsewhere by `all_to_all`, which moves the whole buffers. All else is one
code. (The ragged one compiles for TPU and has not run on one.)
"""
# T tokens, A experts a token, E experts, D model width, N rows of a device
# (T times A), X devices of the axis, R rows of a pair in a round

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import expert_ffn


class Exchange(NamedTuple):
  """How rows travel; hashable, static.

  Attributes:
    axis: name of the mesh axis that splits the experts.
    devices: along it.
    capacity: rows that a pair of devices exchanges in a round.
    ragged: whether by `ragged_all_to_all`.
    implementation: of `expert_ffn`, for the experts of a device.
  """

  axis: str
  devices: int
  capacity: int
  ragged: bool
  implementation: str | None


class _Routes(NamedTuple):
  """Rows in the order of their experts, and so of their devices."""

  order_N: jax.Array  # the row at a place; row n is slot n % A of token n // A
  place_TA: jax.Array  # of a row among its device's; -1: it names no expert
  device_TA: jax.Array
  expert_N: jax.Array  # local number of a sorted row's expert
  start_X: jax.Array  # place of a device's first row
  count_X: jax.Array
  rounds: jax.Array  # the same on all devices of the axis


def default_capacity(rows: int, devices: int) -> int:
  """Rows a pair exchanges a round: a quarter of a balanced device's, plus 25%.

  Args:
    rows: of a device, tokens times experts a token.
    devices: of the axis.
  """
  balanced = -(-rows // devices)
  return max(8, -(-balanced * 5 // (16 * 8)) * 8)


def exchanged_experts(
  exchange, x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD
):
  """Returns sum_a weight[t,a] expert_(t,a)(x[t]), float32; inside shard_map.

  Args:
    exchange: `Exchange`.
    x_TD: this device's tokens.
    experts_TA: int32 numbers among all devices' experts; any other adds
      nothing.
    weights_TA: float32 weights.
    gate_EDF: of this device's experts; likewise up_EDF, down_EFD.
  """
  matrices = (gate_EDF, up_EDF, down_EFD)
  return _exchanged(exchange, x_TD, experts_TA, weights_TA, matrices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(exchange, x_TD, experts_TA, weights_TA, matrices):
  routes = _find_routes(exchange, experts_TA, matrices[0].shape[0])

  def one_round(state):
    number, out_TD = state
    trip = _Trip(exchange, routes, number)
    expert_N = trip.send_integers(routes.expert_N)
    x_ND = trip.send(trip.of_tokens(x_TD))
    y_ND = _experts(exchange, x_ND, expert_N, matrices)
    back_ND = trip.back(y_ND.astype(x_TD.dtype))
    for slot in range(experts_TA.shape[1]):
      row_TD = trip.for_slot(back_ND, slot).astype(jnp.float32)
      out_TD += weights_TA[:, slot, None] * row_TD
    return number + 1, out_TD

  state = (jnp.int32(0), jnp.zeros(x_TD.shape, jnp.float32))
  return lax.while_loop(lambda s: s[0] < routes.rounds, one_round, state)[1]


def _exchanged_forward(exchange, x_TD, experts_TA, weights_TA, matrices):
  out_TD = _exchanged(exchange, x_TD, experts_TA, weights_TA, matrices)
  return out_TD, (x_TD, experts_TA, weights_TA, matrices)


def _exchanged_backward(exchange, saved, d_out_TD):
  x_TD, experts_TA, weights_TA, matrices = saved
  routes = _find_routes(exchange, experts_TA, matrices[0].shape[0])
  per_token = experts_TA.shape[1]
  weight_N = weights_TA.astype(jnp.float32).reshape(-1)[routes.order_N]

  def one_round(state):
    number, d_x_TD, d_weights_TA, d_matrices = state
    trip = _Trip(exchange, routes, number)
    expert_N = trip.send_integers(routes.expert_N)
    x_ND = trip.send(trip.of_tokens(x_TD))
    d_y_ND = trip.send(trip.of_tokens(d_out_TD.astype(x_TD.dtype)))
    weight_N1 = trip.send(trip.of_rows(weight_N[:, None]))
    d_y_ND = d_y_ND.astype(jnp.float32)
    y_ND, pull_back = jax.vjp(
      lambda x, m: _experts(exchange, x, expert_N, m), x_ND, matrices
    )
    d_x_ND, added = pull_back(weight_N1 * d_y_ND)
    d_weight_N1 = jnp.sum(y_ND * d_y_ND, axis=1, keepdims=True)
    d_x_ND, d_weight_N1 = trip.back(d_x_ND), trip.back(d_weight_N1)
    d_weights = []
    for slot in range(per_token):
      d_x_TD += trip.for_slot(d_x_ND, slot).astype(jnp.float32)
      d_weights.append(trip.for_slot(d_weight_N1, slot)[:, 0])
    d_matrices = jax.tree.map(lambda a, b: a + b, d_matrices, added)
    d_weights_TA += jnp.stack(d_weights, axis=1)
    return number + 1, d_x_TD, d_weights_TA, d_matrices

  state = (
    jnp.int32(0),
    jnp.zeros(x_TD.shape, jnp.float32),
    jnp.zeros(weights_TA.shape, jnp.float32),
    jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), matrices),
  )
  _, d_x_TD, d_weights_TA, d_matrices = lax.while_loop(
    lambda s: s[0] < routes.rounds, one_round, state
  )
  d_matrices = jax.tree.map(
    lambda d, m: d.astype(m.dtype), d_matrices, matrices
  )
  return (
    d_x_TD.astype(x_TD.dtype),
    None,
    d_weights_TA.astype(weights_TA.dtype),
    d_matrices,
  )


_exchanged.defvjp(_exchanged_forward, _exchanged_backward)


def _experts(exchange, x_ND, expert_N, matrices):
  """Runs rows through the experts of this device; float32 [N,D]."""
  ones_N1 = jnp.ones((x_ND.shape[0], 1), jnp.float32)
  return expert_ffn.expert_ffn(
    x_ND,
    expert_N[:, None],
    ones_N1,
    *matrices,
    implementation=exchange.implementation,
  )


def _find_routes(exchange, experts_TA, experts_here) -> _Routes:
  """Orders the rows of this device by expert, by counting."""
  ids_N = experts_TA.reshape(-1)
  experts = experts_here * exchange.devices
  own_NE = ids_N[:, None] == jnp.arange(experts, dtype=ids_N.dtype)
  own_NE = own_NE.astype(jnp.int32)
  seen_NE = jnp.cumsum(own_NE, axis=0)
  count_E = seen_NE[-1]
  start_E = jnp.cumsum(count_E) - count_E
  place_N = jnp.sum(own_NE * (start_E + seen_NE - 1), axis=1)
  # Rows that name no expert come last and travel nowhere.
  lost_N = jnp.sum(own_NE, axis=1) == 0
  last_N = jnp.sum(count_E) + jnp.cumsum(lost_N) - 1
  place_N = jnp.where(lost_N, last_N, place_N)
  count_X = jnp.sum(count_E.reshape(exchange.devices, -1), axis=1)
  start_X = jnp.cumsum(count_X) - count_X
  rows_N = jnp.arange(ids_N.size, dtype=jnp.int32)
  order_N = jnp.zeros_like(rows_N).at[place_N].set(rows_N, unique_indices=True)
  device_N = jnp.clip(ids_N // experts_here, 0, exchange.devices - 1)
  place_here_N = jnp.where(lost_N, -1, place_N - start_X[device_N])
  rounds = -(-jnp.max(count_X) // exchange.capacity)
  return _Routes(
    order_N=order_N,
    place_TA=place_here_N.reshape(experts_TA.shape),
    device_TA=device_N.reshape(experts_TA.shape),
    expert_N=(ids_N % experts_here)[order_N],
    start_X=start_X,
    count_X=count_X,
    rounds=lax.pmax(rounds, exchange.axis),
  )


class _Trip:
  """One round: which rows travel, and the way there and back.

  A device's buffer has `capacity` slots for each device of the axis; slot r
  for device d holds row number `capacity` * round + r of those it sends there.
  """

  def __init__(self, exchange, routes, number):
    self._exchange = exchange
    self._routes = routes
    self._first = number * exchange.capacity
    slot_R = jnp.arange(exchange.capacity, dtype=jnp.int32)
    left_X = routes.count_X - self._first
    self._sent_X = jnp.clip(left_X, 0, exchange.capacity)
    self._used_N = (slot_R < self._sent_X[:, None]).reshape(-1)
    place_XR = routes.start_X[:, None] + self._first + slot_R
    last = routes.order_N.size - 1
    self._place_N = jnp.minimum(place_XR, last).reshape(-1)
    self._received_X = lax.all_to_all(
      self._sent_X, exchange.axis, 0, 0, tiled=True
    )

  def of_rows(self, sorted_NX):
    """Picks this round's rows of what lies in the order of the experts."""
    rows = sorted_NX[self._place_N]
    return jnp.where(self._used_N[:, None], rows, 0)

  def of_tokens(self, x_TD):
    """Picks this round's rows of what each token has once."""
    per_token = self._routes.place_TA.shape[1]
    token_N = self._routes.order_N[self._place_N] // per_token
    return jnp.where(self._used_N[:, None], x_TD[token_N], 0)

  def send(self, rows_ND):
    """Sends rows to their devices; returns those received."""
    return self._move(rows_ND, self._sent_X, self._received_X)

  def back(self, rows_ND):
    """Sends received rows back where they came from."""
    return self._move(rows_ND, self._received_X, self._sent_X)

  def send_integers(self, sorted_N):
    """Sends an integer a row; unused slots arrive as -1."""
    values_N = jnp.where(self._used_N, sorted_N[self._place_N], -1)
    return lax.all_to_all(values_N, self._exchange.axis, 0, 0, tiled=True)

  def for_slot(self, rows_ND, slot):
    """Returns each token's row of one of its experts; 0 in other rounds."""
    capacity = self._exchange.capacity
    offset_T = self._routes.place_TA[:, slot] - self._first
    here_T = (offset_T >= 0) & (offset_T < capacity)
    place_T = self._routes.device_TA[:, slot] * capacity + offset_T
    row_TD = rows_ND[jnp.where(here_T, place_T, 0)]
    return jnp.where(here_T[:, None], row_TD, 0)

  def _move(self, rows_ND, send_X, receive_X):
    axis, devices, capacity = self._exchange[:3]
    if not self._exchange.ragged:
      return lax.all_to_all(rows_ND, axis, 0, 0, tiled=True)
    first_X = jnp.arange(devices, dtype=jnp.int32) * capacity
    mine_X = jnp.full(devices, lax.axis_index(axis) * capacity, jnp.int32)
    return lax.ragged_all_to_all(
      rows_ND,
      jnp.zeros_like(rows_ND),
      first_X,
      send_X,
      mine_X,
      receive_X,
      axis_name=axis,
    )
