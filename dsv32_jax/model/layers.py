"""Norms, the gated MLP and the declaration of parameters."""

import itertools
import re

from flax import nnx
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from dsv32_jax import sharding

# B batch, T tokens, D model width, F hidden width, U width of what heads are
# made of, H heads, X any other axes

# By which the matrices of a gated MLP are stored.
WIDE, NARROW = ("embed", "ffn"), ("ffn", "embed")


def parameter(rngs, shape, axes, *, scale, dtype) -> nnx.Param:
  """Declares a normally initialised weight with logical axes.

  Args:
    rngs: source of the "params" key.
    shape: sizes, one for each logical axis.
    axes: logical axis names, which sharding.py maps to mesh axes.
    scale: standard deviation.
    dtype: storage type.
  """
  value = jax.random.normal(rngs.params(), shape, jnp.float32) * scale
  return nnx.Param(value.astype(dtype), axes=axes)


def product(
  equation: str, x, weight, axes, *, precision=None, keep: bool = False
):
  """Returns an einsum of tokens and a weight, the weight gathered by hand.

  Left to the compiler, the gradient of a weight is reduced in full on every
  device where each stores few rows of it; see `sharding.Gathered`.

  Args:
    equation: of two operands, x's first; B and T are its tokens.
    x: activations.
    weight: in the type of x.
    axes: logical axes of the weight, by which it is stored.
    precision: of the product.
    keep: let a rematerialised layer keep the result (`training.run.REMAT`),
      where it is narrow: neither product nor gather is then done again.
  """
  x_letters, letters, out_letters = re.findall(r"\w+", equation)
  # Split inside its matrices, a stack of them is scattered as it lies.
  inside = weight.ndim > 2 and axes[0] not in sharding.GATHERED
  how = sharding.gathered(axes, tiled=inside)
  split = {"B": "batch", "T": "length", **dict(zip(letters, how.wanted))}

  def multiply(x, share):
    out = jnp.einsum(equation, x, share, precision=precision)
    for letter, part, whole in zip(letters, share.shape, weight.shape):
      if part < whole and letter not in out_letters:
        out = sharding.mesh_sum(out, *sharding.RULES[split[letter]])
    return (out,)

  (out,) = sharding.shard_call(
    multiply,
    (x, weight),
    (tuple(map(split.get, x_letters)), how),
    (tuple(map(split.get, out_letters)),),
  )
  return ad_checkpoint.checkpoint_name(out, "projection") if keep else out


def products(x, weights, axes, *, keep: bool = False):
  """Returns products of the same tokens with several matrices.

  Where a mesh splits the matrices by rows they are gathered as one: each gather
  with its product and their gradients costs a TPU's compiler seconds.

  Args:
    x: [B, T, X].
    weights: matrices of X rows in the type of x.
    axes: the logical axes of each, the first of them the same.
    keep: as of `product`.
  """
  rows, columns = axes[0][0], [axis for _, axis in axes]
  if sharding.num_shards(rows) == 1 or any(
    sharding.num_shards(axis, besides=rows) > 1 for axis in columns
  ):
    return tuple(
      product("BTX,XY->BTY", x, weight, own, keep=keep)
      for weight, own in zip(weights, axes)
    )
  joined = jnp.concatenate(weights, axis=1)
  out = product("BTX,XY->BTY", x, joined, (rows, None), keep=keep)
  ends = list(itertools.accumulate(weight.shape[1] for weight in weights))
  return tuple(jnp.split(out, ends[:-1], axis=-1))


def rms_norm(x_XD, scale_D, epsilon: float):
  """Root-mean-square norm in float32, cast back to x's type at the end."""
  x32 = x_XD.astype(jnp.float32)
  variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(variance + epsilon)
  return (normed * scale_D.astype(jnp.float32)).astype(x_XD.dtype)


def layer_norm(x_XD, scale_D, bias_D, epsilon: float):
  """LayerNorm with bias in float32, cast back to x's type at the end."""
  x32 = x_XD.astype(jnp.float32)
  mean = jnp.mean(x32, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
  normed = (x32 - mean) * jax.lax.rsqrt(variance + epsilon)
  return (normed * scale_D + bias_D).astype(x_XD.dtype)


def swiglu(gate_XF, up_XF):
  """silu(gate) * up, the product in float32, in gate's type."""
  product = jax.nn.silu(gate_XF.astype(jnp.float32)) * up_XF.astype(jnp.float32)
  return product.astype(gate_XF.dtype)


class RMSNorm(nnx.Module):
  """A learned scale after root-mean-square normalisation."""

  def __init__(self, width: int, *, epsilon: float, dtype):
    self.scale = nnx.Param(jnp.ones((width,), dtype), axes=("norm",))
    self.epsilon = epsilon

  def __call__(self, x_BTD):
    return rms_norm(x_BTD, self.scale[...], self.epsilon)


class LayerNorm(nnx.Module):
  """A learned scale and bias after layer normalisation, always float32."""

  def __init__(self, width: int, *, epsilon: float):
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=("norm",))
    self.bias = nnx.Param(jnp.zeros((width,), jnp.float32), axes=("norm",))
    self.epsilon = epsilon

  def __call__(self, x_BTD):
    return layer_norm(x_BTD, self.scale[...], self.bias[...], self.epsilon)


class Mlp(nnx.Module):
  """The gated feed-forward network: down(silu(gate x) * up x)."""

  def __init__(self, width, hidden_width, *, rngs, scale, dtype):
    kwargs = dict(scale=scale, dtype=dtype)
    wide, narrow = (width, hidden_width), (hidden_width, width)
    self.gate = parameter(rngs, wide, WIDE, **kwargs)
    self.up = parameter(rngs, wide, WIDE, **kwargs)
    self.down = parameter(rngs, narrow, NARROW, **kwargs)

  def __call__(self, x_BTD):
    dtype = x_BTD.dtype
    gate_DF, up_DF = self.gate[...].astype(dtype), self.up[...].astype(dtype)
    gate_BTF, up_BTF = products(x_BTD, (gate_DF, up_DF), (WIDE, WIDE))
    hidden_BTF = swiglu(gate_BTF, up_BTF)
    down_FD = self.down[...].astype(dtype)
    return product("BTF,FD->BTD", hidden_BTF, down_FD, NARROW)
